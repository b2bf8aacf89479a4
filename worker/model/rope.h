#ifndef SIMPO_WORKER_MODEL_ROPE_H_
#define SIMPO_WORKER_MODEL_ROPE_H_

#include <ATen/core/Tensor.h>

#include "worker/model/model_config.h"

namespace simpo {

// Angles of rotary position embedding (arXiv 2104.09864) for each row of a batch.
struct RotaryAngles {
  at::Tensor cos_TD, sin_TD;  // fp32 [T, head_dim / 2]
};

// positions_T: int64. Inverse frequencies are rounded to fp32 as transformers does.
RotaryAngles ComputeRotaryAngles(const RopeConfig& rope, int64_t head_dim, const at::Tensor& positions_T);

}  // namespace simpo

#endif  // SIMPO_WORKER_MODEL_ROPE_H_
