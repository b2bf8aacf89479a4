#ifndef SIMPO_WORKER_MODEL_OPS_H_
#define SIMPO_WORKER_MODEL_OPS_H_

#include <ATen/core/Tensor.h>

#include "worker/model/model_config.h"
#include "worker/shard/sharded_params.h"

namespace simpo {

// The differentiable operations of a decoder layer. Weights are not autograd leaves: the backward
// pass of each operation finds the weight again (Weight::value) and adds its gradient straight into its
// fp32 place (Weight::grad), so no second copy of the gradients ever exists and released weights are
// never pinned. On the CPU they use kernels_cpu.h, elsewhere kernels_aten.h.

// x [T, in] * weight [out, in]^T + bias [out] -> [T, out]
at::Tensor Linear(const at::Tensor& x, const WeightRef& weight, const WeightRef& bias = {});

// x / rms(x) * weight as `style` says; statistics in fp32. x [T, hidden].
at::Tensor RmsNorm(const at::Tensor& x, const WeightRef& weight, NormStyle style, double eps);

// The same of the queries and of the keys of qkv [T, heads + 2 * kv_heads, head_dim], head by head where the
// weight has head_dim elements, else of all heads of a token together. The values pass through.
at::Tensor QkNorms(const at::Tensor& qkv, int64_t heads, int64_t kv_heads, const WeightRef& q_weight,
                   const WeightRef& k_weight, NormStyle style, double eps);

// activation(gate) * up of gate_up [T, 2 * width] = [gate | up] -> [T, width]
at::Tensor GatedActivation(const at::Tensor& gate_up, Activation activation);

// Rotates the first `heads` heads of x [T, all heads, head_dim] by the angles of each row (rotate-half
// form, in a head's first 2R dimensions); the rest passes through. cos_TR, sin_TR: fp32 [T, R].
at::Tensor ApplyRotary(const at::Tensor& x, int64_t heads, const at::Tensor& cos_TR, const at::Tensor& sin_TR);

// weight_grad fp32 [out, in] += gy^T x of x [T, in], gy [T, out].
void AccumulateWeightGrad(const at::Tensor& weight_grad, const at::Tensor& gy, const at::Tensor& x);

// Rows of table [vocab, hidden] by ids [T].
at::Tensor Embed(const at::Tensor& table, const at::Tensor& ids);
// table_grad[ids[t]] += grad[t]; rows of `padding_id` (if >= 0) get nothing.
void EmbedBackward(const at::Tensor& grad, const at::Tensor& ids, int64_t padding_id, at::Tensor table_grad);

}  // namespace simpo

#endif  // SIMPO_WORKER_MODEL_OPS_H_
