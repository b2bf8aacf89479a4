#ifndef SIMPO_WORKER_MODEL_KERNELS_CPU_H_
#define SIMPO_WORKER_MODEL_KERNELS_CPU_H_

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "worker/model/model_config.h"

// One-pass forms of what eager ATen does in several: on the CPU these loops are limited by memory,
// so each reads its inputs once. fp32 and bf16 (arithmetic in fp32). Tensors are contiguous unless
// said otherwise; outputs are allocated by the caller. kernels_aten.h has the same for any device.
namespace simpo::kernels {

// y = x * rstd * weight (NormStyle says how), rstd = 1 / sqrt(mean(x^2) + eps) of each row of H.
// x, y [T, N, H] of any stride between the T, or [T, H]; weight [H]; rstd fp32, one per row.
void RmsNorm(const at::Tensor& x, const at::Tensor& weight, NormStyle style, double eps, at::Tensor y, at::Tensor rstd);
// gx is written; weight_grad fp32 [H] is added to.
void RmsNormBackward(const at::Tensor& gy, const at::Tensor& x, const at::Tensor& weight, NormStyle style,
                     const at::Tensor& rstd, at::Tensor gx, at::Tensor weight_grad);

// y [T, W] = activation(gate) * up with gate_up [T, 2W] = [gate | up].
void GatedActivation(const at::Tensor& gate_up, Activation activation, at::Tensor y);
void GatedActivationBackward(const at::Tensor& gy, const at::Tensor& gate_up, Activation activation,
                             at::Tensor grad_gate_up);

// y = x with the first `heads` of all heads rotated, each in its first 2R dimensions. x may have any row
// stride; x, y [T, A, D]; cos, sin fp32 [T, R].
void Rotary(const at::Tensor& x, int64_t heads, const at::Tensor& cos_TR, const at::Tensor& sin_TR, bool inverse,
            at::Tensor y);

// logits <- cap * tanh(logits / cap), in place.
void SoftcapInPlace(at::Tensor logits, double cap);
// Row statistics of logits [N, V]: lse_N = log sum exp (fp32), mean_N (fp32).
void LogitStats(const at::Tensor& logits, at::Tensor lse_N, at::Tensor mean_N);
// logits [N, V] <- scale_N[n] * exp(logits[n] - lse_N[n]), in place, times the derivative of the softcap
// that made the logits (0: none did); scale_N fp32.
void ScaledSoftmaxInPlace(at::Tensor logits, const at::Tensor& lse_N, const at::Tensor& scale_N, double softcap);

}  // namespace simpo::kernels

#endif  // SIMPO_WORKER_MODEL_KERNELS_CPU_H_
