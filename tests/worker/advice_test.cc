#include "worker/advice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace simpo {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

struct Curve {
  double loss, chosen, rejected;
  // A straight line from here to `end`.
  Curve At(const Curve& end, double share) const {
    return {loss + share * (end.loss - loss), chosen + share * (end.chosen - chosen),
            rejected + share * (end.rejected - rejected)};
  }
};

// All advice of a run of 200 steps whose metrics move from `begin` to `end`.
std::vector<std::string> AdviceOf(Advisor& advisor, const JobConfig& config, const Curve& begin, const Curve& end,
                                  int64_t first = 1, int64_t last = 200) {
  std::vector<std::string> all;
  for (int64_t step = first; step <= last; ++step) {
    const Curve now = begin.At(end, static_cast<double>(step) / 200);
    for (const std::string& text :
         advisor.AfterStep(step, {{"loss", now.loss},
                                  {"logps/chosen", now.chosen},
                                  {"logps/rejected", now.rejected},
                                  {"rewards/margins", config.beta * (now.chosen - now.rejected)}})) {
      all.push_back(text);
    }
  }
  return all;
}

const Curve kStart = {.loss = 1.2, .chosen = -0.9, .rejected = -1.0};

TEST(Advisor, AGoodRunHearsNothing) {
  const JobConfig config;
  Advisor advisor(config, 200);
  EXPECT_THAT(advisor.BeforeTraining(), IsEmpty());
  EXPECT_THAT(AdviceOf(advisor, config, kStart, {.loss = 0.6, .chosen = -1.1, .rejected = -1.9}), IsEmpty());
}

TEST(Advisor, AHighRateIsNamedBeforeTheFirstStep) {
  JobConfig config;
  config.learning_rate = 2e-5;
  Advisor advisor(config, 200);
  EXPECT_THAT(advisor.BeforeTraining(), ElementsAre(AllOf(HasSubstr("2e-05"), HasSubstr("3e-7 to 1e-6"))));
  EXPECT_THAT(advisor.BeforeTraining(), IsEmpty());
}

TEST(Advisor, ARisingLossAsksForALowerRateOnce) {
  const JobConfig config;
  Advisor advisor(config, 200);
  EXPECT_THAT(AdviceOf(advisor, config, kStart, {.loss = 4, .chosen = -1.0, .rejected = -1.6}),
              ElementsAre(AllOf(HasSubstr("the loss rises"), HasSubstr("learning_rate (5e-07)"))));
}

TEST(Advisor, ForgettingIsSeenThoughTheMarginGrows) {
  const JobConfig config;
  Advisor advisor(config, 200);
  EXPECT_THAT(AdviceOf(advisor, config, kStart, {.loss = 0.3, .chosen = -4, .rejected = -7}),
              ElementsAre(AllOf(HasSubstr("the model forgets"), HasSubstr("sft_weight"), HasSubstr("from -0.9"))));
}

TEST(Advisor, AFlatMarginIsNamedAfterWarmUpAndAThirdOfTheRun) {
  const JobConfig config;
  Advisor advisor(config, 200);
  const Curve end = {.loss = 1.19, .chosen = -0.9, .rejected = -1.01};
  EXPECT_THAT(AdviceOf(advisor, config, kStart, end, 1, 69), IsEmpty());
  EXPECT_THAT(AdviceOf(advisor, config, kStart, end, 70, 200),
              ElementsAre(AllOf(HasSubstr("margin is flat"), HasSubstr("gamma_beta_ratio (now 0.5)"))));
}

TEST(Advisor, AResumedRunRemembersItsStartAndWhatWasSaid) {
  const JobConfig config;
  const Curve end = {.loss = 4, .chosen = -4, .rejected = -7};
  Advisor first(config, 200);
  const std::vector<std::string> all = AdviceOf(first, config, kStart, end);
  EXPECT_EQ(all.size(), 2u);
  Advisor cut(config, 200);
  std::vector<std::string> parts = AdviceOf(cut, config, kStart, end, 1, 60);
  Advisor resumed(config, 200);
  resumed.Restore(cut.State());
  for (const std::string& text : AdviceOf(resumed, config, kStart, end, 61, 200)) parts.push_back(text);
  EXPECT_EQ(parts.size(), all.size());
  Advisor done(config, 200);
  done.Restore(first.State());
  EXPECT_THAT(AdviceOf(done, config, kStart, end, 150, 200), IsEmpty());
}

// The formulas of bytes per parameter and rank; sharding_test.cc holds the tensors against them.
TEST(Memory, NeedFollowsTheStages) {
  const auto per_parameter = [](ShardingOptions sharding, int ranks) {
    return EstimateMemory(1000, sharding, ranks, /*ranks_here=*/1).total() / 1000;
  };
  EXPECT_DOUBLE_EQ(per_parameter({.compute_dtype = at::kBFloat16, .zero_stage = 0}, 4), 18);
  EXPECT_DOUBLE_EQ(per_parameter({.compute_dtype = at::kBFloat16, .zero_stage = 1}, 4), 6 + 3);
  EXPECT_DOUBLE_EQ(per_parameter({.compute_dtype = at::kBFloat16, .zero_stage = 2}, 4), 2 + 4);
  EXPECT_DOUBLE_EQ(per_parameter({.compute_dtype = at::kBFloat16, .zero_stage = 3}, 4), 4.5);
  EXPECT_DOUBLE_EQ(per_parameter({.zero_stage = 1}, 1), 16);
}

TEST(Memory, WhatDoesNotFitIsSaidWithNumbersAndRemedies) {
  const ShardingOptions sharding{.zero_stage = 1};
  const MemoryNeed need = EstimateMemory(7'000'000'000, sharding, 2, 2);
  EXPECT_EQ(MemoryAdvice(need, sharding, 1e12), std::nullopt);
  EXPECT_THAT(MemoryAdvice(need, sharding, 24e9).value(),
              AllOf(HasSubstr("28.0 GB of weights"), HasSubstr("2 ranks are 168.0 GB"), HasSubstr("24.0 GB"),
                    HasSubstr("zero_stage: 3"), HasSubstr("bfloat16")));
  EXPECT_GT(ReadHostMemory().total, ReadHostMemory().available / 2);
  EXPECT_GT(ReadHostMemory().available, 1e6);
}

}  // namespace
}  // namespace simpo
