#include "worker/advice.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>

#include "worker/shard/host_snapshot.h"

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

ModelConfig Llama(int64_t hidden, int64_t intermediate, int64_t layers, int64_t heads, int64_t vocab) {
  return {.model_type = "llama",
          .vocab_size = vocab,
          .hidden_size = hidden,
          .intermediate_size = intermediate,
          .num_layers = layers,
          .num_heads = heads,
          .num_kv_heads = 8,
          .head_dim = 128};
}
const ModelConfig kMistral7B = Llama(4096, 14336, 32, 32, 32000);
const ModelConfig kLlama8B = Llama(4096, 14336, 32, 32, 128256);
const ModelConfig kLlama70B = Llama(8192, 28672, 80, 64, 128256);

// The formulas of bytes per parameter and rank; sharding_test.cc holds the tensors against them.
TEST(Memory, NeedFollowsTheStages) {
  const auto psi = static_cast<double>(kMistral7B.NumParameters());
  const auto per_parameter = [&](const ShardingOptions& sharding, int ranks) {
    const MemoryNeed need = EstimateMemory(kMistral7B, sharding, ranks);
    return (need.total() - need.in_flight) / psi;
  };
  EXPECT_DOUBLE_EQ(per_parameter({.compute_dtype = at::kBFloat16, .zero_stage = 0}, 4), 18);
  EXPECT_DOUBLE_EQ(per_parameter({.compute_dtype = at::kBFloat16, .zero_stage = 1}, 4), 6 + 3);
  EXPECT_DOUBLE_EQ(per_parameter({.compute_dtype = at::kBFloat16, .zero_stage = 2}, 4), 2 + 4);
  EXPECT_DOUBLE_EQ(per_parameter({.compute_dtype = at::kBFloat16, .zero_stage = 3}, 4), 4.5);
  EXPECT_DOUBLE_EQ(per_parameter({.zero_stage = 1}, 1), 16);
}

// Full fine-tuning on the hardware that people have; what is left on the device is for activations.
TEST(Memory, OffloadFitsTheModelsThatItIsFor) {
  struct Row {
    const char* what;
    const ModelConfig& model;
    int ranks, zero_stage;
    double device_gb, host_gb_per_rank;
  };
  for (const Row& row :
       {Row{"7B on 1 x 40 GB", kMistral7B, 1, 1, 40, 128}, Row{"8B on 2 x 40 GB", kLlama8B, 2, 2, 40, 80},
        Row{"70B on 8 x 80 GB", kLlama70B, 8, 3, 80, 160}}) {
    const MemoryNeed need = EstimateMemory(row.model,
                                           {.compute_dtype = at::kBFloat16,
                                            .zero_stage = row.zero_stage,
                                            .offload_optimizer = true,
                                            .device = at::Device(at::kCUDA, 0)},
                                           row.ranks);
    std::printf("%s: %.1f GB on each device, %.1f GB of host memory for each rank\n", row.what, need.on_device / 1e9,
                need.on_host / 1e9);
    EXPECT_LE(need.on_device / 1e9, 0.75 * row.device_gb) << row.what;
    EXPECT_LE(need.on_host / 1e9, row.host_gb_per_rank) << row.what;
  }
}

TEST(Memory, WhatDoesNotFitIsSaidWithNumbersAndRemedies) {
  const ShardingOptions sharding{.zero_stage = 1};
  const MemoryNeed need = EstimateMemory(kMistral7B, sharding, 2);
  EXPECT_EQ(MemoryAdvice(need, sharding, 2, 1e12), std::nullopt);
  EXPECT_THAT(MemoryAdvice(need, sharding, 2, 24e9).value(),
              AllOf(HasSubstr("29.0 GB of weights"), HasSubstr("2 ranks are 173.8 GB"), HasSubstr("24.0 GB"),
                    HasSubstr("zero_stage: 3"), HasSubstr("bfloat16")));
  EXPECT_GT(TotalMemory(), AvailableMemory() / 2);
  EXPECT_GT(AvailableMemory(), 1e6);
}

}  // namespace
}  // namespace simpo
