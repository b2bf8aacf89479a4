#ifndef SIMPO_WORKER_MODEL_ROPE_H_
#define SIMPO_WORKER_MODEL_ROPE_H_

#include <ATen/core/Tensor.h>

#include "worker/model/model_config.h"
#include "worker/pack.h"

namespace simpo {

// Angles of rotary position embedding (arXiv 2104.09864) for each row of a batch. R: rotated pairs.
struct RotaryAngles {
  at::Tensor cos_TR, sin_TR;  // fp32, with the attention factor
};

// Those of positions_T (int64) of one sequence of `length` tokens, its last one included. Inverse
// frequencies are rounded to fp32 as transformers does.
RotaryAngles ComputeRotaryAngles(const ModelConfig& config, const at::Tensor& positions_T, int64_t length = 0);

// Those of a packed batch: by sequence where the frequencies depend on its length. Throws if sequences
// whose frequencies differ share a prefix (see Pack).
RotaryAngles ComputeRotaryAngles(const ModelConfig& config, const PackedBatch& batch);

}  // namespace simpo

#endif  // SIMPO_WORKER_MODEL_ROPE_H_
