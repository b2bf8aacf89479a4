#ifndef SIMPO_WORKER_PACK_H_
#define SIMPO_WORKER_PACK_H_

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "worker/data/tokenized_pair.h"

namespace simpo {

// Where one pair lies in a packed row: [shared prefix | rest of chosen | rest of rejected]. The last
// token of either sequence is never an input: it is only predicted.
struct PackedPair {
  int64_t begin = 0;
  int64_t prefix = 0;
  int64_t chosen_rest = 0;
  int64_t rejected_rest = 0;
  int64_t size() const { return prefix + chosen_rest + rejected_rest; }
  // Tokens of either sequence, the last one included.
  int64_t ChosenLength() const { return prefix + chosen_rest + 1; }
  int64_t RejectedLength() const { return prefix + rejected_rest + 1; }
};

// One scored token of one response: its log-probability is log softmax(logits of `row`)[target].
// A scored token that both responses share has two entries with the same row.
struct ScoredToken {
  int32_t row = 0;       // index into PackedBatch::head_rows_N
  int32_t target = 0;    // token id
  int32_t response = 0;  // 2 * pair for chosen, 2 * pair + 1 for rejected
};

// A micro-batch without padding. Shape letters: T input tokens, N rows of the head.
struct PackedBatch {
  std::vector<PackedPair> pairs;
  at::Tensor input_ids_T;                  // int64
  at::Tensor positions_T;                  // int64; those of the rejected rest start again at the prefix's length
  at::Tensor head_rows_N;                  // int64, strictly increasing: hidden rows whose logits are needed
  std::vector<ScoredToken> scored;         // in the order of the pairs
  std::vector<int64_t> pair_head_begin;    // [pairs + 1], rows of each pair in head_rows_N
  std::vector<int64_t> pair_scored_begin;  // [pairs + 1], entries of each pair in `scored`
  std::vector<int32_t> scored_tokens;      // [2 * pairs], by response
  int64_t source_tokens = 0;               // tokens that a trainer without sharing would process (no padding)

  int64_t num_pairs() const { return static_cast<int64_t>(pairs.size()); }
};

// `share_up_to`: a pair with a longer sequence shares no prefix, because the model's rotary angles then
// depend on the length (RopeConfig::SharedAnglesUpTo).
inline constexpr int64_t kShareAlways = std::numeric_limits<int64_t>::max();

// Input tokens that `pair` takes in a packed row.
int64_t PackedSize(const TokenizedPair& pair, int64_t share_up_to = kShareAlways);

// Packs pairs into one row, on the host.
PackedBatch Pack(std::span<const TokenizedPair> pairs, int64_t share_up_to = kShareAlways);

}  // namespace simpo

#endif  // SIMPO_WORKER_PACK_H_
