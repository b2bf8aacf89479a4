#include "worker/lr_schedule.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

namespace simpo {
namespace {

JobConfig Config(const std::string& type, double ratio, int64_t steps = -1) {
  JobConfig config;
  config.learning_rate = 3e-6;
  config.lr_scheduler_type = type;
  config.warmup_ratio = ratio;
  config.warmup_steps = steps;
  return config;
}

TEST(LrSchedule, CosineWithWarmup) {
  const LrSchedule schedule = LrSchedule::FromConfig(Config("cosine", 0.1), 95);
  EXPECT_EQ(schedule.warmup, 10);  // rounded up
  EXPECT_EQ(schedule.Rate(0), 0);
  EXPECT_DOUBLE_EQ(schedule.Rate(5), 1.5e-6);
  EXPECT_DOUBLE_EQ(schedule.Rate(10), 3e-6);
  for (const int64_t k : {11, 50, 94}) {
    const double progress = static_cast<double>(k - 10) / 85;
    EXPECT_NEAR(schedule.Rate(k), 3e-6 * 0.5 * (1 + std::cos(std::numbers::pi * progress)), 1e-20);
  }
  EXPECT_NEAR(schedule.Rate(95), 0, 1e-20);
}

TEST(LrSchedule, Linear) {
  const LrSchedule schedule = LrSchedule::FromConfig(Config("linear", 0.0, 4), 20);
  EXPECT_EQ(schedule.warmup, 4);
  EXPECT_DOUBLE_EQ(schedule.Rate(1), 0.75e-6);
  EXPECT_DOUBLE_EQ(schedule.Rate(12), 1.5e-6);
  EXPECT_EQ(schedule.Rate(20), 0);
}

TEST(LrSchedule, Constant) {
  const LrSchedule plain = LrSchedule::FromConfig(Config("constant", 0.5), 20);
  for (int64_t k = 0; k < 20; ++k) EXPECT_EQ(plain.Rate(k), 3e-6);  // has no warm-up, as in transformers
  const LrSchedule warm = LrSchedule::FromConfig(Config("constant_with_warmup", 0.1), 20);
  EXPECT_EQ(warm.Rate(0), 0);
  EXPECT_DOUBLE_EQ(warm.Rate(1), 1.5e-6);
  EXPECT_EQ(warm.Rate(19), 3e-6);
}

TEST(LrSchedule, EdgesAreFinite) {
  for (const std::string type : {"cosine", "linear", "constant", "constant_with_warmup"}) {
    for (const double ratio : {0.0, 1.0}) {
      for (const int64_t total : {1, 2}) {
        const LrSchedule schedule = LrSchedule::FromConfig(Config(type, ratio), total);
        for (int64_t k = 0; k <= total; ++k) {
          EXPECT_GE(schedule.Rate(k), 0) << type;
          EXPECT_LE(schedule.Rate(k), 3e-6) << type;
        }
      }
    }
  }
}

}  // namespace
}  // namespace simpo
