#ifndef SIMPO_WORKER_MODEL_ROW_KERNELS_H_
#define SIMPO_WORKER_MODEL_ROW_KERNELS_H_

#include <cstdint>

// The inner loops of kernels_cpu.cc over rows in memory. row_kernels.cc is compiled once per
// instruction set, with nothing but the C library, so that no inline function of another library
// is ever compiled for a processor that may not be there; BestRowKernels() picks at run time.
namespace simpo {

// bf16 as its bits: the upper half of an fp32.
struct Bf16Bits {
  uint16_t bits;
};

template <typename T>
struct RowKernels {
  // One row of H elements: y = x * rstd * (weight + offset), where x * rstd is rounded to T before it is
  // scaled if round_first says so. Returns rstd = 1 / sqrt(mean(x^2) + eps).
  float (*rms_norm)(const T* x, const T* weight, float offset, bool round_first, float eps, int64_t size, T* y);
  // One row; weight_grad (fp32) is added to.
  void (*rms_norm_backward)(const T* gy, const T* x, const T* weight, float offset, float rstd, int64_t size, T* gx,
                            float* weight_grad);
  // One row: y = silu(gate) * up; geglu: gelu(gate) * up, gelu in its tanh form.
  void (*swiglu)(const T* gate, const T* up, int64_t width, T* y);
  void (*swiglu_backward)(const T* gy, const T* gate, const T* up, int64_t width, T* grad_gate, T* grad_up);
  void (*geglu)(const T* gate, const T* up, int64_t width, T* y);
  void (*geglu_backward)(const T* gy, const T* gate, const T* up, int64_t width, T* grad_gate, T* grad_up);
  // One head of one row: rotate-half by (cos, sin) of half the head's size.
  void (*rotate)(const T* x, const float* cos, const float* sin, int64_t half, float sign, T* y);
  // One row of logits.
  void (*logit_stats)(const T* logits, int64_t vocab, float* lse, float* mean);
  void (*softcap)(T* logits, int64_t vocab, float cap);
  // inverse_cap: of the softcap that made the logits; 0 without.
  void (*scaled_softmax)(T* logits, int64_t vocab, float lse, float scale, float inverse_cap);
};

// For the processor that this runs on. T: float, Bf16Bits.
template <typename T>
const RowKernels<T>& BestRowKernels();

}  // namespace simpo

#endif  // SIMPO_WORKER_MODEL_ROW_KERNELS_H_
