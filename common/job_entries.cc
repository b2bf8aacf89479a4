#include "common/job_entries.h"

#include <yaml-cpp/depthguard.h>
#include <yaml-cpp/eventhandler.h>

#include <algorithm>
#include <iterator>
#include <set>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "common/job_keys.h"
#include "common/job_values.h"
#include "common/text.h"

namespace simpo {
namespace {

constexpr char kTooDeep[] =
    "lists and maps lie too deep in each other; no key of a job file needs more than three levels";

// The key of the table that this key sets; itself when it is no other name of one.
std::string_view TargetKey(std::string_view key) {
  for (const JobKeyAlias& alias : JobKeyAliases()) {
    if (alias.alias == key) return alias.name;
  }
  for (const ConvertedJobKey& converted : ConvertedJobKeys()) {
    if (converted.name == key && !converted.sets.empty()) return converted.sets;
  }
  return key;
}

void ReadMap(const YAML::Node& map, const std::string& prefix, int override_line, JobReading* reading) {
  std::set<std::string> seen;
  for (const auto& item : map) {
    const int line = override_line >= 0 ? override_line : item.first.Mark().line + 1;
    if (!item.first.IsScalar()) {
      reading->Violation(prefix, line, "a key must be a word");
      continue;
    }
    const std::string key = prefix + item.first.Scalar();
    if (!seen.insert(key).second) {
      reading->Violation(key, line, "the key stands twice; keep one");
    } else if (key == "resources" && item.second.IsMap()) {
      ReadMap(item.second, "resources.", override_line, reading);
    } else if (key == "resources" && !item.second.IsNull()) {
      reading->Violation(key, line, "must be a map, as `resources: {ranks_per_node: 2}`");
    } else if (key != "resources") {
      reading->entries.push_back({key, item.second, line, key});
    }
  }
}

// What the library says of bad YAML, and what to do about it.
constexpr std::pair<std::string_view, std::string_view> kYamlRemedies[] = {
    {"illegal map value",
     "a value that holds a colon and a space must stand in quotes; or the line above lacks its colon"},
    {"illegal map key", "a key must be a word, followed by a colon and a space"},
    {"illegal block entry", "`- item` must stand on a line of its own, below its key"},
    {"illegal tab when looking for indentation", "indent with spaces"},
    {"illegal flow end", "a ] or } has no [ or { before it; put it in quotes if it is meant"},
    {"illegal EOF in scalar", "a quote is not closed"},
    {"illegal document indicator in scalar", "a quote is not closed before this line"},
    {"end of map not found", "this line is no `key: value`, or its indent is not that of the keys above"},
    {"end of sequence not found", "this line is no `- item`, or its indent is not that of the items above"},
    {"end of map flow not found", "a { is not closed by }, or what is in it are no `key: value` with commas between"},
    {"end of sequence flow not found", "a [ is not closed by ], or a comma is missing"},
    {"the referenced anchor is not defined", "`*name` stands for what `&name` marks further up; put a * in quotes"},
    {"unknown token", "a value cannot begin with this sign; put it in quotes"},
    {"unknown escape character: ", "write \\\\ for a backslash within double quotes, or use single quotes"},
    {"unexpected character in block scalar", "put the text below the | or >, indented"},
    {"invalid unicode: ", "\\u and \\U in double quotes stand for characters, each half of a pair for none"},
    {"bad character found while scanning hex number", "\\x takes two digits of 0 to f, \\u four, \\U eight"},
    {"illegal character found while scanning", "put a value that begins with &, * or ! in quotes"},
    {"alias not found after *", "put a value that begins with * in quotes"},
    {"anchor not found after &", "put a value that begins with & in quotes"},
    {"cannot assign multiple", "a value takes one &name and one !tag"},
    {"cannot set zero indentation for a block scalar", "leave out the number after | or >"},
    {"bad YAML version", "leave out the line that begins with %YAML"},
    {"YAML major version too large", "leave out the line that begins with %YAML"},
};

// Whether the line, from 0, is indented with a tab, of which the library makes all kinds of errors.
bool IsIndentedWithTab(std::string_view yaml, int line) {
  for (; line > 0; --line) {
    const size_t end = yaml.find('\n');
    if (end == std::string_view::npos) return false;
    yaml.remove_prefix(end + 1);
  }
  return yaml.substr(0, yaml.find_first_not_of(" \t")).find('\t') != std::string_view::npos;
}

std::string WithRemedy(const YAML::Exception& error, std::string_view yaml) {
  if (IsIndentedWithTab(yaml, error.mark.line)) return "the line is indented with a tab; indent with spaces";
  for (const auto& [message, remedy] : kYamlRemedies) {
    if (std::string_view(error.msg).starts_with(message)) {
      return absl::StrCat(error.msg, "; ", std::string(remedy));
    }
  }
  return error.msg;
}

// What nodes do not tell: where documents begin, and where text is broken.
class TextEvents final : public YAML::EventHandler {
 public:
  int last_start() const { return last_start_; }      // a line, as the next
  int first_broken() const { return first_broken_; }  // 0: none
  void OnDocumentStart(const YAML::Mark& mark) override { last_start_ = mark.line + 1; }
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark&, YAML::anchor_t) override {}
  void OnAlias(const YAML::Mark&, YAML::anchor_t) override {}
  void OnScalar(const YAML::Mark& mark, const std::string&, YAML::anchor_t, const std::string& value) override {
    if (size_t bad = 0; first_broken_ == 0 && !IsValidUtf8(value, &bad)) first_broken_ = mark.line + 1;
  }
  void OnSequenceStart(const YAML::Mark&, const std::string&, YAML::anchor_t, YAML::EmitterStyle::value) override {}
  void OnSequenceEnd() override {}
  void OnMapStart(const YAML::Mark&, const std::string&, YAML::anchor_t, YAML::EmitterStyle::value) override {}
  void OnMapEnd() override {}

 private:
  int last_start_ = 0, first_broken_ = 0;
};

constexpr char kZeroByte[] = "has a zero byte; a job file is plain text in UTF-8";
// Of these the library makes single bytes.
constexpr char kBroken[] = "\\N and \\_ in double quotes are not taken; write \\u0085 or \\u00a0";

// The library's events of so many documents; false: there are fewer. YAML::LoadAll would tell too, but takes a stray
// sign such as a comma for one empty document after the other, without end.
bool ReadEvents(const std::string& yaml, int documents, TextEvents* events) {
  std::istringstream text(yaml);
  YAML::Parser parser(text);
  while (documents > 0 && parser.HandleNextDocument(*events)) --documents;
  return documents == 0;
}

// The text as one YAML map of entries.
bool ReadText(std::string_view yaml, JobReading* reading) {
  if (yaml.size() > kMaxJobFileBytes) {
    reading->Violation("", 0,
                       absl::StrCat("the file has ", yaml.size(), " bytes; a job file has at most ", kMaxJobFileBytes));
    return false;
  }
  const auto line_at = [&](size_t offset) {
    return static_cast<int>(1 + std::count(yaml.begin(), yaml.begin() + static_cast<std::ptrdiff_t>(offset), '\n'));
  };
  if (size_t bad = 0; !IsValidUtf8(yaml, &bad)) {
    reading->Violation("", line_at(bad), "the text is not UTF-8");
    return false;
  }
  // The library takes it for the backslash of an escape.
  if (const size_t zero = yaml.find('\0'); zero != std::string_view::npos) {
    reading->Violation("", line_at(zero), absl::StrCat("the text ", kZeroByte));
    return false;
  }
  const std::string text(yaml);
  TextEvents events;
  if (ReadEvents(text, 2, &events)) {
    reading->Violation("", events.last_start(),
                       "a second document begins here, by `---`, by another indent or by a stray sign; a file holds "
                       "one job, its keys all with the same indent");
    return false;
  }
  if (events.first_broken() > 0) {
    reading->Violation("", events.first_broken(), kBroken);
    return false;
  }
  const YAML::Node document = YAML::Load(text);
  if (document.IsNull()) {
    reading->Violation("", 0, "the file is empty; a job needs at least model_name_or_path and dataset_mixer");
    return false;
  }
  if (!document.IsMap()) {
    reading->Violation("", document.Mark().line + 1, "a job file is a list of `key: value` lines");
    return false;
  }
  ReadMap(document, "", -1, reading);
  return true;
}

void ReadOverride(const std::string& text, JobReading* reading) {
  const size_t equals = text.find('=');
  if (equals == std::string::npos || equals == 0) {
    reading->Violation(text, 0,
                       text.empty() ? "a --set is empty; it takes key=value, as --set beta=2.5"
                                    : "--set takes key=value, as --set beta=2.5");
    return;
  }
  const std::string key = text.substr(0, equals);
  if (size_t bad = 0; !IsValidUtf8(text, &bad)) {
    reading->Violation("", 0, "a --set is not UTF-8");
    return;
  }
  if (text.find('\0') != std::string::npos) {
    reading->Violation("", 0, absl::StrCat("a --set ", kZeroByte));
    return;
  }
  try {
    const std::string value = text.substr(equals + 1);
    TextEvents events;
    ReadEvents(value, 1, &events);
    if (events.first_broken() > 0) {
      reading->Violation(key, 0, absl::StrCat("--set: ", kBroken));
      return;
    }
    YAML::Node map;
    map[key] = YAML::Load(value);
    ReadMap(map, "", 0, reading);
  } catch (const YAML::DeepRecursion&) {
    reading->Violation(key, 0, kTooDeep);
  } catch (const YAML::Exception& error) {
    reading->Violation(
        key, 0, absl::StrCat("--set: the value is not valid YAML: ", WithRemedy(error, text.substr(equals + 1))));
  }
}

// --set wins over the file, and a later --set over an earlier one. Two keys of the file stay, to be
// refused later.
void DropOverridden(JobReading* reading) {
  std::list<JobEntry>& entries = reading->entries;
  std::set<std::string_view> overridden;  // by what stands further down
  for (auto it = entries.end(); it != entries.begin();) {
    --it;
    const std::string_view target = TargetKey(it->key);
    if (overridden.contains(target)) {
      it = entries.erase(it);
    } else if (it->line == 0) {
      overridden.insert(target);
    }
  }
}

}  // namespace

JobEntry* JobReading::Find(std::string_view key) {
  for (JobEntry& entry : entries) {
    if (entry.key == key) return &entry;
  }
  return nullptr;
}

std::optional<JobEntry> JobReading::Take(std::string_view key) {
  for (auto it = entries.begin(); it != entries.end(); ++it) {
    if (it->key != key) continue;
    JobEntry entry = *it;
    entries.erase(it);
    return entry;
  }
  return std::nullopt;
}

int JobReading::LineOf(std::string_view key) {
  const JobEntry* entry = Find(key);
  return entry == nullptr ? 0 : entry->line;
}

std::string ScalarText(const YAML::Node& value) { return value.IsScalar() ? value.Scalar() : ""; }

std::optional<double> ScalarNumber(const YAML::Node& value) {
  if (!value.IsScalar()) return std::nullopt;
  return ToNumber(value.Scalar());
}

bool IsOff(const YAML::Node& value) {
  if (value.IsNull()) return true;
  if (!value.IsScalar()) return value.size() == 0;
  const std::string& text = value.Scalar();
  return !ToBool(text).value_or(true) || text == "none" || text == "None" || text.empty() || ToNumber(text) == 0.0;
}

bool ReadJobEntries(std::string_view yaml, const std::vector<std::string>& overrides, JobReading* reading) {
  try {
    if (!ReadText(yaml, reading)) return false;
  } catch (const YAML::DeepRecursion& error) {
    reading->Violation("", error.mark.line + 1, kTooDeep);
    return false;
  } catch (const YAML::Exception& error) {
    reading->Violation("", error.mark.line + 1,
                       absl::StrCat("not valid YAML (column ", error.mark.column + 1, "): ", WithRemedy(error, yaml)));
    return false;
  }
  for (const std::string& text : overrides) ReadOverride(text, reading);
  DropOverridden(reading);
  return true;
}

}  // namespace simpo
