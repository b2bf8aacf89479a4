#ifndef SIMPO_WORKER_MODEL_ATTENTION_H_
#define SIMPO_WORKER_MODEL_ATTENTION_H_

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "worker/pack.h"

namespace simpo {

// Who sees whom in a packed row, made once per micro-batch: within a pair, [prefix | chosen rest] is
// causal; a query of the rejected rest sees the prefix and, causally, the rejected rest.
struct AttentionPlan {
  std::vector<PackedPair> pairs;
  // By pair: additive mask [rejected_rest, prefix + rejected_rest] of 0 and -inf in the compute
  // dtype; undefined where there is no rejected rest.
  std::vector<at::Tensor> rejected_masks;

  AttentionPlan(const std::vector<PackedPair>& pairs, at::ScalarType compute_dtype);
};

// Softmax attention with grouped queries. qkv [T, heads + 2 * kv_heads, head_dim] = q, k, v side by
// side; result [T, heads * head_dim]. `plan` lives until backward has run.
at::Tensor PairAttention(const at::Tensor& qkv, int64_t heads, int64_t kv_heads,
                         const std::shared_ptr<const AttentionPlan>& plan);

}  // namespace simpo

#endif  // SIMPO_WORKER_MODEL_ATTENTION_H_
