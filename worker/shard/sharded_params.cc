#include "worker/shard/sharded_params.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <utility>

namespace simpo {
namespace {

int64_t RoundUp(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

std::string BucketName(const ModelConfig& config, int64_t layer) {
  if (layer < 0) return "embeddings";
  if (layer == config.num_layers) return "head";
  return c10::str("layer.", layer);
}

// Copies what of `source`, whose place in the bucket is [offset, offset + numel), lies within the
// `target`, whose place is [begin, begin + its size).
void CopyOverlap(const at::Tensor& source, int64_t offset, const at::Tensor& target, int64_t begin) {
  const int64_t from = std::max(offset, begin);
  const int64_t to = std::min(offset + source.numel(), begin + target.numel());
  if (from < to) target.narrow(0, from - begin, to - from).copy_(source.narrow(0, from - offset, to - from));
}

void Poison(const at::Tensor& tensor) { tensor.fill_(std::numeric_limits<float>::quiet_NaN()); }

}  // namespace

at::Tensor SlotOf(const at::Tensor& flat, const ParamSlot& slot) {
  return flat.narrow(0, slot.offset, slot.numel).view(slot.spec.shape);
}

Weight::Weight(const Bucket& bucket, int64_t offset, std::vector<int64_t> shape)
    : bucket_(bucket), offset_(offset), shape_(std::move(shape)) {
  for (int64_t size : shape_) numel_ *= size;
}

at::Tensor Weight::ViewOf(const at::Tensor& flat) const {
  TORCH_CHECK(flat.defined(), "bucket ", bucket_.name, " is not here: it is used outside its Gather or OpenGrads");
  return flat.narrow(0, offset_, numel_).view(shape_);
}

WeightRef Weight::JoinedWith(const Weight& next) const {
  if (&bucket_ != &next.bucket_ || next.offset_ != offset_ + numel_) return {};
  std::vector<int64_t> shape = shape_;
  shape[0] += next.shape_[0];
  return c10::make_intrusive<Weight>(bucket_, offset_, std::move(shape));
}

ShardedParams::ShardedParams(const ModelConfig& config, const ShardingOptions& options, Collectives& comm)
    : options_(options), comm_(comm) {
  TORCH_CHECK(options.zero_stage >= 0 && options.zero_stage <= 3, "zero_stage ", options.zero_stage);
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
  for (Bucket& bucket : buckets_) Allocate(bucket, comm.rank());
  gathers_.resize(buckets_.size());
}

void ShardedParams::Allocate(Bucket& bucket, int rank) {
  bucket.numel = RoundUp(bucket.numel, kBucketAlignment * comm_.world_size());
  bucket.shard_numel = bucket.numel / comm_.world_size();
  bucket.owned_begin = options_.zero_stage == 0 ? 0 : rank * bucket.shard_numel;
  const int64_t owned = owned_numel(bucket);
  const auto compute = at::TensorOptions().dtype(options_.compute_dtype).device(options_.device);
  const auto fp32 = at::TensorOptions().dtype(at::kFloat).device(options_.device);
  const auto state = options_.offload_optimizer ? fp32.device(at::kCPU) : fp32;
  if (options_.zero_stage < 3) {
    bucket.weights = at::zeros({bucket.numel}, compute);
    bucket.weight_shard = bucket.weights.narrow(0, bucket.owned_begin, owned);
  } else {
    bucket.weight_shard = at::zeros({owned}, compute);
  }
  if (options_.shards_gradients()) {
    bucket.grad_shard = at::zeros({owned}, state);
  } else {
    bucket.grads = at::zeros({bucket.numel}, fp32);
    bucket.grad_shard = bucket.grads.narrow(0, bucket.owned_begin, owned);
  }
  const bool shared = options_.compute_dtype == at::kFloat && !options_.offload_optimizer;
  bucket.master = shared ? bucket.weight_shard : at::zeros({owned}, state);
  bucket.exp_avg = at::zeros({owned}, state);
  bucket.exp_avg_sq = at::zeros({owned}, state);
}

void ShardedParams::SetWeight(Bucket& bucket, const ParamSlot& slot, const at::Tensor& whole) {
  comm_.activity().Moved();
  const at::Tensor flat = whole.flatten();
  // The master comes from the given precision, not from the rounded compute weight.
  CopyOverlap(flat, slot.offset, bucket.master, bucket.owned_begin);
  if (bucket.weights.defined()) {
    CopyOverlap(flat, slot.offset, bucket.weights, 0);
  } else if (!bucket.master.is_same(bucket.weight_shard)) {
    CopyOverlap(flat, slot.offset, bucket.weight_shard, bucket.owned_begin);
  }
}

bool ShardedParams::Has(std::string_view name) const {
  for (const Bucket& bucket : buckets_) {
    for (const ParamSlot& slot : bucket.slots) {
      if (slot.spec.name == name) return true;
    }
  }
  return false;
}

WeightRef ShardedParams::Find(std::string_view name) const {
  for (const Bucket& bucket : buckets_) {
    for (const ParamSlot& slot : bucket.slots) {
      if (slot.spec.name == name) return c10::make_intrusive<Weight>(bucket, slot.offset, slot.spec.shape);
    }
  }
  throw std::out_of_range(std::string("the model has no weight ") + std::string(name));
}

void ShardedParams::BeginGather(int64_t index) {
  Bucket& bucket = buckets_[index];
  if (options_.zero_stage < 3 || bucket.weights.defined()) return;
  bucket.weights = at::empty({bucket.numel}, bucket.weight_shard.options());
  bucket.weights.narrow(0, bucket.owned_begin, bucket.shard_numel).copy_(bucket.weight_shard);
  gathers_[index] = comm_.BeginAllGather(bucket.weights);
  gathered_bytes_ += static_cast<int64_t>(bucket.weights.nbytes());
  peak_gathered_ = std::max(peak_gathered_, gathered_bytes_);
}

void ShardedParams::Gather(int64_t index, int64_t next) {
  BeginGather(index);
  gathers_[index].Wait();
  if (next >= 0) BeginGather(next);
}

void ShardedParams::Release(int64_t index) {
  Bucket& bucket = buckets_[index];
  if (options_.zero_stage < 3 || !bucket.weights.defined()) return;
  gathers_[index].Wait();
  if (options_.poison_released) Poison(bucket.weights);
  gathered_bytes_ -= static_cast<int64_t>(bucket.weights.nbytes());
  bucket.weights.reset();
}

void ShardedParams::GatherAll() {
  for (int64_t i = 0; i < num_buckets(); ++i) Gather(i);
}

void ShardedParams::ReleaseAll() {
  for (int64_t i = 0; i < num_buckets(); ++i) Release(i);
}

void ShardedParams::ZeroGrads() {
  for (Bucket& bucket : buckets_) (options_.shards_gradients() ? bucket.grad_shard : bucket.grads).zero_();
}

void ShardedParams::OpenGrads(int64_t index) {
  Bucket& bucket = buckets_[index];
  // The micro-batch before may have left them travelling.
  const bool travelling =
      options_.shards_gradients() &&
      std::any_of(reductions_.begin(), reductions_.end(), [&](const Reduction& r) { return r.index == index; });
  if (travelling) FinishReduce();
  if (bucket.grads.defined()) return;
  bucket.grads = at::zeros({bucket.numel}, bucket.weight_shard.options().dtype(at::kFloat));
  open_grad_bytes_ += static_cast<int64_t>(bucket.grads.nbytes());
  peak_open_grads_ = std::max(peak_open_grads_, open_grad_bytes_);
}

void ShardedParams::ReduceGrads(int64_t index, bool last_micro_batch) {
  if (!options_.shards_gradients() && !last_micro_batch) return;
  // While this bucket's gradients were computed those of the one before have travelled.
  if (options_.shards_gradients()) FinishReduce();
  Bucket& bucket = buckets_[index];
  Reduction reduction{.index = index, .buffer = bucket.grads, .pending = {}};
  if (options_.reduce_dtype != at::kFloat && comm_.world_size() > 1) {
    reduction.buffer = bucket.grads.to(options_.reduce_dtype);
  }
  reduction.pending =
      options_.zero_stage == 0 ? comm_.BeginAllReduce(reduction.buffer) : comm_.BeginReduceScatter(reduction.buffer);
  reductions_.push_back(std::move(reduction));
}

void ShardedParams::FinishReduction(Reduction& reduction) {
  reduction.pending.Wait();
  Bucket& bucket = buckets_[reduction.index];
  const at::Tensor sum = reduction.buffer.narrow(0, bucket.owned_begin, owned_numel(bucket));
  if (!options_.shards_gradients()) {
    if (!reduction.buffer.is_same(bucket.grads)) bucket.grad_shard.copy_(sum);
    return;
  }
  bucket.grad_shard.add_(sum.to(bucket.grad_shard.device()));
  if (options_.poison_released) Poison(bucket.grads);
  open_grad_bytes_ -= static_cast<int64_t>(bucket.grads.nbytes());
  bucket.grads.reset();
}

void ShardedParams::FinishReduce() {
  for (Reduction& reduction : reductions_) FinishReduction(reduction);
  reductions_.clear();
}

void ShardedParams::Spread(int64_t index) {
  Bucket& bucket = buckets_[index];
  if (!bucket.master.is_same(bucket.weight_shard)) bucket.weight_shard.copy_(bucket.master);
  if (options_.zero_stage == 1 || options_.zero_stage == 2) gathers_[index] = comm_.BeginAllGather(bucket.weights);
}

void ShardedParams::SpreadAll() {
  for (int64_t i = 0; i < num_buckets(); ++i) Spread(i);
}

ShardedParams::Bytes ShardedParams::MemoryBytes() const {
  Bytes bytes{.peak_gathered = peak_gathered_, .peak_open_grads = peak_open_grads_};
  const auto size = [](const at::Tensor& tensor) { return static_cast<int64_t>(tensor.nbytes()); };
  for (const Bucket& bucket : buckets_) {
    bytes.weights += size(options_.zero_stage < 3 ? bucket.weights : bucket.weight_shard);
    bytes.grads += size(options_.shards_gradients() ? bucket.grad_shard : bucket.grads);
    bytes.optimizer += size(bucket.exp_avg) + size(bucket.exp_avg_sq);
    if (!bucket.master.is_same(bucket.weight_shard)) bytes.optimizer += size(bucket.master);
  }
  return bytes;
}

}  // namespace simpo
