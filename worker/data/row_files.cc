#include "worker/data/row_files.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "worker/data/ffi_bytes.h"
#include "worker/data/preference_dataset.h"
#include "worker/data/text_file.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr size_t kMaxRowBytes = 64 << 20;
constexpr size_t kMaxCsvColumns = 1000;

bool IsBlank(int c) { return c == ' ' || c == '\t' || c == '\r' || c == '\n'; }

void SkipBlanks(TextFile& file) {
  while (IsBlank(file.Peek())) file.Get();
}

absl::Status ReadJsonLines(TextFile& file, const RowSink& sink) {
  std::string line;
  for (int64_t number = file.line(); file.GetLine(&line, kMaxRowBytes); number = file.line()) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    if (!sink(line, file.Where(number))) return absl::OkStatus();
  }
  return file.status();
}

// Reads one JSON value as it stands, up to its end; `text` may be null. What is no JSON is cut out all
// the same, for its reader to refuse, but a value that never ends is an error here.
absl::Status CutValue(TextFile& file, std::string* text) {
  const int64_t line = file.line();
  int64_t depth = 0;
  bool in_string = false;
  while (file.Peek() >= 0) {
    const int c = file.Peek();
    if (!in_string && depth == 0 && (IsBlank(c) || c == ',' || c == ']' || c == '}' || c == ':'))
      return absl::OkStatus();
    if (text != nullptr) {
      if (text->size() == kMaxRowBytes) {
        return file.Bad(line, absl::StrCat("the row that begins here has more than ", kMaxRowBytes, " bytes"));
      }
      text->push_back(static_cast<char>(c));
    }
    file.Get();
    if (in_string) {
      if (c == '\\') {
        if (text != nullptr && file.Peek() >= 0) text->push_back(static_cast<char>(file.Peek()));
        file.Get();
      }
      in_string = c != '"';
    } else {
      in_string = c == '"';
      if (c == '{' || c == '[') ++depth;
      if (c == '}' || c == ']') --depth;
    }
    if (!in_string && depth == 0 && (c == '}' || c == ']' || c == '"')) return absl::OkStatus();
  }
  SIMPO_RETURN_IF_ERROR(file.status());
  return in_string || depth > 0 ? file.Bad(line, "the file ends within the value that begins here") : absl::OkStatus();
}

// The elements of an array whose bracket comes next.
absl::Status ReadArray(TextFile& file, const RowSink& sink) {
  const int64_t begin = file.line();
  file.Get();
  std::string text;
  for (SkipBlanks(file); file.Peek() != ']'; SkipBlanks(file)) {
    const int64_t line = file.line();
    text.clear();
    SIMPO_RETURN_IF_ERROR(CutValue(file, &text));
    SIMPO_RETURN_IF_ERROR(file.status());
    if (text.empty()) {
      return file.Peek() < 0 ? file.Bad(begin, "the file ends within the list of rows that begins here")
                             : file.Bad(line, "a row is expected here");
    }
    if (!sink(text, file.Where(line))) return absl::OkStatus();
    SkipBlanks(file);
    if (file.Peek() == ',') {
      file.Get();
    } else if (file.Peek() != ']' && file.Peek() >= 0) {
      return file.Bad(file.line(), "a comma or the end of the list of rows is expected here");
    }
  }
  return absl::OkStatus();
}

// Goes to the list of rows in {"data": [...]}. False when the object has none.
absl::StatusOr<bool> EnterContainer(TextFile& file) {
  constexpr std::array kNames = {"\"data\"", "\"rows\"", "\"examples\"", "\"instances\"", "\"records\""};
  file.Get();
  std::string key;
  for (SkipBlanks(file); file.Peek() == '"'; SkipBlanks(file)) {
    key.clear();
    SIMPO_RETURN_IF_ERROR(CutValue(file, &key));
    SkipBlanks(file);
    if (file.Peek() == ':') file.Get();
    SkipBlanks(file);
    if (file.Peek() == '[' && std::find(kNames.begin(), kNames.end(), key) != kNames.end()) return true;
    SIMPO_RETURN_IF_ERROR(CutValue(file, nullptr));
    SkipBlanks(file);
    if (file.Peek() != ',') break;
    file.Get();
  }
  return false;
}

absl::Status ReadJson(TextFile& file, const RowSink& sink) {
  SkipBlanks(file);
  if (file.Peek() == '[') return ReadArray(file, sink);
  if (file.Peek() == '{') {
    SIMPO_ASSIGN_OR_RETURN(const bool container, EnterContainer(file));
    if (container) return ReadArray(file, sink);
    file.Rewind();
  }
  // Objects one after the other: JSON Lines by another name.
  std::string text;
  for (SkipBlanks(file); file.Peek() >= 0; SkipBlanks(file)) {
    const int64_t line = file.line();
    text.clear();
    SIMPO_RETURN_IF_ERROR(CutValue(file, &text));
    if (text.empty()) return file.Bad(line, "a row is expected here");
    if (!sink(text, file.Where(line))) return absl::OkStatus();
  }
  return file.status();
}

// One record of a CSV file; false at the end.
absl::StatusOr<bool> ReadCsvRecord(TextFile& file, std::vector<std::string>* cells) {
  cells->assign(1, "");
  if (file.Peek() < 0) return file.status().ok() ? absl::StatusOr<bool>(false) : file.status();
  const int64_t begin = file.line();
  size_t bytes = 0;
  bool quoted = false;      // within quotes
  bool was_quoted = false;  // this cell had quotes
  for (int c = file.Get(); c >= 0; c = file.Get()) {
    std::string& cell = cells->back();
    if (++bytes > kMaxRowBytes) {
      return file.Bad(begin, absl::StrCat("the record that begins here has more than ", kMaxRowBytes, " bytes",
                                          quoted ? "; is a quote not closed?" : ""));
    }
    if (quoted) {
      if (c != '"') {
        cell.push_back(static_cast<char>(c));
      } else if (file.Peek() == '"') {
        cell.push_back(static_cast<char>(file.Get()));
      } else {
        quoted = false;
      }
    } else if (c == '"' && cell.empty() && !was_quoted) {
      quoted = was_quoted = true;
    } else if (c == ',') {
      if (cells->size() == kMaxCsvColumns)
        return file.Bad(begin, absl::StrCat("more than ", kMaxCsvColumns, " columns"));
      cells->emplace_back();
      was_quoted = false;
    } else if (c == '\n' || (c == '\r' && file.Peek() == '\n')) {
      if (c == '\r') file.Get();
      return true;
    } else if (was_quoted) {
      return file.Bad(file.line(), "text after a closing quote; a quote within a quoted cell is written twice");
    } else {
      cell.push_back(static_cast<char>(c));
    }
  }
  SIMPO_RETURN_IF_ERROR(file.status());
  if (quoted) return file.Bad(begin, "the file ends within quotes of the record that begins here");
  return true;
}

// A cell is text, but for lists of messages written as JSON. Empty cells are as absent, except for the
// two responses, which may be empty texts.
Json CellValue(const std::string& column, const std::string& cell) {
  if (cell.empty()) return column.starts_with("chosen") || column.starts_with("rejected") ? Json("") : Json(nullptr);
  const size_t begin = cell.find_first_not_of(" \t\r\n");
  if (begin != std::string::npos && cell[begin] == '[' && cell.find("\"role\"") != std::string::npos) {
    // Row readers bound the depth; here the parser must not go deeper than they do.
    Json list = Json::parse(
        cell, [](int depth, Json::parse_event_t, Json&) { return depth <= 4; }, false);
    if (list.is_array()) return list;
  }
  return cell;
}

absl::Status ReadCsv(TextFile& file, const RowSink& sink) {
  std::vector<std::string> header;
  SIMPO_ASSIGN_OR_RETURN(const bool any, ReadCsvRecord(file, &header));
  if (!any) return absl::OkStatus();
  std::vector<std::string> cells;
  while (true) {
    const int64_t line = file.line();
    SIMPO_ASSIGN_OR_RETURN(const bool more, ReadCsvRecord(file, &cells));
    if (!more) return absl::OkStatus();
    if (cells.size() == 1 && cells[0].empty()) continue;
    if (cells.size() != header.size()) {
      return file.Bad(line, absl::StrCat("the record has ", cells.size(), " cells, the header ", header.size()));
    }
    Json row = Json::object();
    for (size_t i = 0; i < cells.size(); ++i) row[header[i]] = CellValue(header[i], cells[i]);
    std::string text;
    try {
      text = row.dump();
    } catch (const Json::exception&) {
      text.assign(1, '\xff');  // the row's reader says that it is not UTF-8
    }
    if (!sink(text, file.Where(line))) return absl::OkStatus();
  }
}

absl::Status ReadParquet(const fs::path& path, const RowSink& sink, int64_t* count) {
  std::string columns;
  for (const std::string_view name : PreferenceColumns())
    absl::StrAppend(&columns, columns.empty() ? "" : "\n", std::string(name));
  const std::string name = path.string();
  SimpoBytes error{};
  std::unique_ptr<SimpoParquet, void (*)(SimpoParquet*)> file(
      simpo_parquet_open(BytePtr(name), name.size(), BytePtr(columns), columns.size(), &error), simpo_parquet_free);
  if (file == nullptr) {
    const std::string problem = TakeBytes(error);
    std::error_code ignored;
    if (!fs::exists(path, ignored))
      return absl::NotFoundError(absl::StrCat("cannot read the data file ", name, ": ", problem));
    return absl::InvalidArgumentError(absl::StrCat(name, ": not a whole Parquet file: ", problem));
  }
  if (count != nullptr) {
    *count = simpo_parquet_num_rows(file.get());
    return absl::OkStatus();
  }
  int64_t row = 0;
  while (true) {
    SimpoBytes bytes{};
    if (!simpo_parquet_next(file.get(), &bytes, &error)) {
      return absl::InvalidArgumentError(absl::StrCat(name, ": after row ", row, ": ", TakeBytes(error)));
    }
    const std::string lines = TakeBytes(bytes);
    if (lines.empty()) return absl::OkStatus();
    for (size_t begin = 0; begin < lines.size();) {
      const size_t end = lines.find('\n', begin);
      if (!sink(std::string_view(lines).substr(begin, end - begin), absl::StrCat(name, ": row ", ++row)))
        return absl::OkStatus();
      begin = end + 1;
    }
  }
}

std::string FormOf(const fs::path& path) {
  const fs::path name = path.extension() == ".gz" ? path.stem() : path;
  return name.extension().string();
}

}  // namespace

bool IsRowFile(const fs::path& path) {
  const std::string form = FormOf(path);
  return form == ".jsonl" || form == ".json" || form == ".csv" || form == ".parquet";
}

absl::Status ReadRows(const fs::path& path, const RowSink& sink) {
  const std::string form = FormOf(path);
  if (form == ".parquet") return ReadParquet(path, sink, nullptr);
  if (!IsRowFile(path)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path.string(),
                     ": data files are .jsonl, .json, .csv or .parquet; convert it, for example with "
                     "datasets: ds.to_json(\"train.jsonl\")"));
  }
  SIMPO_ASSIGN_OR_RETURN(TextFile file, TextFile::Open(path));
  if (form == ".json") return ReadJson(file, sink);
  return form == ".csv" ? ReadCsv(file, sink) : ReadJsonLines(file, sink);
}

absl::StatusOr<int64_t> CountRows(const fs::path& path) {
  int64_t rows = 0;
  if (FormOf(path) == ".parquet") {
    SIMPO_RETURN_IF_ERROR(ReadParquet(path, {}, &rows));
    return rows;
  }
  SIMPO_RETURN_IF_ERROR(ReadRows(path, [&](std::string_view, const std::string&) { return ++rows > 0; }));
  return rows;
}

}  // namespace simpo
