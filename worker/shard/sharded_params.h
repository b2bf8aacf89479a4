#ifndef SIMPO_WORKER_SHARD_SHARDED_PARAMS_H_
#define SIMPO_WORKER_SHARD_SHARDED_PARAMS_H_

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "worker/comm/collectives.h"
#include "worker/model/model_config.h"

namespace simpo {

// A tensor's place in its bucket.
struct ParamSlot {
  WeightSpec spec;
  int64_t offset = 0;  // elements from the bucket's start; a multiple of kBucketAlignment
  int64_t numel = 0;
};

// The parameters of one part of the model (embeddings, one layer, or the head) as one flat array.
// Padded with zeros to a multiple of world size x kBucketAlignment; rank r owns the contiguous
// slice [r * shard_numel, (r+1) * shard_numel) (stage 0: every rank owns all of it).
struct Bucket {
  std::string name;         // "embeddings", "layer.0", ..., "head"
  int64_t numel = 0;        // with padding
  int64_t shard_numel = 0;  // numel / world size
  int64_t owned_begin = 0;  // where the tensors of the owned part begin
  std::vector<ParamSlot> slots;
  // Compute dtype, [numel]. Stage 3: defined from Gather to Release only.
  at::Tensor weights;
  // fp32, [numel]: sums over the micro-batches of a step, or, where gradients are sharded, of one
  // micro-batch, and then defined from OpenGrads to ReduceGrads only.
  at::Tensor grads;
  // The owned part. weight_shard: compute dtype, a view of `weights` below stage 3. The others fp32.
  // In fp32 without offload `master` is weight_shard itself; below stage 2 grad_shard is a view.
  at::Tensor weight_shard, grad_shard, master, exp_avg, exp_avg_sq;
};

// The tensor of `slot` within a flat array laid out as its bucket is.
at::Tensor SlotOf(const at::Tensor& flat, const ParamSlot& slot);

// One weight, or several that lie side by side, as the decoder sees it: a place, not the memory, which
// stage 3 gives back between uses and finds anew. The buckets outlive it.
class Weight : public torch::CustomClassHolder {
 public:
  Weight(const Bucket& bucket, int64_t offset, std::vector<int64_t> shape);
  at::Tensor value() const { return ViewOf(bucket_.weights); }  // compute dtype; between Gather and Release
  at::Tensor grad() const { return ViewOf(bucket_.grads); }     // fp32; added to by the backward pass
  const std::vector<int64_t>& shape() const { return shape_; }
  // This weight and `next` as one [rows of both, ...] where `next` begins at this one's end; else null.
  c10::intrusive_ptr<Weight> JoinedWith(const Weight& next) const;

 private:
  at::Tensor ViewOf(const at::Tensor& flat) const;
  const Bucket& bucket_;
  const int64_t offset_;
  const std::vector<int64_t> shape_;
  int64_t numel_ = 1;
};
using WeightRef = c10::intrusive_ptr<Weight>;  // null: the model has no such weight

inline constexpr int64_t kBucketAlignment = 16;  // elements: 64 bytes in fp32

struct ShardingOptions {
  at::ScalarType compute_dtype = at::kFloat;  // or kBFloat16
  // What is sharded over the ranks. 0: nothing; 1: optimizer state; 2: gradients too; 3: weights too
  // (ZeRO, arXiv 1910.02054).
  int zero_stage = 1;
  // Of the gradients on the wire; they are accumulated in fp32 all the same.
  at::ScalarType reduce_dtype = at::kFloat;
  // Masters, moments and accumulated gradients in host memory, where the optimizer then runs.
  // Gradients are handed over bucket by bucket, so no device holds all of them, whatever the stage.
  bool offload_optimizer = false;
  at::Device device = at::kCPU;
  // For tests: released memory is filled with NaN first, so that a stale view cannot go unseen.
  bool poison_released = false;

  bool shards_gradients() const { return zero_stage >= 2 || offload_optimizer; }
};

// All parameters of a model, laid out in buckets and sharded over the ranks.
//
// A step walks the buckets; each use of one stands between brackets that every rank calls in the same
// order, and which cost nothing where the stage holds the memory anyway:
//   Gather(i, next) ... use the weights ... Release(i)
//   OpenGrads(i) ... add to the gradients ... ReduceGrads(i, last_micro_batch)
// then FinishReduce(), and an update that calls Spread(i) as it finishes with each bucket.
// Gathers and reductions run while the ranks compute on other buckets; at most two buckets' weights
// and two buckets' gradients are held beside the shards at any time (tied embeddings: one more of each,
// the embeddings).
class ShardedParams {
 public:
  // Allocates; weights are zero until LoadWeights (load_weights.h) or a checkpoint fills them.
  ShardedParams(const ModelConfig& config, const ShardingOptions& options, Collectives& comm);
  ShardedParams(const ShardedParams&) = delete;
  ShardedParams& operator=(const ShardedParams&) = delete;

  // Fills what this rank holds of one weight and its master from the whole tensor, of any floating dtype.
  void SetWeight(Bucket& bucket, const ParamSlot& slot, const at::Tensor& whole);

  std::vector<Bucket>& buckets() { return buckets_; }
  const std::vector<Bucket>& buckets() const { return buckets_; }
  int64_t num_buckets() const { return static_cast<int64_t>(buckets_.size()); }
  WeightRef Find(std::string_view name) const;  // throws if there is none
  bool Has(std::string_view name) const;
  const ShardingOptions& options() const { return options_; }
  int zero_stage() const { return options_.zero_stage; }
  at::ScalarType compute_dtype() const { return options_.compute_dtype; }

  // Bucket `index` is whole when this returns; the gather of bucket `next` (-1: none) then begins.
  void Gather(int64_t index, int64_t next = -1);
  void Release(int64_t index);
  void GatherAll();
  void ReleaseAll();

  void ZeroGrads();
  void OpenGrads(int64_t index);
  // Begins to sum the bucket's gradients over the ranks into grad_shard. Below stage 2 that happens in
  // the last micro-batch of a step only.
  void ReduceGrads(int64_t index, bool last_micro_batch);
  void FinishReduce();

  // The bucket's updated masters become weights, here and (stages 1 and 2) on the other ranks, by the
  // time of the next Gather.
  void Spread(int64_t index);
  void SpreadAll();

  // Bytes of tensors that this rank holds.
  struct Bytes {
    int64_t weights = 0, grads = 0;  // held throughout: all, or the shards
    int64_t optimizer = 0;           // masters (if separate) and moments
    int64_t peak_gathered = 0;       // most that gathered weights have taken beside the shards
    int64_t peak_open_grads = 0;     // most that gradients have taken beside the shards
  };
  Bytes MemoryBytes() const;

 private:
  struct Reduction {
    int64_t index;
    at::Tensor buffer;  // what travels: the bucket's gradients, or a copy in reduce_dtype
    Pending pending;
  };
  void Allocate(Bucket& bucket, int rank);
  void FinishReduction(Reduction& reduction);
  void BeginGather(int64_t index);
  int64_t owned_numel(const Bucket& bucket) const {
    return options_.zero_stage == 0 ? bucket.numel : bucket.shard_numel;
  }

  std::vector<Bucket> buckets_;
  const ShardingOptions options_;
  Collectives& comm_;
  std::vector<Pending> gathers_;       // by bucket
  std::vector<Reduction> reductions_;  // in the order in which they began
  int64_t gathered_bytes_ = 0, open_grad_bytes_ = 0;
  int64_t peak_gathered_ = 0, peak_open_grads_ = 0;
};

}  // namespace simpo

#endif  // SIMPO_WORKER_SHARD_SHARDED_PARAMS_H_
