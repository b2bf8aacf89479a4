#include "worker/shard/sharded_params.h"

#include <ATen/ATen.h>

#include <stdexcept>

#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

int64_t RoundUp(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

std::string BucketName(const ModelConfig& config, int64_t layer) {
  if (layer < 0) return "embeddings";
  if (layer == config.num_layers) return "head";
  return absl::StrCat("layer.", layer);
}

}  // namespace

ShardedParams::ShardedParams(const ModelConfig& config, at::ScalarType compute_dtype, int zero_stage, Collectives& comm)
    : compute_dtype_(compute_dtype), zero_stage_(zero_stage), comm_(comm) {
  TORCH_CHECK(zero_stage == 0 || zero_stage == 1, "zero_stage ", zero_stage);
  int64_t current_layer = std::numeric_limits<int64_t>::min();
  for (WeightSpec& spec : ModelWeights(config)) {
    if (spec.layer != current_layer) {
      current_layer = spec.layer;
      buckets_.emplace_back().name = BucketName(config, current_layer);
    }
    Bucket& bucket = buckets_.back();
    int64_t numel = 1;
    for (int64_t size : spec.shape) numel *= size;
    bucket.slots.push_back({.spec = std::move(spec), .offset = bucket.numel, .numel = numel});
    bucket.numel += RoundUp(numel, kBucketAlignment);
  }
  const auto fp32 = at::TensorOptions().dtype(at::kFloat);
  for (Bucket& bucket : buckets_) {
    bucket.numel = RoundUp(bucket.numel, kBucketAlignment * comm.world_size());
    bucket.shard_numel = bucket.numel / comm.world_size();
    bucket.weights = at::zeros({bucket.numel}, at::TensorOptions().dtype(compute_dtype));
    bucket.grads = at::zeros({bucket.numel}, fp32);
    const int64_t begin = zero_stage == 0 ? 0 : comm.rank() * bucket.shard_numel;
    const int64_t length = zero_stage == 0 ? bucket.numel : bucket.shard_numel;
    bucket.master = compute_dtype == at::kFloat ? bucket.weights.narrow(0, begin, length) : at::zeros({length}, fp32);
    bucket.exp_avg = at::zeros({length}, fp32);
    bucket.exp_avg_sq = at::zeros({length}, fp32);
    for (ParamSlot& slot : bucket.slots) {
      slot.weight = bucket.weights.narrow(0, slot.offset, slot.numel).view(slot.spec.shape);
      slot.grad = bucket.grads.narrow(0, slot.offset, slot.numel).view(slot.spec.shape);
    }
  }
}

absl::Status ShardedParams::LoadWeights(const ModelWeightsReader& reader) {
  for (Bucket& bucket : buckets_) {
    // The masters come from the file's own precision, not from the rounded compute weights.
    at::Tensor whole = compute_dtype_ == at::kFloat ? bucket.weights : at::zeros({bucket.numel}, at::kFloat);
    for (const ParamSlot& slot : bucket.slots) {
      absl::StatusOr<at::Tensor> source = reader.Get(slot.spec.name, slot.spec.shape);
      if (!source.ok()) return source.status();
      whole.narrow(0, slot.offset, slot.numel).view(slot.spec.shape).copy_(*source);
    }
    if (compute_dtype_ != at::kFloat) {
      bucket.weights.copy_(whole);
      bucket.master.copy_(zero_stage_ == 0 ? whole
                                           : whole.narrow(0, comm_.rank() * bucket.shard_numel, bucket.shard_numel));
    }
  }
  return absl::OkStatus();
}

bool ShardedParams::Has(std::string_view name) const {
  for (const Bucket& bucket : buckets_) {
    for (const ParamSlot& slot : bucket.slots) {
      if (slot.spec.name == name) return true;
    }
  }
  return false;
}

const ParamSlot& ShardedParams::Find(std::string_view name) const {
  for (const Bucket& bucket : buckets_) {
    for (const ParamSlot& slot : bucket.slots) {
      if (slot.spec.name == name) return slot;
    }
  }
  throw std::out_of_range(std::string("the model has no weight ") + std::string(name));
}

void ShardedParams::ZeroGrads() {
  for (Bucket& bucket : buckets_) bucket.grads.zero_();
}

void ShardedParams::ReduceGrads() {
  for (Bucket& bucket : buckets_) {
    if (zero_stage_ == 0) {
      comm_.AllReduce(bucket.grads);
    } else {
      comm_.ReduceScatter(bucket.grads);
    }
  }
}

at::Tensor ShardedParams::GradShard(const Bucket& bucket) const {
  if (zero_stage_ == 0) return bucket.grads;
  return bucket.grads.narrow(0, comm_.rank() * bucket.shard_numel, bucket.shard_numel);
}

void ShardedParams::GatherWeights() {
  for (Bucket& bucket : buckets_) {
    if (zero_stage_ == 0) {
      if (compute_dtype_ != at::kFloat) bucket.weights.copy_(bucket.master);
      continue;
    }
    if (compute_dtype_ != at::kFloat) {
      bucket.weights.narrow(0, comm_.rank() * bucket.shard_numel, bucket.shard_numel).copy_(bucket.master);
    }
    comm_.AllGather(bucket.weights);
  }
}

ShardedParams::Bytes ShardedParams::MemoryBytes() const {
  Bytes bytes;
  for (const Bucket& bucket : buckets_) {
    bytes.weights += bucket.weights.nbytes();
    bytes.grads += bucket.grads.nbytes();
    bytes.optimizer += bucket.exp_avg.nbytes() + bucket.exp_avg_sq.nbytes();
    if (compute_dtype_ != at::kFloat) bytes.optimizer += bucket.master.nbytes();
  }
  return bytes;
}

}  // namespace simpo
