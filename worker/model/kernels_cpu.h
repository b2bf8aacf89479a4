#ifndef SIMPO_WORKER_MODEL_KERNELS_CPU_H_
#define SIMPO_WORKER_MODEL_KERNELS_CPU_H_

#include <ATen/core/Tensor.h>

#include <cstdint>

// One-pass forms of what eager ATen does in several: on the CPU these loops are limited by memory,
// so each reads its inputs once. fp32 and bf16 (arithmetic in fp32). Tensors are contiguous unless
// said otherwise; outputs are allocated by the caller. The tests compare each with plain ATen.
namespace simpo::kernels {

// y = x * rstd * weight, rstd_T = 1 / sqrt(mean(x^2) + eps). x, y [T, H]; weight [H]; rstd_T fp32 [T].
void RmsNorm(const at::Tensor& x, const at::Tensor& weight, double eps, at::Tensor y, at::Tensor rstd_T);
// gx [T, H] is written; weight_grad fp32 [H] is added to.
void RmsNormBackward(const at::Tensor& gy, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& rstd_T,
                     at::Tensor gx, at::Tensor weight_grad);

// y [T, W] = silu(gate) * up with gate_up [T, 2W] = [gate | up].
void SwiGlu(const at::Tensor& gate_up, at::Tensor y);
void SwiGluBackward(const at::Tensor& gy, const at::Tensor& gate_up, at::Tensor grad_gate_up);

// y = x with the first `heads` of all heads rotated. x may have any row stride; x, y [T, A, D].
void Rotary(const at::Tensor& x, int64_t heads, const at::Tensor& cos_TD, const at::Tensor& sin_TD, bool inverse,
            at::Tensor y);

// Row statistics of logits [N, V]: lse_N = log sum exp (fp32), mean_N (fp32).
void LogitStats(const at::Tensor& logits, at::Tensor lse_N, at::Tensor mean_N);
// logits [N, V] <- scale_N[n] * exp(logits[n] - lse_N[n]), in place; scale_N fp32.
void ScaledSoftmaxInPlace(at::Tensor logits, const at::Tensor& lse_N, const at::Tensor& scale_N);

}  // namespace simpo::kernels

#endif  // SIMPO_WORKER_MODEL_KERNELS_CPU_H_
