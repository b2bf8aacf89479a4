#ifndef SIMPO_WORKER_SHARD_SHARDED_PARAMS_H_
#define SIMPO_WORKER_SHARD_SHARDED_PARAMS_H_

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "worker/comm/collectives.h"
#include "worker/model/model_config.h"
#include "worker/model/safetensors.h"

namespace simpo {

// A tensor's place in its bucket.
struct ParamSlot {
  WeightSpec spec;
  int64_t offset = 0;  // elements from the bucket's start; a multiple of kBucketAlignment
  int64_t numel = 0;
  at::Tensor weight;  // view of Bucket::weights, shape spec.shape, compute dtype
  at::Tensor grad;    // view of Bucket::grads, same shape, fp32
};

// The parameters of one part of the model (embeddings, one layer, or the head) as one flat array.
// Padded with zeros to a multiple of world size x kBucketAlignment; rank r owns the contiguous
// slice [r * shard_numel, (r+1) * shard_numel).
struct Bucket {
  std::string name;   // "embeddings", "layer.0", ..., "head"
  int64_t numel = 0;  // with padding
  int64_t shard_numel = 0;
  std::vector<ParamSlot> slots;
  at::Tensor weights;  // [numel], compute dtype; whole on every rank below stage 3
  at::Tensor grads;    // [numel], fp32; accumulated over the micro-batches of a step
  // The rank's share of the optimizer's state, fp32 [shard_numel]; stage 0: [numel]. When weights are
  // fp32, `master` is a view of them.
  at::Tensor master, exp_avg, exp_avg_sq;
};

inline constexpr int64_t kBucketAlignment = 16;  // elements: 64 bytes in fp32

// All parameters of a model, laid out in buckets and sharded over the ranks.
class ShardedParams {
 public:
  // Allocates; weights are zero until LoadWeights or a checkpoint fills them.
  // compute_dtype: at::kFloat or at::kBFloat16. zero_stage: 0 or 1.
  ShardedParams(const ModelConfig& config, at::ScalarType compute_dtype, int zero_stage, Collectives& comm);
  ShardedParams(const ShardedParams&) = delete;
  ShardedParams& operator=(const ShardedParams&) = delete;

  // Fills weights and masters from an HF checkpoint. Every rank reads for itself.
  absl::Status LoadWeights(const ModelWeightsReader& reader);

  std::vector<Bucket>& buckets() { return buckets_; }
  const std::vector<Bucket>& buckets() const { return buckets_; }
  const ParamSlot& Find(std::string_view name) const;
  bool Has(std::string_view name) const;
  int zero_stage() const { return zero_stage_; }
  at::ScalarType compute_dtype() const { return compute_dtype_; }

  void ZeroGrads();
  // Sums the gradients over the ranks: afterwards each rank's shard of Bucket::grads holds the sum
  // (stage 0: all of it).
  void ReduceGrads();
  // The part of Bucket::grads that this rank's optimizer reads.
  at::Tensor GradShard(const Bucket& bucket) const;
  // Spreads the updated masters: weights = compute dtype of all ranks' masters.
  void GatherWeights();

  // Bytes that this rank holds.
  struct Bytes {
    int64_t weights = 0, grads = 0, optimizer = 0;  // optimizer: masters (if separate) and moments
  };
  Bytes MemoryBytes() const;

 private:
  std::vector<Bucket> buckets_;
  at::ScalarType compute_dtype_;
  int zero_stage_;
  Collectives& comm_;
};

}  // namespace simpo

#endif  // SIMPO_WORKER_SHARD_SHARDED_PARAMS_H_
