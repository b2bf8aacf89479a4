#ifndef SIMPO_WORKER_DATA_TOKENIZED_PAIR_H_
#define SIMPO_WORKER_DATA_TOKENIZED_PAIR_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>

namespace simpo {

// One preference pair as token ids. `chosen` is prompt + chosen response, `rejected` likewise; the
// first *_prompt_length tokens of each are not scored. Both have at least one scored token.
struct TokenizedPair {
  std::span<const int32_t> chosen;
  std::span<const int32_t> rejected;
  int32_t chosen_prompt_length = 0;
  int32_t rejected_prompt_length = 0;

  // Tokens that both sequences begin with, whatever the text boundary is; less than either length.
  int32_t SharedPrefixLength() const {
    const size_t limit = std::min(chosen.size(), rejected.size()) - 1;
    size_t shared = 0;
    while (shared < limit && chosen[shared] == rejected[shared]) ++shared;
    return static_cast<int32_t>(shared);
  }
};

}  // namespace simpo

#endif  // SIMPO_WORKER_DATA_TOKENIZED_PAIR_H_
