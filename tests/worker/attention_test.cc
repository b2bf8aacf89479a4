// Packed attention against the sequences on their own, and the rotary angles.
#include "worker/model/attention.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "worker/model/rope.h"

namespace simpo {
namespace {

constexpr int64_t kHeads = 4, kKvHeads = 2, kHeadDim = 12;

// Softmax attention of one sequence, written out. qkv [T, heads + 2 kv, D] -> [T, heads * D].
at::Tensor Naive(const at::Tensor& qkv) {
  const int64_t length = qkv.size(0);
  const int64_t group = kHeads / kKvHeads;
  const at::Tensor q = qkv.narrow(1, 0, kHeads).transpose(0, 1);
  const at::Tensor k = qkv.narrow(1, kHeads, kKvHeads).transpose(0, 1).repeat_interleave(group, 0);
  const at::Tensor v = qkv.narrow(1, kHeads + kKvHeads, kKvHeads).transpose(0, 1).repeat_interleave(group, 0);
  at::Tensor scores = at::matmul(q, k.transpose(1, 2)) / std::sqrt(static_cast<double>(kHeadDim));
  scores = scores.masked_fill(at::ones({length, length}, at::kBool).triu(1), -INFINITY);
  return at::matmul(scores.softmax(-1), v).transpose(0, 1).reshape({length, -1});
}

// Each response of each pair as a sequence of its own; rows of the packed result in packed order.
at::Tensor NaiveOfPairs(const at::Tensor& qkv, const std::vector<PackedPair>& pairs) {
  std::vector<at::Tensor> parts;
  for (const PackedPair& pair : pairs) {
    const at::Tensor prefix = qkv.narrow(0, pair.begin, pair.prefix);
    const at::Tensor chosen = qkv.narrow(0, pair.begin + pair.prefix, pair.chosen_rest);
    const at::Tensor rejected = qkv.narrow(0, pair.begin + pair.prefix + pair.chosen_rest, pair.rejected_rest);
    parts.push_back(Naive(at::cat({prefix, chosen})));
    parts.push_back(Naive(at::cat({prefix, rejected})).narrow(0, pair.prefix, pair.rejected_rest));
  }
  return at::cat(parts);
}

std::vector<PackedPair> SomePairs() {
  std::vector<PackedPair> pairs;
  int64_t begin = 0;
  // Nothing shared; no rest on one side or on both; longer than one block of the kernel.
  for (const auto& [prefix, chosen, rejected] : std::vector<std::array<int64_t, 3>>{
           {5, 3, 4}, {0, 4, 2}, {7, 0, 3}, {6, 2, 0}, {1, 0, 0}, {40, 90, 70}, {1, 1, 1}}) {
    pairs.push_back({.begin = begin, .prefix = prefix, .chosen_rest = chosen, .rejected_rest = rejected});
    begin += pairs.back().size();
  }
  return pairs;
}

TEST(PairAttention, EqualsEachSequenceAlone) {
  const std::vector<PackedPair> pairs = SomePairs();
  const int64_t rows = pairs.back().begin + pairs.back().size();
  const at::Tensor values =
      at::randn({rows, kHeads + 2 * kKvHeads, kHeadDim}, at::detail::createCPUGenerator(5), at::kDouble);
  const at::Tensor gy = at::randn({rows, kHeads * kHeadDim}, at::detail::createCPUGenerator(6), at::kDouble);
  for (const auto& [dtype, tolerance] : {std::pair(at::kFloat, 2e-6), std::pair(at::kBFloat16, 2e-2)}) {
    at::Tensor qkv = values.to(dtype).detach().requires_grad_(true);
    at::Tensor qkv64 = values.to(dtype).to(at::kDouble).detach().requires_grad_(true);
    const at::Tensor got = PairAttention(qkv, kHeads, kKvHeads, std::make_shared<const AttentionPlan>(pairs, dtype));
    const at::Tensor want = NaiveOfPairs(qkv64, pairs);
    EXPECT_LE((got.to(at::kDouble) - want).abs().max().item<double>(), tolerance * 2);
    got.backward(gy.to(dtype));
    want.backward(gy.to(dtype).to(at::kDouble));
    const at::Tensor error = (qkv.grad().to(at::kDouble) - qkv64.grad()).norm();
    EXPECT_LE((error / qkv64.grad().norm()).item<double>(), tolerance);
  }
}

// No token of one pair, and none of chosen and rejected, ever reaches the other.
TEST(PairAttention, NothingLeaks) {
  const std::vector<PackedPair> pairs = SomePairs();
  const PackedPair& pair = pairs.front();
  const int64_t rows = pairs.back().begin + pairs.back().size();
  const auto plan = std::make_shared<const AttentionPlan>(pairs, at::kFloat);
  const at::Tensor qkv =
      at::randn({rows, kHeads + 2 * kKvHeads, kHeadDim}, at::detail::createCPUGenerator(8), at::kFloat);
  const at::Tensor before = PairAttention(qkv, kHeads, kKvHeads, plan);
  at::Tensor changed = qkv.clone();
  changed.narrow(0, pair.prefix, pair.chosen_rest).add_(10);  // the chosen rest of the first pair
  const at::Tensor after = PairAttention(changed, kHeads, kKvHeads, plan);
  EXPECT_TRUE(at::equal(after.narrow(0, 0, pair.prefix), before.narrow(0, 0, pair.prefix)));
  EXPECT_FALSE(
      at::equal(after.narrow(0, pair.prefix, pair.chosen_rest), before.narrow(0, pair.prefix, pair.chosen_rest)));
  const int64_t rest = pair.prefix + pair.chosen_rest;
  EXPECT_TRUE(at::equal(after.narrow(0, rest, rows - rest), before.narrow(0, rest, rows - rest)));
}

TEST(RotaryAngles, FollowTheirFormulas) {
  const at::Tensor positions = at::tensor({0, 1, 7, 1000}, at::kLong);
  const RopeConfig plain{.theta = 10000};
  RopeConfig linear = plain;
  linear.type = "linear";
  linear.factor = 4;
  RopeConfig llama3{.theta = 500000, .type = "llama3", .factor = 8, .original_max_position_embeddings = 8192};
  constexpr int64_t kDim = 64;
  const at::Tensor cos = ComputeRotaryAngles(plain, kDim, positions).cos_TD;
  const at::Tensor sin = ComputeRotaryAngles(plain, kDim, positions).sin_TD;
  const at::Tensor stretched = ComputeRotaryAngles(linear, kDim, positions).sin_TD;
  for (int64_t p = 0; p < positions.numel(); ++p) {
    for (int64_t i = 0; i < kDim / 2; ++i) {
      const double angle = positions[p].item<double>() / std::pow(10000.0, 2.0 * static_cast<double>(i) / kDim);
      EXPECT_NEAR(cos[p][i].item<double>(), std::cos(angle), 1e-4);
      EXPECT_NEAR(sin[p][i].item<double>(), std::sin(angle), 1e-4);
      EXPECT_NEAR(stretched[p][i].item<double>(), std::sin(angle / 4), 1e-4);
    }
  }
  // Llama 3.1: the shortest wavelengths are kept, the longest divided by the factor.
  const at::Tensor one = at::tensor({1}, at::kLong);
  const at::Tensor angles = at::asin(ComputeRotaryAngles(llama3, kDim, one).sin_TD[0]);
  EXPECT_NEAR(angles[1].item<double>(), std::pow(500000.0, -2.0 / kDim), 1e-6);
  EXPECT_NEAR(angles[31].item<double>() * 8, std::pow(500000.0, -62.0 / kDim), 1e-9);
}

}  // namespace
}  // namespace simpo
