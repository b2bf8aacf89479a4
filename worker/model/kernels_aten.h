#ifndef SIMPO_WORKER_MODEL_KERNELS_ATEN_H_
#define SIMPO_WORKER_MODEL_KERNELS_ATEN_H_

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "worker/model/kernels_cpu.h"
#include "worker/model/model_config.h"

// The functions of kernels_cpu.h in plain ATen, for tensors on any device: what each computes is said
// there. Arithmetic is in fp32, roundings to the compute dtype where the CPU kernels have them.
namespace simpo::kernels_aten {

void RmsNorm(const at::Tensor& x, const at::Tensor& weight, NormStyle style, double eps, at::Tensor y, at::Tensor rstd);
void RmsNormBackward(const at::Tensor& gy, const at::Tensor& x, const at::Tensor& weight, NormStyle style,
                     const at::Tensor& rstd, at::Tensor gx, at::Tensor weight_grad);
void GatedActivation(const at::Tensor& gate_up, Activation activation, at::Tensor y);
void GatedActivationBackward(const at::Tensor& gy, const at::Tensor& gate_up, Activation activation,
                             at::Tensor grad_gate_up);
void Rotary(const at::Tensor& x, int64_t heads, const at::Tensor& cos_TR, const at::Tensor& sin_TR, bool inverse,
            at::Tensor y);
void SoftcapInPlace(at::Tensor logits, double cap);
void LogitStats(const at::Tensor& logits, at::Tensor lse_N, at::Tensor mean_N);
void ScaledSoftmaxInPlace(at::Tensor logits, const at::Tensor& lse_N, const at::Tensor& scale_N, double softcap);

}  // namespace simpo::kernels_aten

// The one of a kernel's two forms that takes `x`: SIMPO_KERNEL(x, RmsNorm)(x, ...).
#define SIMPO_KERNEL(x, name) ((x).is_cpu() ? ::simpo::kernels::name : ::simpo::kernels_aten::name)

#endif  // SIMPO_WORKER_MODEL_KERNELS_ATEN_H_
