#include "worker/simpo_loss.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <vector>

#include "worker/evaluate.h"

namespace simpo {
namespace {

std::vector<SimpoLoss> Losses() {
  std::vector<SimpoLoss> losses;
  for (const double beta : {0.5, 2.0, 10.0}) {
    for (const double ratio : {0.0, 0.5, 1.3}) {
      for (const double smoothing : {0.0, 0.1, 0.5}) {
        losses.push_back({SimpoLoss::Type::kSigmoid, beta, ratio, smoothing, 0});
      }
      losses.push_back({SimpoLoss::Type::kHinge, beta, ratio, 0, 0});
    }
  }
  return losses;
}

TEST(SimpoLoss, IsTheFormula) {
  const SimpoLoss loss{.beta = 2.5, .gamma_beta_ratio = 0.4, .label_smoothing = 0.1};
  const double z = 2.5 * (-1.0 + 1.3 - 0.4);
  const double sigmoid = 1 / (1 + std::exp(-z));
  EXPECT_NEAR(loss.ForPair(-1.0, -1.3).loss, -0.9 * std::log(sigmoid) - 0.1 * std::log(1 - sigmoid), 1e-14);
  const SimpoLoss hinge{.type = SimpoLoss::Type::kHinge, .beta = 2.5, .gamma_beta_ratio = 0.4};
  EXPECT_NEAR(hinge.ForPair(-1.0, -1.3).loss, 1 - z, 1e-14);
  EXPECT_EQ(hinge.ForPair(-1.0, -3.0).loss, 0);
  EXPECT_EQ(hinge.ForPair(-1.0, -3.0).d_chosen, 0);
}

TEST(SimpoLoss, DerivativeIsThatOfTheLoss) {
  constexpr double kStep = 1e-5;
  for (const SimpoLoss& loss : Losses()) {
    for (const double chosen : {-0.2, -1.0, -3.0}) {
      for (const double rejected : {-0.25, -1.1, -2.9}) {
        const double z = loss.beta * (chosen - rejected - loss.gamma_beta_ratio);
        if (loss.type == SimpoLoss::Type::kHinge && std::abs(1 - z) < 1e-3) continue;  // the corner has none
        const double d_chosen =
            (loss.ForPair(chosen + kStep, rejected).loss - loss.ForPair(chosen - kStep, rejected).loss) / (2 * kStep);
        const double d_rejected =
            (loss.ForPair(chosen, rejected + kStep).loss - loss.ForPair(chosen, rejected - kStep).loss) / (2 * kStep);
        EXPECT_NEAR(loss.ForPair(chosen, rejected).d_chosen, d_chosen, 1e-7 * loss.beta * loss.beta);
        EXPECT_NEAR(-loss.ForPair(chosen, rejected).d_chosen, d_rejected, 1e-7 * loss.beta * loss.beta);
      }
    }
  }
}

TEST(SimpoLoss, StaysFiniteFarFromZero) {
  for (const SimpoLoss& loss : Losses()) {
    for (const double difference : {-1e6, -800.0, 800.0, 1e6}) {
      const SimpoLoss::PairLoss pair = loss.ForPair(difference, 0);
      EXPECT_TRUE(std::isfinite(pair.loss) && std::isfinite(pair.d_chosen)) << difference;
      EXPECT_GE(pair.loss, 0);
    }
  }
}

TEST(SimpoStats, AddUpFieldByField) {
  std::array<double, SimpoStats::kFields> values{};
  std::iota(values.begin(), values.end(), 1.0);
  SimpoStats stats = SimpoStats::FromArray(values);
  EXPECT_EQ(stats.ToArray(), values);
  stats += stats;
  for (size_t i = 0; i < values.size(); ++i) EXPECT_EQ(stats.ToArray()[i], 2 * values[i]);
}

TEST(StatsToMetrics, AreMeansOverPairsAndTokens) {
  const SimpoStats stats{.pairs = 4,
                         .loss = 2,
                         .logps_chosen = -4,
                         .logps_rejected = -8,
                         .accuracy = 3,
                         .logits_chosen = 30,
                         .logits_rejected = 10,
                         .tokens_chosen = 20,
                         .tokens_rejected = 40,
                         .nll_chosen = 10};
  const SimpoLoss loss{.beta = 3, .sft_weight = 0.2};
  const std::map<std::string, double> want = {
      {"x_loss", 0.5 + 0.2 * 0.5},    {"x_rewards/chosen", -3}, {"x_rewards/rejected", -6}, {"x_rewards/margins", 3},
      {"x_rewards/accuracies", 0.75}, {"x_logps/chosen", -1},   {"x_logps/rejected", -2},   {"x_logits/chosen", 1.5},
      {"x_logits/rejected", 0.25},    {"x_sft_loss", 0.5},      {"x_nll_loss", 0.5},        {"x_lengths/chosen", 5},
      {"x_lengths/rejected", 10}};
  const std::map<std::string, double> got = StatsToMetrics(stats, loss, "x_");
  ASSERT_EQ(got.size(), want.size());
  for (const auto& [name, value] : want) EXPECT_DOUBLE_EQ(got.at(name), value) << name;
}

}  // namespace
}  // namespace simpo
