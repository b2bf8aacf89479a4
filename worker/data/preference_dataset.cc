#include "worker/data/preference_dataset.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxRowBytes = 64 << 20;
constexpr int kMaxDepth = 32;

// Each form's names of the same thing. A prompt that is not called prompt is a question to the assistant.
constexpr std::array<std::string_view, 3> kQuestions = {"instruction", "question", "input"};
constexpr std::pair<std::string_view, std::string_view> kScores[] = {{"score_chosen", "score_rejected"},
                                                                     {"chosen_score", "rejected_score"},
                                                                     {"chosen_rating", "rejected_rating"},
                                                                     {"chosen-rating", "rejected-rating"}};
constexpr std::string_view kColumns[] = {
    "prompt",         "chosen",          "rejected",          "instruction",   "question",       "input",
    "system",         "chosen_response", "rejected_response", "score_chosen",  "score_rejected", "chosen_score",
    "rejected_score", "chosen_rating",   "rejected_rating",   "chosen-rating", "rejected-rating"};

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
    row->prompt_beside = true;
    // Some sets repeat the prompt inside the conversations.
    const size_t shared = row->prompt_messages.size();
    const bool repeated =
        CommonPrefix(row->prompt_messages, chosen) == shared && CommonPrefix(row->prompt_messages, rejected) == shared;
    const auto skip = static_cast<int64_t>(repeated ? shared : 0);
    chosen.erase(chosen.begin(), chosen.begin() + skip);
    rejected.erase(rejected.begin(), rejected.begin() + skip);
  } else if (responses_only && json.contains("prompt") && json["prompt"].is_string()) {
    row->prompt_messages = {{"user", json["prompt"].get<std::string>()}};
    row->prompt_beside = true;
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

bool Has(const Json& json, std::string_view key) {
  const auto found = json.find(key);
  return found != json.end() && !found->is_null();
}

// "\n\nHuman: ...\n\nAssistant: ..." as messages; nothing when the text is no such transcript.
std::optional<std::vector<Message>> ParseTranscript(std::string_view text) {
  constexpr std::pair<std::string_view, const char*> kTurns[] = {{"\n\nHuman:", "user"},
                                                                 {"\n\nAssistant:", "assistant"}};
  if (!text.starts_with(kTurns[0].first)) return std::nullopt;
  std::vector<Message> messages;
  while (!text.empty()) {
    const auto& turn = text.starts_with(kTurns[0].first) ? kTurns[0] : kTurns[1];
    text.remove_prefix(turn.first.size());
    const size_t end = std::min({text.find(kTurns[0].first), text.find(kTurns[1].first), text.size()});
    std::string_view content = text.substr(0, end);
    if (content.starts_with(' ')) content.remove_prefix(1);
    messages.push_back({turn.second, std::string(content)});
    text.remove_prefix(end);
  }
  return messages;
}

Json MessagesJson(const std::vector<Message>& messages) {
  Json list = Json::array();
  for (const Message& message : messages) list.push_back({{"role", message.role}, {"content", message.content}});
  return list;
}

// hh-rlhf: two transcripts, the prompt inside both. A few of its rows end with the human, or differ from
// the first word on: those are dropped and counted, not refused.
absl::StatusOr<bool> FillTranscripts(const Json& json, PreferenceRow* row) {
  if (Has(json, "prompt") && json["prompt"] != "") return false;
  const auto chosen = ParseTranscript(json["chosen"].get_ref<const std::string&>());
  const auto rejected = ParseTranscript(json["rejected"].get_ref<const std::string&>());
  if (!chosen || !rejected) return false;
  row->conversational = true;
  if (chosen->back().role != "assistant" || rejected->back().role != "assistant") {
    row->dropped = "transcript does not end with the assistant";
  } else if (CommonPrefix(*chosen, *rejected) == 0) {
    row->dropped = "transcripts do not begin with the same prompt";
  } else {
    SIMPO_RETURN_IF_ERROR(
        FillConversation({{"chosen", MessagesJson(*chosen)}, {"rejected", MessagesJson(*rejected)}}, row));
  }
  return true;
}

// argilla's sets and their kin: {instruction, chosen_response, rejected_response}, {system, question,
// chosen, rejected}: a question and two answers as texts. Gives the row as messages.
absl::Status QuestionToMessages(Json* json) {
  const auto question =
      std::find_if(kQuestions.begin(), kQuestions.end(), [&](std::string_view key) { return Has(*json, key); });
  const bool named = Has(*json, "chosen_response") && Has(*json, "rejected_response");
  if (Has(*json, "prompt") && !named) return absl::OkStatus();
  if (question == kQuestions.end() && !(named && Has(*json, "prompt"))) return absl::OkStatus();
  const std::string prompt_key(Has(*json, "prompt") ? "prompt" : *question);
  const std::string chosen_key = named ? "chosen_response" : "chosen";
  const std::string rejected_key = named ? "rejected_response" : "rejected";
  if (!Has(*json, chosen_key) || !Has(*json, rejected_key)) return absl::OkStatus();
  // Lists beside an instruction are conversations of their own, the question inside.
  if ((*json)[chosen_key].is_array()) return absl::OkStatus();
  for (const std::string& key : {prompt_key, chosen_key, rejected_key}) {
    if (!(*json)[key].is_string()) return Bad(absl::StrCat(key, " must be a string"));
  }
  Json prompt = Json::array();
  if (Has(*json, "system") && (*json)["system"].is_string() && (*json)["system"] != "") {
    prompt.push_back({{"role", "system"}, {"content", (*json)["system"]}});
  }
  prompt.push_back({{"role", "user"}, {"content", (*json)[prompt_key]}});
  Json messages = {{"prompt", std::move(prompt)}};
  messages["chosen"] = Json::array({{{"role", "assistant"}, {"content", (*json)[chosen_key]}}});
  messages["rejected"] = Json::array({{{"role", "assistant"}, {"content", (*json)[rejected_key]}}});
  for (const auto& [a, b] : kScores) {
    for (const std::string_view key : {a, b}) {
      if (Has(*json, key)) messages[std::string(key)] = (*json)[std::string(key)];
    }
  }
  *json = std::move(messages);
  return absl::OkStatus();
}

// A number, or one written as text (CSV).
std::optional<double> Score(const Json& json, std::string_view key) {
  const auto found = json.find(key);
  if (found == json.end()) return std::nullopt;
  if (found->is_number()) return found->get<double>();
  if (!found->is_string() || found->get_ref<const std::string&>().empty()) return std::nullopt;
  const std::string& text = found->get_ref<const std::string&>();
  char* end = nullptr;
  const double value = strtod(text.c_str(), &end);
  return *end == '\0' ? std::optional<double>(value) : std::nullopt;
}

bool IsTie(const Json& json) {
  for (const auto& [chosen, rejected] : kScores) {
    const std::optional<double> a = Score(json, chosen);
    if (a && a == Score(json, rejected)) return true;
  }
  return false;
}

// What the row has, and what it would need.
absl::Status UnknownForm(const Json& json, const char* missing) {
  std::string columns;
  for (const auto& item : json.items()) {
    if (columns.size() > 500) break;
    absl::StrAppend(&columns, columns.empty() ? "" : ", ", PlainText(item.key().substr(0, 80)));
  }
  return Bad(absl::StrCat("the row has no ", missing, "; its columns are: ", columns.empty() ? "none" : columns,
                          ". A row needs chosen and rejected (texts, lists of messages or Human/Assistant transcripts; "
                          "prompt may stand beside them), or instruction, chosen_response and rejected_response; "
                          "see docs/data.md"));
}

absl::StatusOr<Json> ParseObject(std::string_view text) {
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
  return json;
}

absl::Status CheckResponses(const Json& json) {
  for (const char* key : {"chosen", "rejected"}) {
    if (!Has(json, key)) return UnknownForm(json, key);
    if (!json[key].is_string() && !IsMessages(json[key]))
      return Bad(absl::StrCat(key, " must be a string or a list of messages"));
    if (json[key].is_string()) {
      const std::string& text = json[key].get_ref<const std::string&>();
      if (text.starts_with("[{'role'") || text.starts_with("[{'content'"))
        return Bad(absl::StrCat(key, " holds a list in Python's notation; write it as JSON (json.dumps)"));
    }
  }
  if (json["chosen"].is_string() != json["rejected"].is_string())
    return Bad("chosen and rejected must both be strings or both be lists of messages");
  return absl::OkStatus();
}

}  // namespace

std::span<const std::string_view> PreferenceColumns() { return kColumns; }

absl::StatusOr<PreferenceRow> ParsePreferenceRow(std::string_view text) {
  SIMPO_ASSIGN_OR_RETURN(Json json, ParseObject(text));
  SIMPO_RETURN_IF_ERROR(QuestionToMessages(&json));
  SIMPO_RETURN_IF_ERROR(CheckResponses(json));
  PreferenceRow row;
  row.tie = IsTie(json);
  if (!json["chosen"].is_string()) {
    SIMPO_RETURN_IF_ERROR(FillConversation(json, &row));
    return row;
  }
  SIMPO_ASSIGN_OR_RETURN(const bool transcripts, FillTranscripts(json, &row));
  if (!transcripts) SIMPO_RETURN_IF_ERROR(FillTexts(json, &row));
  return row;
}

}  // namespace simpo
