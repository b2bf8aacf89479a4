#include "worker/model/rope.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

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

// YaRN (arXiv 2309.00071): frequencies that turn often within the original length are kept, slow ones
// divided by `factor`, those on the ramp between interpolated.
double ScaleYarn(const RopeConfig& rope, double dim, double pair, double inv_freq) {
  const auto pair_that_turns = [&](double times) {
    const auto context = static_cast<double>(rope.original_max_position_embeddings);
    return dim * std::log(context / (times * 2 * std::numbers::pi)) / (2 * std::log(rope.theta));
  };
  double low = pair_that_turns(rope.beta_fast);
  double high = pair_that_turns(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1);
  if (low == high) high += 0.001;
  const double slow = std::clamp((pair - low) / (high - low), 0.0, 1.0);
  return slow * inv_freq / rope.factor + (1 - slow) * inv_freq;
}

// Radians per position of the rotated pairs, in a sequence of `length` tokens.
at::Tensor InverseFrequencies(const ModelConfig& config, int64_t length) {
  const RopeConfig& rope = config.rope;
  const bool beyond = length > rope.SharedAnglesUpTo();
  const auto dim = std::floor(static_cast<double>(config.head_dim) * rope.partial_rotary_factor);
  double theta = rope.theta;
  if (rope.type == "dynamic" && beyond) {  // NTK-aware: the base grows with the length
    const double ratio = static_cast<double>(length) / static_cast<double>(rope.original_max_position_embeddings);
    theta *= std::pow(rope.factor * ratio - (rope.factor - 1), dim / (dim - 2));
  }
  at::Tensor inv_freq_R = at::empty({config.RotaryPairs()}, at::kFloat);
  for (int64_t i = 0; i < inv_freq_R.size(0); ++i) {
    double value = 1.0 / std::pow(theta, 2.0 * static_cast<double>(i) / dim);
    if (rope.type == "linear") value /= rope.factor;
    if (rope.type == "llama3") value = ScaleLlama3(rope, value);
    if (rope.type == "yarn") value = ScaleYarn(rope, dim, static_cast<double>(i), value);
    if (rope.type == "longrope") value /= (beyond ? rope.long_factor : rope.short_factor)[i];
    inv_freq_R.data_ptr<float>()[i] = static_cast<float>(value);
  }
  return inv_freq_R;
}

}  // namespace

RotaryAngles ComputeRotaryAngles(const ModelConfig& config, const at::Tensor& positions_T, int64_t length) {
  const at::Tensor inv_freq_R = InverseFrequencies(config, length).to(positions_T.device());
  const at::Tensor angles_TR = at::outer(positions_T.to(at::kFloat), inv_freq_R);
  const double factor = config.rope.attention_factor;
  return {.cos_TR = angles_TR.cos().mul_(factor), .sin_TR = angles_TR.sin().mul_(factor)};
}

RotaryAngles ComputeRotaryAngles(const ModelConfig& config, const PackedBatch& batch) {
  const int64_t shared_up_to = config.rope.SharedAnglesUpTo();
  int64_t longest = 0;
  for (const PackedPair& pair : batch.pairs) longest = std::max({longest, pair.ChosenLength(), pair.RejectedLength()});
  if (longest <= shared_up_to) return ComputeRotaryAngles(config, batch.positions_T, longest);

  std::vector<at::Tensor> cos, sin;
  const auto add = [&](int64_t begin, int64_t count, int64_t length) {
    const RotaryAngles angles = ComputeRotaryAngles(config, batch.positions_T.narrow(0, begin, count), length);
    cos.push_back(angles.cos_TR);
    sin.push_back(angles.sin_TR);
  };
  for (const PackedPair& pair : batch.pairs) {
    const bool same = std::max(pair.ChosenLength(), pair.RejectedLength()) <= shared_up_to;
    TORCH_CHECK(same || pair.prefix == 0, "a prefix is shared by sequences with different rotary angles");
    const int64_t first = pair.prefix + pair.chosen_rest;
    add(pair.begin, first, pair.ChosenLength());
    add(pair.begin + first, pair.rejected_rest, pair.RejectedLength());
  }
  return {.cos_TR = at::cat(cos), .sin_TR = at::cat(sin)};
}

}  // namespace simpo
