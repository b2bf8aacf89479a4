#ifndef SIMPO_WORKER_MODEL_OPS_H_
#define SIMPO_WORKER_MODEL_OPS_H_

#include <ATen/core/Tensor.h>

#include "worker/shard/sharded_params.h"

namespace simpo {

// The differentiable operations of a decoder layer. Weights are not autograd leaves: the backward
// pass of each operation finds the weight again (Weight::value) and adds its gradient straight into its
// fp32 place (Weight::grad), so no second copy of the gradients ever exists and released weights are
// never pinned.

// x [T, in] * weight [out, in]^T + bias [out] -> [T, out]
at::Tensor Linear(const at::Tensor& x, const WeightRef& weight, const WeightRef& bias = {});

// x / rms(x) * weight; statistics in fp32. x [T, hidden].
at::Tensor RmsNorm(const at::Tensor& x, const WeightRef& weight, double eps);

// silu(gate) * up of gate_up [T, 2 * width] = [gate | up] -> [T, width]
at::Tensor SwiGlu(const at::Tensor& gate_up);

// Rotates the first `heads` heads of x [T, all heads, head_dim] by the angles of each row
// (rotate-half form); the remaining heads pass through. cos_TD, sin_TD: fp32 [T, head_dim / 2].
at::Tensor ApplyRotary(const at::Tensor& x, int64_t heads, const at::Tensor& cos_TD, const at::Tensor& sin_TD);

// weight_grad fp32 [out, in] += gy^T x of x [T, in], gy [T, out].
void AccumulateWeightGrad(const at::Tensor& weight_grad, const at::Tensor& gy, const at::Tensor& x);

// Rows of table [vocab, hidden] by ids [T].
at::Tensor Embed(const at::Tensor& table, const at::Tensor& ids);
// table_grad[ids[t]] += grad[t]; rows of `padding_id` (if >= 0) get nothing.
void EmbedBackward(const at::Tensor& grad, const at::Tensor& ids, int64_t padding_id, at::Tensor table_grad);

}  // namespace simpo

#endif  // SIMPO_WORKER_MODEL_OPS_H_
