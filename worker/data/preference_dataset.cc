#include "worker/data/preference_dataset.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr size_t kMaxRowBytes = 64 << 20;
constexpr int kMaxDepth = 32;
constexpr size_t kListedRows = 20;

absl::Status Bad(const std::string& problem) { return absl::InvalidArgumentError(problem); }

bool IsMessages(const Json& value) { return value.is_array(); }

absl::StatusOr<std::vector<Message>> ParseMessages(const Json& value, const char* key) {
  std::vector<Message> messages;
  for (const Json& item : value) {
    if (!item.is_object() || !item.contains("role") || !item["role"].is_string() || !item.contains("content") ||
        !item["content"].is_string()) {
      return Bad(absl::StrCat(key, ": every message needs a role and a content, both strings"));
    }
    messages.push_back({item["role"].get<std::string>(), item["content"].get<std::string>()});
  }
  return messages;
}

size_t CommonPrefix(const std::vector<Message>& a, const std::vector<Message>& b) {
  return static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
}

// Conversations with the prompt inside both lists, or beside them as messages or as text.
absl::Status FillConversation(const Json& json, PreferenceRow* row) {
  row->conversational = true;
  SIMPO_ASSIGN_OR_RETURN(std::vector<Message> chosen, ParseMessages(json["chosen"], "chosen"));
  SIMPO_ASSIGN_OR_RETURN(std::vector<Message> rejected, ParseMessages(json["rejected"], "rejected"));
  if (chosen.empty() || rejected.empty()) return Bad("chosen and rejected need at least one message each");
  if (chosen.back().role != "assistant") return Bad("chosen must end with a message of the assistant");
  if (rejected.back().role != "assistant") return Bad("rejected must end with a message of the assistant");
  const bool responses_only = chosen.front().role == "assistant" && rejected.front().role == "assistant";
  if (json.contains("prompt") && IsMessages(json["prompt"])) {
    SIMPO_ASSIGN_OR_RETURN(row->prompt_messages, ParseMessages(json["prompt"], "prompt"));
    // Some sets repeat the prompt inside the conversations.
    const size_t shared = row->prompt_messages.size();
    const bool repeated =
        CommonPrefix(row->prompt_messages, chosen) == shared && CommonPrefix(row->prompt_messages, rejected) == shared;
    const auto skip = static_cast<int64_t>(repeated ? shared : 0);
    chosen.erase(chosen.begin(), chosen.begin() + skip);
    rejected.erase(rejected.begin(), rejected.begin() + skip);
  } else if (responses_only && json.contains("prompt") && json["prompt"].is_string()) {
    row->prompt_messages = {{"user", json["prompt"].get<std::string>()}};
  } else {
    size_t shared = CommonPrefix(chosen, rejected);
    // Identical conversations: the last answer is the response all the same.
    shared = std::min({shared, chosen.size() - 1, rejected.size() - 1});
    row->prompt_messages.assign(chosen.begin(), chosen.begin() + static_cast<int64_t>(shared));
    chosen.erase(chosen.begin(), chosen.begin() + static_cast<int64_t>(shared));
    rejected.erase(rejected.begin(), rejected.begin() + static_cast<int64_t>(shared));
  }
  if (row->prompt_messages.empty()) return Bad("chosen and rejected do not begin with the same prompt");
  row->chosen_messages = std::move(chosen);
  row->rejected_messages = std::move(rejected);
  return absl::OkStatus();
}

// Texts with the prompt beside them or inside both.
absl::Status FillTexts(const Json& json, PreferenceRow* row) {
  row->chosen = json["chosen"].get<std::string>();
  row->rejected = json["rejected"].get<std::string>();
  if (json.contains("prompt") && !json["prompt"].is_null()) {
    if (!json["prompt"].is_string()) return Bad("prompt must be a string when chosen and rejected are strings");
    row->prompt = json["prompt"].get<std::string>();
    return absl::OkStatus();
  }
  size_t shared = 0;
  while (shared < std::min(row->chosen.size(), row->rejected.size()) && row->chosen[shared] == row->rejected[shared])
    ++shared;
  while (shared > 0 && shared < row->chosen.size() && (static_cast<unsigned char>(row->chosen[shared]) & 0xc0) == 0x80)
    --shared;
  if (shared > 0 && row->chosen[shared - 1] == ' ') --shared;  // the blank belongs to the response
  row->prompt = row->chosen.substr(0, shared);
  row->chosen.erase(0, shared);
  row->rejected.erase(0, shared);
  return absl::OkStatus();
}

// The reader itself checks within strings only; writing checks all.
bool IsUtf8(std::string_view text) {
  try {
    return !Json(std::string(text)).dump().empty();
  } catch (const Json::exception&) {
    return false;
  }
}

// An error's text may end within a character of the row that it quotes.
std::string PlainText(std::string text) {
  for (char& c : text) {
    if (static_cast<unsigned char>(c) >= 0x80) c = '?';
  }
  return text;
}

}  // namespace

absl::StatusOr<PreferenceRow> ParsePreferenceRow(std::string_view text) {
  if (text.size() > kMaxRowBytes)
    return Bad(absl::StrCat("the row has ", text.size(), " bytes; at most ", kMaxRowBytes, " are read"));
  Json json;
  bool too_deep = false;
  try {
    json = Json::parse(text, [&](int depth, Json::parse_event_t, Json&) {
      too_deep |= depth > kMaxDepth;
      return !too_deep;
    });
  } catch (const Json::exception& error) {
    return Bad(IsUtf8(text) ? absl::StrCat("not valid JSON: ", PlainText(error.what())) : "the text is not UTF-8");
  }
  if (too_deep) return Bad("the JSON nests too deep");
  if (!json.is_object()) return Bad("a row is a JSON object with chosen and rejected");
  for (const char* key : {"chosen", "rejected"}) {
    if (!json.contains(key) || json[key].is_null()) return Bad(absl::StrCat("the row has no ", key));
    if (!json[key].is_string() && !IsMessages(json[key]))
      return Bad(absl::StrCat(key, " must be a string or a list of messages"));
  }
  if (json["chosen"].is_string() != json["rejected"].is_string())
    return Bad("chosen and rejected must both be strings or both be lists of messages");
  PreferenceRow row;
  SIMPO_RETURN_IF_ERROR(json["chosen"].is_string() ? FillTexts(json, &row) : FillConversation(json, &row));
  if (json.contains("score_chosen") && json.contains("score_rejected") && json["score_chosen"].is_number() &&
      json["score_rejected"].is_number()) {
    row.tie = json["score_chosen"].get<double>() == json["score_rejected"].get<double>();
  }
  return row;
}

absl::StatusOr<std::vector<PreferenceRow>> ReadPreferenceFile(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    return absl::NotFoundError(absl::StrCat("cannot read the data file ", path.string(), ": ",
                                            fs::exists(path) ? "no permission" : "no such file"));
  }
  std::vector<PreferenceRow> rows;
  std::vector<std::string> problems;
  int64_t bad = 0;
  int64_t line_number = 0;
  for (std::string line; std::getline(file, line);) {
    ++line_number;
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const std::string where = absl::StrCat(path.string(), ":", line_number);
    absl::StatusOr<PreferenceRow> row = ParsePreferenceRow(line);
    if (row.ok()) {
      row->where = where;
      rows.push_back(*std::move(row));
    } else if (++bad <= static_cast<int64_t>(kListedRows)) {
      problems.push_back(absl::StrCat(where, ": ", row.status().message()));
    }
  }
  if (bad == 0) return rows;
  if (bad > static_cast<int64_t>(kListedRows))
    problems.push_back(absl::StrCat("... and ", bad - kListedRows, " more bad rows"));
  return absl::InvalidArgumentError(absl::StrJoin(problems, "\n"));
}

absl::StatusOr<std::vector<fs::path>> FindSplitFiles(const fs::path& source, const std::string& split, bool is_train) {
  std::error_code error;
  std::vector<fs::path> files;
  if (fs::is_regular_file(source, error)) {
    if (is_train) files.push_back(source);
  } else if (fs::is_directory(source, error)) {
    for (const fs::path& folder : {source, source / "data"}) {
      for (const auto& item : fs::directory_iterator(folder, error)) {
        const std::string name = item.path().filename().string();
        const bool named = name.starts_with(split) &&
                           (name.size() == split.size() || name[split.size()] == '.' || name[split.size()] == '-');
        if (named && item.is_regular_file()) files.push_back(item.path());
      }
    }
    std::sort(files.begin(), files.end());
  } else {
    char host[256] = "";
    gethostname(host, sizeof(host) - 1);
    return absl::NotFoundError(absl::StrCat(
        "dataset '", source.string(), "' is neither a file nor a folder on ", host,
        ". Give the path of a .jsonl file or of a folder with train.jsonl, or a data set of the hub (owner/name)."));
  }
  for (const fs::path& file : files) {
    if (file.extension() != ".jsonl") {
      return absl::InvalidArgumentError(absl::StrCat(
          file.string(),
          ": only JSON Lines (.jsonl) is read; convert it, for example with datasets: ds.to_json(\"train.jsonl\")"));
    }
  }
  return files;
}

}  // namespace simpo
