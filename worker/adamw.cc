#include "worker/adamw.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace simpo {
namespace {

// A part of a shard to which weight decay applies, or not.
struct Range {
  int64_t begin, end;
  bool decay;
};

// The shard [shard_begin, shard_begin + size) of a bucket in ranges of equal treatment.
std::vector<Range> DecayRanges(const Bucket& bucket, int64_t shard_begin, int64_t size) {
  std::vector<Range> ranges;
  for (const ParamSlot& slot : bucket.slots) {
    const int64_t begin = std::max<int64_t>(slot.offset - shard_begin, 0);
    const int64_t end = std::min(slot.offset + slot.numel - shard_begin, size);
    if (begin >= end) continue;
    if (!ranges.empty() && ranges.back().decay == slot.spec.decay) {
      ranges.back().end = end;
    } else {
      ranges.push_back({begin, end, slot.spec.decay});
    }
  }
  return ranges;
}

}  // namespace

AdamWOptions AdamWOptions::FromConfig(const JobConfig& config) {
  return {.beta1 = config.adam_beta1,
          .beta2 = config.adam_beta2,
          .epsilon = config.adam_epsilon,
          .weight_decay = config.weight_decay};
}

double GlobalGradNorm(const ShardedParams& params, Collectives& comm) {
  double sum = 0;
  for (const Bucket& bucket : params.buckets()) {
    const double norm =
        at::linalg_vector_norm(bucket.grad_shard, 2, at::OptionalIntArrayRef(), false, at::kDouble).item<double>();
    sum += norm * norm;
  }
  if (params.zero_stage() > 0) {
    at::Tensor total = at::full({1}, sum, at::kDouble);
    comm.AllReduce(total);
    sum = total.item<double>();
  }
  return std::sqrt(sum);
}

double ClipCoefficient(double norm, double max_norm) {
  return max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1.0;
}

void AdamWStep(ShardedParams& params, const AdamWOptions& options, double learning_rate, double clip, int64_t update) {
  for (int64_t index = 0; index < params.num_buckets(); ++index) {
    Bucket& bucket = params.buckets()[index];
    at::Tensor grad = bucket.grad_shard;
    const at::Tensor step = at::full({}, static_cast<double>(update), grad.options());
    if (clip != 1.0) grad.mul_(clip);
    const int64_t size = grad.numel();
    std::vector<Range> ranges = {{0, size, false}};
    if (options.weight_decay != 0) ranges = DecayRanges(bucket, bucket.owned_begin, size);
    for (const Range& range : ranges) {
      auto part = [&](const at::Tensor& whole) {
        return std::vector<at::Tensor>{whole.narrow(0, range.begin, range.end - range.begin)};
      };
      at::_fused_adamw_(part(bucket.master), part(grad), part(bucket.exp_avg), part(bucket.exp_avg_sq),
                        /*max_exp_avg_sqs=*/{}, {step}, learning_rate, options.beta1, options.beta2,
                        range.decay ? options.weight_decay : 0.0, options.epsilon, /*amsgrad=*/false,
                        /*maximize=*/false);
    }
    params.Spread(index);
  }
}

}  // namespace simpo
