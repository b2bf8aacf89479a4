#include "worker/model/rope.h"

#include <ATen/ATen.h>

#include <cmath>
#include <numbers>

namespace simpo {
namespace {

// Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between interpolated.
double ScaleLlama3(const RopeConfig& rope, double inv_freq) {
  const double wavelength = 2 * std::numbers::pi / inv_freq;
  const auto context = static_cast<double>(rope.original_max_position_embeddings);
  if (wavelength < context / rope.high_freq_factor) return inv_freq;
  if (wavelength > context / rope.low_freq_factor) return inv_freq / rope.factor;
  const double smooth = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor);
  return (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq;
}

}  // namespace

RotaryAngles ComputeRotaryAngles(const RopeConfig& rope, int64_t head_dim, const at::Tensor& positions_T) {
  at::Tensor inv_freq_D = at::empty({head_dim / 2}, at::kFloat);
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    double value = 1.0 / std::pow(rope.theta, 2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    if (rope.type == "linear") value /= rope.factor;
    if (rope.type == "llama3") value = ScaleLlama3(rope, value);
    inv_freq_D.data_ptr<float>()[i] = static_cast<float>(value);
  }
  const at::Tensor angles_TD = at::outer(positions_T.to(at::kFloat), inv_freq_D.to(positions_T.device()));
  return {.cos_TD = angles_TD.cos(), .sin_TD = angles_TD.sin()};
}

}  // namespace simpo
