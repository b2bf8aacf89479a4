#ifndef SIMPO_WORKER_DATA_TOKENIZE_PAIRS_H_
#define SIMPO_WORKER_DATA_TOKENIZE_PAIRS_H_

#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "common/job_config.h"
#include "worker/data/chat_template.h"
#include "worker/data/preference_dataset.h"
#include "worker/data/tokenized_dataset.h"
#include "worker/data/tokenizer.h"

namespace simpo {

// The rules that turn a row into tokens (docs/data.md).
struct TokenizeRules {
  int32_t max_length = 2048;
  int32_t max_prompt_length = 0;  // 0: none
  bool keep_end = true;           // of a prompt that is cut
  bool drop_ties = false;
  bool princeton = false;  // princeton-nlp/SimPO's rules (compat: princeton), else TRL's
  static TokenizeRules FromConfig(const JobConfig& config);
};

// A row as tokens, or the reason why it is dropped.
struct TokenizedRow {
  std::optional<OwnedPair> pair;
  std::string dropped;
};

// As TRL's CPOTrainer does: the template renders the prompt with the generation header, and prompt
// plus response; what the renderings share is the prompt. Exactly one BOS where the tokenizer has
// one; EOS after each response unless it is its last token already. With `princeton` as the paper's
// trainer does: prompt and last message are rendered each on its own, without a generation header, and
// truncation is joint. `chat_template` may be null when no row is a conversation. Thread-safe.
absl::StatusOr<TokenizedRow> TokenizeRow(const PreferenceRow& row, const Tokenizer& tokenizer,
                                         const ChatTemplate* chat_template, const TokenizeRules& rules);

}  // namespace simpo

#endif  // SIMPO_WORKER_DATA_TOKENIZE_PAIRS_H_
