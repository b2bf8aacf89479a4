#ifndef SIMPO_WORKER_MODEL_ATTENTION_H_
#define SIMPO_WORKER_MODEL_ATTENTION_H_

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <vector>

#include "worker/pack.h"

namespace simpo {

// One layer's attention.
struct AttentionConfig {
  int64_t heads = 0;
  int64_t kv_heads = 0;
  double scale = 0;    // of the scores
  int64_t window = 0;  // a query sees its own position and window - 1 before it; 0: all before it
  double softcap = 0;  // scores become cap * tanh(scores / cap); 0: they do not
};

// Who sees whom in a packed row, made once per micro-batch: within a pair, [prefix | chosen rest] is
// causal; a query of the rejected rest sees the prefix and, causally, the rejected rest. Positions of
// the rejected rest, and with them the distances that a window limits, go on from the prefix.
class AttentionPlan {
 public:
  // `windows`: those of the model's layers. Masks are in the compute dtype on `device`.
  AttentionPlan(const std::vector<PackedPair>& pairs, const std::vector<int64_t>& windows, at::ScalarType compute_dtype,
                at::Device device = at::kCPU);

  const std::vector<PackedPair>& pairs() const { return pairs_; }

  // The stretches of the packed row as a kernel of variable-length attention takes them: queries are the
  // rows in their order, keys those of key_rows, sequence i from cumulative[i] to cumulative[i + 1]; the
  // last query of a sequence is at its last key.
  struct Sequences {
    at::Tensor key_rows;                             // int64: each sequence's prefix and own rows
    at::Tensor cumulative_queries, cumulative_keys;  // int32 [sequences + 1]
    int64_t longest_queries = 0, longest_keys = 0;
  };
  const Sequences& sequences() const { return sequences_; }  // on the plan's device

  // Additive mask (0, -inf) of `queries` queries from position `first` of a sequence, over the keys from
  // position first_key to the last query's: a view of one band that all masks of this window share.
  at::Tensor Mask(int64_t window, int64_t first, int64_t queries, int64_t first_key) const;
  // Whether a sequence of `length` is long enough for the window to hide something.
  static bool Hides(int64_t window, int64_t length) { return window > 0 && window < length; }
  // The most queries that one mask covers, so that no mask is quadratic in a long sequence.
  static constexpr int64_t kMaxQueries = 512;

 private:
  std::vector<PackedPair> pairs_;
  int64_t longest_ = 0;  // positions of any sequence
  std::map<int64_t, at::Tensor> bands_;
  Sequences sequences_;
};

// Softmax attention with grouped queries. qkv [T, heads + 2 * kv_heads, head_dim] = q, k, v side by
// side; result [T, heads * head_dim]. `plan` lives until backward has run.
at::Tensor PairAttention(const at::Tensor& qkv, const AttentionConfig& config,
                         const std::shared_ptr<const AttentionPlan>& plan);

// The same by ATen's variable-length FlashAttention, one call for the whole packed row: what PairAttention
// does on a GPU in half precision without softcap, which that kernel does not have.
at::Tensor VariableLengthAttention(const at::Tensor& qkv, const AttentionConfig& config,
                                   const std::shared_ptr<const AttentionPlan>& plan);

}  // namespace simpo

#endif  // SIMPO_WORKER_MODEL_ATTENTION_H_
