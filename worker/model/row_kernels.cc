// Compiled once per instruction set: SIMPO_SIMD names the namespace (baseline, v3, v4). Loops are
// written so that the compiler vectorises them; see CMakeLists.txt for the flags.
#include "worker/model/row_kernels.h"

#include <math.h>
#include <string.h>

namespace simpo::SIMPO_SIMD {
namespace {

inline float Bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline uint32_t Bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float Load(float value) { return value; }
inline float Load(Bf16Bits value) { return Bits(static_cast<uint32_t>(value.bits) << 16); }
inline void Store(float* place, float value) { *place = value; }
// Rounds to nearest even; a NaN stays a NaN.
inline void Store(Bf16Bits* place, float value) {
  const uint32_t bits = Bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  place->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// exp(x) to about 1 ulp for x <= 88; 0 below -87; a NaN gives a NaN. Cody and Waite's reduction,
// then a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2].
inline float Exp(float x) {
  const float clamped = x < -87.3f ? -87.3f : (x > 88.3f ? 88.3f : x);
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float e = p * r * r + r + 1.0f;
  const float scale = Bits((Bits(shifted) - 0x4b400000u + 127u) << 23);
  const float value = e * scale;
  return x < -87.3f ? 0.0f : value;
}

inline float Sigmoid(float x) { return 1.0f / (1.0f + Exp(-x)); }

// To about 1 ulp: an odd polynomial near zero, where the quotient would lose digits.
inline float Tanh(float x) {
  const float z = x * x;
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const float near_zero = p * z * x + x;
  const float elsewhere = 1.0f - 2.0f / (Exp(2.0f * x) + 1.0f);
  return z < 0.625f * 0.625f ? near_zero : elsewhere;
}

// gelu(x) = x / 2 * (1 + tanh(u)) = x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3).
inline float GeluGate(float x) { return Sigmoid(1.5957691216f * (x + 0.044715f * x * x * x)); }

// `value` as T holds it. A NaN that arithmetic made of T's own NaN, or by itself, stays one.
template <typename T>
inline float Rounded(float value);
template <>
inline float Rounded<float>(float value) {
  return value;
}
template <>
inline float Rounded<Bf16Bits>(float value) {
  const uint32_t bits = Bits(value);
  return Bits((bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u);
}

template <typename T, bool round_first>
void ScaleNormed(const T* __restrict x, const T* __restrict weight, float offset, float rstd, int64_t size,
                 T* __restrict y) {
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float xhat = round_first ? Rounded<T>(Load(x[i]) * rstd) : Load(x[i]) * rstd;
    Store(&y[i], xhat * (Load(weight[i]) + offset));
  }
}

template <typename T>
float RmsNorm(const T* __restrict x, const T* __restrict weight, float offset, bool round_first, float eps,
              int64_t size, T* __restrict y) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += Load(x[i]) * Load(x[i]);
  const float rstd = 1.0f / sqrtf(sum / static_cast<float>(size) + eps);
  (round_first ? ScaleNormed<T, true> : ScaleNormed<T, false>)(x, weight, offset, rstd, size, y);
  return rstd;
}

// With xhat = x * rstd and w = weight + offset: gx = rstd * (gy * w - xhat * mean(gy * w * xhat)).
template <typename T>
void RmsNormBackward(const T* __restrict gy, const T* __restrict x, const T* __restrict weight, float offset,
                     float rstd, int64_t size, T* __restrict gx, float* __restrict weight_grad) {
  float dot = 0;
#pragma omp simd reduction(+ : dot)
  for (int64_t i = 0; i < size; ++i) dot += Load(gy[i]) * (Load(weight[i]) + offset) * Load(x[i]);
  const float mean = dot * rstd / static_cast<float>(size);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float g = Load(gy[i]);
    const float xhat = Load(x[i]) * rstd;
    weight_grad[i] += g * xhat;
    Store(&gx[i], rstd * (g * (Load(weight[i]) + offset) - xhat * mean));
  }
}

template <typename T>
void SwiGlu(const T* __restrict gate, const T* __restrict up, int64_t width, T* __restrict y) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float g = Load(gate[i]);
    Store(&y[i], g * Sigmoid(g) * Load(up[i]));
  }
}

template <typename T>
void SwiGluBackward(const T* __restrict gy, const T* __restrict gate, const T* __restrict up, int64_t width,
                    T* __restrict grad_gate, T* __restrict grad_up) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float g = Load(gate[i]);
    const float s = Sigmoid(g);
    const float gi = Load(gy[i]);
    Store(&grad_up[i], gi * g * s);
    Store(&grad_gate[i], gi * Load(up[i]) * s * (1.0f + g * (1.0f - s)));
  }
}

template <typename T>
void GeGlu(const T* __restrict gate, const T* __restrict up, int64_t width, T* __restrict y) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float g = Load(gate[i]);
    Store(&y[i], g * GeluGate(g) * Load(up[i]));
  }
}

template <typename T>
void GeGluBackward(const T* __restrict gy, const T* __restrict gate, const T* __restrict up, int64_t width,
                   T* __restrict grad_gate, T* __restrict grad_up) {
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const float g = Load(gate[i]);
    const float s = GeluGate(g);
    const float gi = Load(gy[i]);
    const float slope = 1.5957691216f * (1.0f + 0.134145f * g * g);  // of the sigmoid's argument
    Store(&grad_up[i], gi * g * s);
    Store(&grad_gate[i], gi * Load(up[i]) * s * (1.0f + g * (1.0f - s) * slope));
  }
}

template <typename T>
void Rotate(const T* __restrict x, const float* __restrict cos, const float* __restrict sin, int64_t half, float sign,
            T* __restrict y) {
#pragma omp simd
  for (int64_t i = 0; i < half; ++i) {
    const float a = Load(x[i]);
    const float b = Load(x[i + half]);
    Store(&y[i], a * cos[i] - b * sign * sin[i]);
    Store(&y[i + half], b * cos[i] + a * sign * sin[i]);
  }
}

template <typename T>
void LogitStats(const T* __restrict logits, int64_t vocab, float* lse, float* mean) {
  float max = -INFINITY;
  double total = 0;
  // Blocks keep the fp32 sums short; the totals are double.
  constexpr int64_t kBlock = 4096;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    float block_sum = 0;
    float block_max = -INFINITY;
#pragma omp simd reduction(+ : block_sum) reduction(max : block_max)
    for (int64_t i = begin; i < end; ++i) {
      const float v = Load(logits[i]);
      block_sum += v;
      block_max = v > block_max ? v : block_max;
    }
    total += static_cast<double>(block_sum);
    max = block_max > max ? block_max : max;
  }
  double exp_total = 0;
  for (int64_t begin = 0; begin < vocab; begin += kBlock) {
    const int64_t end = begin + kBlock < vocab ? begin + kBlock : vocab;
    float block_sum = 0;
#pragma omp simd reduction(+ : block_sum)
    for (int64_t i = begin; i < end; ++i) block_sum += Exp(Load(logits[i]) - max);
    exp_total += static_cast<double>(block_sum);
  }
  *lse = max + static_cast<float>(log(exp_total));
  *mean = static_cast<float>(total / static_cast<double>(vocab));
}

template <typename T>
void Softcap(T* __restrict logits, int64_t vocab, float cap) {
  const float inverse = 1.0f / cap;
#pragma omp simd
  for (int64_t i = 0; i < vocab; ++i) Store(&logits[i], cap * Tanh(Load(logits[i]) * inverse));
}

// The derivative of y = cap * tanh(x / cap) is 1 - (y / cap)^2.
template <typename T>
void ScaledSoftmax(T* __restrict logits, int64_t vocab, float lse, float scale, float inverse_cap) {
#pragma omp simd
  for (int64_t i = 0; i < vocab; ++i) {
    const float value = Load(logits[i]);
    const float tanh = value * inverse_cap;
    Store(&logits[i], scale * Exp(value - lse) * (1.0f - tanh * tanh));
  }
}

template <typename T>
constexpr RowKernels<T> kTable = {RmsNorm<T>, RmsNormBackward<T>, SwiGlu<T>, SwiGluBackward<T>,
                                  GeGlu<T>,   GeGluBackward<T>,   Rotate<T>, LogitStats<T>,
                                  Softcap<T>, ScaledSoftmax<T>};

}  // namespace

extern const RowKernels<float> kFloatKernels;
extern const RowKernels<Bf16Bits> kBf16Kernels;
const RowKernels<float> kFloatKernels = kTable<float>;
const RowKernels<Bf16Bits> kBf16Kernels = kTable<Bf16Bits>;

}  // namespace simpo::SIMPO_SIMD
