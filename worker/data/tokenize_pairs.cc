#include "worker/data/tokenize_pairs.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

constexpr int32_t kPrincetonPromptLength = 128;  // the default of the paper's trainer

struct Texts {
  std::string prompt, chosen, rejected;
};

size_t CommonPrefix(const std::string& a, const std::string& b) {
  size_t size = static_cast<size_t>(std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin());
  while (size > 0 && size < a.size() && (static_cast<unsigned char>(a[size]) & 0xc0) == 0x80) --size;
  return size;
}

absl::StatusOr<Texts> RenderTexts(const PreferenceRow& row, const Tokenizer& tokenizer,
                                  const ChatTemplate& chat_template) {
  auto render = [&](const std::vector<Message>& response, bool header) {
    std::vector<Message> messages = row.prompt_messages;
    messages.insert(messages.end(), response.begin(), response.end());
    return chat_template.Render(messages, header, tokenizer.bos_token(), tokenizer.eos_token());
  };
  SIMPO_ASSIGN_OR_RETURN(std::string prompt, render({}, true));
  SIMPO_ASSIGN_OR_RETURN(const std::string chosen, render(row.chosen_messages, false));
  SIMPO_ASSIGN_OR_RETURN(const std::string rejected, render(row.rejected_messages, false));
  // Some templates put more after the prompt alone than before an answer (an empty <think>, say).
  prompt.resize(CommonPrefix(prompt, chosen));
  prompt.resize(CommonPrefix(prompt, rejected));
  return Texts{prompt, chosen.substr(prompt.size()), rejected.substr(prompt.size())};
}

// As run_simpo.py does: the prompt is all but the last message, after an empty system message where the
// template knows such; each answer is rendered alone, so its header is part of the response.
absl::StatusOr<Texts> RenderPrinceton(const PreferenceRow& row, const Tokenizer& tokenizer,
                                      const ChatTemplate& chat_template) {
  auto render = [&](const std::vector<Message>& messages) {
    return chat_template.Render(messages, /*add_generation_prompt=*/false, tokenizer.bos_token(),
                                tokenizer.eos_token());
  };
  std::vector<Message> prompt_messages = row.prompt_messages;
  std::vector<Message> chosen_messages = row.chosen_messages;
  std::vector<Message> rejected_messages = row.rejected_messages;
  if (!row.prompt_beside) {
    prompt_messages.insert(prompt_messages.end(), chosen_messages.begin(), chosen_messages.end() - 1);
    chosen_messages.erase(chosen_messages.begin(), chosen_messages.end() - 1);
    rejected_messages.erase(rejected_messages.begin(), rejected_messages.end() - 1);
  }
  absl::StatusOr<std::string> prompt = absl::UnknownError("");
  if (chat_template.MentionsSystem() && (prompt_messages.empty() || prompt_messages[0].role != "system")) {
    std::vector<Message> with_system = prompt_messages;
    with_system.insert(with_system.begin(), {"system", ""});
    prompt = render(with_system);
  }
  // A template may speak of a system message only to refuse it; the reference stops there.
  if (!prompt.ok()) prompt = render(prompt_messages);
  if (!prompt.ok()) return prompt.status();
  Texts texts{*std::move(prompt), "", ""};
  for (const auto& [messages, text] :
       {std::pair(&chosen_messages, &texts.chosen), {&rejected_messages, &texts.rejected}}) {
    SIMPO_ASSIGN_OR_RETURN(*text, render(*messages));
    const std::string& bos = tokenizer.bos_token();
    if (!bos.empty() && text->starts_with(bos)) text->erase(0, bos.size());
  }
  return texts;
}

struct Sequence {
  std::vector<int32_t> prompt, response;
};

// Tokens of prompt + response, cut where the prompt's own tokens end; one earlier when the last of
// them merges with the response.
absl::StatusOr<Sequence> TokenizeResponse(const std::vector<int32_t>& prompt, const std::string& prompt_text,
                                          const std::string& response, const Tokenizer& tokenizer) {
  SIMPO_ASSIGN_OR_RETURN(const std::vector<int32_t> full, tokenizer.Encode(prompt_text + response));
  size_t begin = std::min(prompt.size(), full.size());
  if (begin > 0 && (begin < prompt.size() || !std::equal(prompt.begin(), prompt.end(), full.begin()))) --begin;
  const auto cut = full.begin() + static_cast<int64_t>(begin);
  Sequence sequence{{full.begin(), cut}, {cut, full.end()}};
  if (tokenizer.bos_id() && (sequence.prompt.empty() || sequence.prompt[0] != *tokenizer.bos_id())) {
    sequence.prompt.insert(sequence.prompt.begin(), *tokenizer.bos_id());
  }
  if (tokenizer.eos_id() && (sequence.response.empty() || sequence.response.back() != *tokenizer.eos_id())) {
    sequence.response.push_back(*tokenizer.eos_id());
  }
  return sequence;
}

void CutPrompt(std::vector<int32_t>& prompt, const TokenizeRules& rules, const std::optional<int32_t>& bos) {
  const auto limit = static_cast<size_t>(rules.max_prompt_length);
  if (limit == 0 || prompt.size() <= limit) return;
  const bool had_bos = bos && !prompt.empty() && prompt[0] == *bos;
  if (!rules.keep_end) {
    prompt.resize(limit);
    return;
  }
  prompt.erase(prompt.begin(), prompt.end() - static_cast<int64_t>(limit));
  if (had_bos) prompt[0] = *bos;  // BOS stays
}

// A pair that fits is never touched; in one that does not, the prompt is cut and then each response
// on its own budget. Returns whether anything was cut.
bool Truncate(Sequence& chosen, Sequence& rejected, const TokenizeRules& rules, const std::optional<int32_t>& bos) {
  const auto limit = static_cast<size_t>(rules.max_length);
  auto fits = [&](const Sequence& s) { return s.prompt.size() + s.response.size() <= limit; };
  if (fits(chosen) && fits(rejected)) return false;
  for (Sequence* sequence : {&chosen, &rejected}) {
    CutPrompt(sequence->prompt, rules, bos);
    const size_t room = limit > sequence->prompt.size() ? limit - sequence->prompt.size() : 0;
    if (sequence->response.size() > room) sequence->response.resize(room);
  }
  return true;
}

// The paper's joint truncation, to the letter: the longer response decides for both, a cut prompt loses
// its BOS with keep_end, and responses are cut as if the prompt had max_prompt_length.
bool TruncateJointly(Sequence& chosen, Sequence& rejected, const TokenizeRules& rules) {
  const size_t longer = std::max(chosen.response.size(), rejected.response.size());
  const auto limit = static_cast<size_t>(rules.max_length);
  const auto prompt_limit = static_cast<size_t>(rules.max_prompt_length);
  const size_t response_limit = limit > prompt_limit ? limit - prompt_limit : 0;
  bool cut = false;
  for (Sequence* sequence : {&chosen, &rejected}) {
    if (sequence->prompt.size() + longer <= limit) continue;
    cut |= sequence->prompt.size() > prompt_limit;
    CutPrompt(sequence->prompt, rules, /*bos=*/std::nullopt);
    if (sequence->prompt.size() + longer <= limit || sequence->response.size() <= response_limit) continue;
    cut = true;
    sequence->response.resize(response_limit);
  }
  return cut;
}

}  // namespace

TokenizeRules TokenizeRules::FromConfig(const JobConfig& config) {
  const bool princeton = config.compat == "princeton";
  return {.max_length = config.max_length,
          // The paper's trainer has no prompt without a limit.
          .max_prompt_length =
              princeton && config.max_prompt_length == 0 ? kPrincetonPromptLength : config.max_prompt_length,
          .keep_end = config.truncation_mode == "keep_end",
          .drop_ties = config.drop_ties,
          .princeton = princeton};
}

absl::StatusOr<TokenizedRow> TokenizeRow(const PreferenceRow& row, const Tokenizer& tokenizer,
                                         const ChatTemplate* chat_template, const TokenizeRules& rules) {
  auto drop = [](std::string reason) { return TokenizedRow{.pair = std::nullopt, .dropped = std::move(reason)}; };
  if (!row.dropped.empty()) return drop(row.dropped);
  Texts texts{row.prompt, row.chosen, row.rejected};
  if (row.conversational) {
    absl::StatusOr<Texts> rendered =
        rules.princeton ? RenderPrinceton(row, tokenizer, *chat_template) : RenderTexts(row, tokenizer, *chat_template);
    if (!rendered.ok()) return absl::InvalidArgumentError(absl::StrCat(row.where, ": ", rendered.status().message()));
    texts = *std::move(rendered);
  }
  if (rules.drop_ties && row.tie) return drop("equal scores");
  if (texts.chosen == texts.rejected) return drop("identical responses");
  if (texts.chosen.empty() || texts.rejected.empty()) return drop("empty response");
  SIMPO_ASSIGN_OR_RETURN(const std::vector<int32_t> prompt, tokenizer.Encode(texts.prompt));
  SIMPO_ASSIGN_OR_RETURN(Sequence chosen, TokenizeResponse(prompt, texts.prompt, texts.chosen, tokenizer));
  SIMPO_ASSIGN_OR_RETURN(Sequence rejected, TokenizeResponse(prompt, texts.prompt, texts.rejected, tokenizer));
  const bool truncated = rules.princeton ? TruncateJointly(chosen, rejected, rules)
                                         : Truncate(chosen, rejected, rules, tokenizer.bos_id());
  if (chosen.response.empty() || rejected.response.empty())
    return drop("no room for a response: the prompt alone fills max_length");
  if (chosen.prompt == rejected.prompt && chosen.response == rejected.response) return drop("identical responses");
  // The first token of a sequence is predicted by nothing.
  if (chosen.prompt.empty() || rejected.prompt.empty()) return drop("empty prompt, and the tokenizer has no BOS");
  auto join = [](const Sequence& s) {
    std::vector<int32_t> all = s.prompt;
    all.insert(all.end(), s.response.begin(), s.response.end());
    return all;
  };
  return TokenizedRow{.pair = OwnedPair{.chosen = join(chosen),
                                        .rejected = join(rejected),
                                        .chosen_prompt_length = static_cast<int32_t>(chosen.prompt.size()),
                                        .rejected_prompt_length = static_cast<int32_t>(rejected.prompt.size()),
                                        .truncated = truncated},
                      .dropped = ""};
}

}  // namespace simpo
