#ifndef SIMPO_WORKER_ADAMW_H_
#define SIMPO_WORKER_ADAMW_H_

#include <cstdint>

#include "common/job_config.h"
#include "worker/comm/collectives.h"
#include "worker/shard/sharded_params.h"

namespace simpo {

// AdamW (arXiv 1711.05101) on this rank's shards: fp32 masters and moments.
struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0;  // not applied to biases and norms
  static AdamWOptions FromConfig(const JobConfig& config);
};

// L2 norm of the reduced gradients (after FinishReduce) over all ranks. Collective.
double GlobalGradNorm(const ShardedParams& params, Collectives& comm);

// min(1, max_norm / (norm + 1e-6)), as torch's clip_grad_norm_; 1 when max_norm is 0.
double ClipCoefficient(double norm, double max_norm);

// Multiplies the gradient shards by `clip`, then updates masters and moments, bucket by bucket; each is
// spread to the weights while the next is updated. `update` counts from 1. Collective.
void AdamWStep(ShardedParams& params, const AdamWOptions& options, double learning_rate, double clip, int64_t update);

}  // namespace simpo

#endif  // SIMPO_WORKER_ADAMW_H_
