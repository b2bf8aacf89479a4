// Packed attention against the sequences on their own, and the rotary angles.
#include "worker/model/attention.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "worker/model/rope.h"

namespace simpo {
namespace {

constexpr int64_t kHeads = 4, kKvHeads = 2, kHeadDim = 12;

// What the plan is made with, and one layer's attention.
struct Case {
  const char* name;
  int64_t window = 0;
  double softcap = 0;
  double scale = 0.25;

  AttentionConfig config() const {
    return {.heads = kHeads, .kv_heads = kKvHeads, .scale = scale, .window = window, .softcap = softcap};
  }
  std::shared_ptr<const AttentionPlan> Plan(const std::vector<PackedPair>& pairs, at::ScalarType dtype) const {
    return std::make_shared<const AttentionPlan>(pairs, std::vector<int64_t>{0, window}, dtype);
  }
};

// Softmax attention of one sequence, written out. qkv [T, heads + 2 kv, D] -> [T, heads * D].
at::Tensor Naive(const at::Tensor& qkv, const Case& c) {
  const int64_t length = qkv.size(0);
  const int64_t group = kHeads / kKvHeads;
  const at::Tensor q = qkv.narrow(1, 0, kHeads).transpose(0, 1);
  const at::Tensor k = qkv.narrow(1, kHeads, kKvHeads).transpose(0, 1).repeat_interleave(group, 0);
  const at::Tensor v = qkv.narrow(1, kHeads + kKvHeads, kKvHeads).transpose(0, 1).repeat_interleave(group, 0);
  at::Tensor scores = at::matmul(q, k.transpose(1, 2)) * c.scale;
  if (c.softcap > 0) scores = (scores / c.softcap).tanh() * c.softcap;
  at::Tensor hidden = at::ones({length, length}, at::kBool).triu(1);
  if (c.window > 0) hidden = hidden.logical_or(at::ones({length, length}, at::kBool).tril(-c.window));
  return at::matmul(scores.masked_fill(hidden, -INFINITY).softmax(-1), v).transpose(0, 1).reshape({length, -1});
}

// Each response of each pair as a sequence of its own; rows of the packed result in packed order.
at::Tensor NaiveOfPairs(const at::Tensor& qkv, const std::vector<PackedPair>& pairs, const Case& c) {
  std::vector<at::Tensor> parts;
  for (const PackedPair& pair : pairs) {
    const at::Tensor prefix = qkv.narrow(0, pair.begin, pair.prefix);
    const at::Tensor chosen = qkv.narrow(0, pair.begin + pair.prefix, pair.chosen_rest);
    const at::Tensor rejected = qkv.narrow(0, pair.begin + pair.prefix + pair.chosen_rest, pair.rejected_rest);
    parts.push_back(Naive(at::cat({prefix, chosen}), c));
    parts.push_back(Naive(at::cat({prefix, rejected}), c).narrow(0, pair.prefix, pair.rejected_rest));
  }
  return at::cat(parts);
}

std::vector<PackedPair> SomePairs() {
  std::vector<PackedPair> pairs;
  int64_t begin = 0;
  // Nothing shared; no rest on one side or on both; longer than one block of the kernel; longer than the
  // queries of one mask, with prefixes shorter and longer than that.
  for (const auto& [prefix, chosen, rejected] : std::vector<std::array<int64_t, 3>>{{5, 3, 4},
                                                                                    {0, 4, 2},
                                                                                    {7, 0, 3},
                                                                                    {6, 2, 0},
                                                                                    {1, 0, 0},
                                                                                    {40, 90, 70},
                                                                                    {1, 1, 1},
                                                                                    {30, 560, 600},
                                                                                    {540, 20, 25}}) {
    pairs.push_back({.begin = begin, .prefix = prefix, .chosen_rest = chosen, .rejected_rest = rejected});
    begin += pairs.back().size();
  }
  return pairs;
}

class PairAttentionOf : public testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(, PairAttentionOf,
                         testing::Values(Case{"plain"}, Case{"window_of_one", 1}, Case{"short_window", 6},
                                         Case{"window", 50}, Case{"long_window", 530}, Case{"endless_window", 5000},
                                         Case{"softcap", 0, 2.0}, Case{"window_and_softcap", 50, 2.0, 0.4}),
                         [](const auto& info) { return info.param.name; });

TEST_P(PairAttentionOf, EachSequenceAlone) {
  const std::vector<PackedPair> pairs = SomePairs();
  const int64_t rows = pairs.back().begin + pairs.back().size();
  const at::Tensor values =
      at::randn({rows, kHeads + 2 * kKvHeads, kHeadDim}, at::detail::createCPUGenerator(5), at::kDouble);
  const at::Tensor gy = at::randn({rows, kHeads * kHeadDim}, at::detail::createCPUGenerator(6), at::kDouble);
  for (const auto& [dtype, tolerance] : {std::pair(at::kFloat, 2e-6), std::pair(at::kBFloat16, 2e-2)}) {
    at::Tensor qkv = values.to(dtype).detach().requires_grad_(true);
    at::Tensor qkv64 = values.to(dtype).to(at::kDouble).detach().requires_grad_(true);
    const at::Tensor got = PairAttention(qkv, GetParam().config(), GetParam().Plan(pairs, dtype));
    const at::Tensor want = NaiveOfPairs(qkv64, pairs, GetParam());
    EXPECT_LE((got.to(at::kDouble) - want).abs().max().item<double>(), tolerance * 2);
    got.backward(gy.to(dtype));
    want.backward(gy.to(dtype).to(at::kDouble));
    const at::Tensor error = (qkv.grad().to(at::kDouble) - qkv64.grad()).norm();
    EXPECT_LE((error / qkv64.grad().norm()).item<double>(), tolerance);
  }
}

// On a GPU: one call of ATen's variable-length kernel, whose place flash_stand_in.cc takes here.
TEST_P(PairAttentionOf, TheVariableLengthKernelIsGivenTheSameSequences) {
  if (GetParam().softcap > 0) return;  // that kernel has none: PairAttention does not call it then
  std::vector<PackedPair> pairs = SomePairs();
  const int64_t rows = pairs.back().begin + pairs.back().size();
  const at::Tensor values =
      at::randn({rows, kHeads + 2 * kKvHeads, kHeadDim}, at::detail::createCPUGenerator(5), at::kDouble);
  const at::Tensor gy = at::randn({rows, kHeads * kHeadDim}, at::detail::createCPUGenerator(6), at::kDouble);
  at::Tensor qkv = values.clone().requires_grad_(true);
  at::Tensor plain = values.clone().requires_grad_(true);
  const at::Tensor got = VariableLengthAttention(qkv, GetParam().config(), GetParam().Plan(pairs, at::kDouble));
  const at::Tensor want = NaiveOfPairs(plain, pairs, GetParam());
  EXPECT_LE((got - want).abs().max().item<double>(), 1e-12);
  got.backward(gy);
  want.backward(gy);
  EXPECT_LE((qkv.grad() - plain.grad()).abs().max().item<double>(), 1e-11);
}

// No token of one pair, and none of chosen and rejected, ever reaches the other.
TEST_P(PairAttentionOf, NothingLeaks) {
  const std::vector<PackedPair> pairs = SomePairs();
  const PackedPair& pair = pairs.front();
  const int64_t rows = pairs.back().begin + pairs.back().size();
  const auto plan = GetParam().Plan(pairs, at::kFloat);
  const at::Tensor qkv =
      at::randn({rows, kHeads + 2 * kKvHeads, kHeadDim}, at::detail::createCPUGenerator(8), at::kFloat);
  const at::Tensor before = PairAttention(qkv, GetParam().config(), plan);
  at::Tensor changed = qkv.clone();
  changed.narrow(0, pair.prefix, pair.chosen_rest).add_(10);  // the chosen rest of the first pair
  const at::Tensor after = PairAttention(changed, GetParam().config(), plan);
  EXPECT_TRUE(at::equal(after.narrow(0, 0, pair.prefix), before.narrow(0, 0, pair.prefix)));
  EXPECT_FALSE(
      at::equal(after.narrow(0, pair.prefix, pair.chosen_rest), before.narrow(0, pair.prefix, pair.chosen_rest)));
  const int64_t rest = pair.prefix + pair.chosen_rest;
  EXPECT_TRUE(at::equal(after.narrow(0, rest, rows - rest), before.narrow(0, rest, rows - rest)));
}

// No mask is quadratic in the length of a sequence.
TEST(AttentionPlan, MasksStayNarrow) {
  const AttentionPlan plan({{.begin = 0, .prefix = 20000, .chosen_rest = 100, .rejected_rest = 9000}}, {0, 64},
                           at::kBFloat16);
  EXPECT_LE(plan.Mask(0, 20000, 512, 0).storage().nbytes(), 2u * 512 * (29000 + 512));
  EXPECT_LE(plan.Mask(64, 20000, 512, 20000 - 63).storage().nbytes(), 2u * 512 * (64 + 512));
}

TEST(RotaryAngles, FollowTheirFormulas) {
  const at::Tensor positions = at::tensor({0, 1, 7, 1000}, at::kLong);
  constexpr int64_t kDim = 64;
  ModelConfig plain;
  plain.head_dim = kDim;
  ModelConfig linear = plain;
  linear.rope = {.type = "linear", .factor = 4};
  ModelConfig llama3 = plain;
  llama3.rope = {.theta = 500000, .type = "llama3", .factor = 8, .original_max_position_embeddings = 8192};
  const at::Tensor cos = ComputeRotaryAngles(plain, positions).cos_TR;
  const at::Tensor sin = ComputeRotaryAngles(plain, positions).sin_TR;
  const at::Tensor stretched = ComputeRotaryAngles(linear, positions).sin_TR;
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
  const at::Tensor angles = at::asin(ComputeRotaryAngles(llama3, one).sin_TR[0]);
  EXPECT_NEAR(angles[1].item<double>(), std::pow(500000.0, -2.0 / kDim), 1e-6);
  EXPECT_NEAR(angles[31].item<double>() * 8, std::pow(500000.0, -62.0 / kDim), 1e-9);
}

// Angles that depend on the length are those of each sequence alone, and a prefix shared by sequences of
// different angles is a mistake that cannot go unseen.
TEST(RotaryAngles, AreOfEachSequencesLength) {
  ModelConfig config;
  config.head_dim = 8;
  config.rope = {.type = "dynamic", .factor = 4, .original_max_position_embeddings = 10};
  PackedBatch batch;
  batch.pairs = {{.begin = 0, .prefix = 3, .chosen_rest = 2, .rejected_rest = 1},    // 6 and 5 tokens: unscaled
                 {.begin = 6, .prefix = 0, .chosen_rest = 14, .rejected_rest = 4}};  // 15 and 5
  batch.positions_T = at::cat({at::arange(5), at::arange(3, 4), at::arange(14), at::arange(4)}).to(at::kLong);
  const at::Tensor sin = ComputeRotaryAngles(config, batch).sin_TR;
  const at::Tensor unscaled = ComputeRotaryAngles(config, batch.positions_T, 5).sin_TR;
  EXPECT_TRUE(at::equal(sin.narrow(0, 0, 6), unscaled.narrow(0, 0, 6)));
  EXPECT_TRUE(at::equal(sin.narrow(0, 20, 4), unscaled.narrow(0, 20, 4)));
  const double theta = 10000 * std::pow(4 * 1.5 - 3, 8.0 / 6);  // of 15 tokens
  EXPECT_NEAR(sin[6 + 13][1].item<double>(), std::sin(13 / std::pow(theta, 2.0 / 8)), 1e-6);

  batch.pairs[1] = {.begin = 6, .prefix = 4, .chosen_rest = 10, .rejected_rest = 4};
  EXPECT_THROW(ComputeRotaryAngles(config, batch), c10::Error);
}

}  // namespace
}  // namespace simpo
