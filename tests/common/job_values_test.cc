#include "common/job_values.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>

namespace simpo {
namespace {

using ::testing::Optional;

TEST(JobValues, Numbers) {
  EXPECT_THAT(ToNumber("5e-7"), Optional(5e-7));
  EXPECT_THAT(ToNumber("-3"), Optional(-3.0));
  EXPECT_THAT(ToNumber(".5"), Optional(0.5));
  for (const char* text : {"", "abc", "1x", "nan", ".nan", "inf", "1e999", "1,5", "--1"}) {
    EXPECT_EQ(ToNumber(text), std::nullopt) << text;
  }
}

TEST(JobValues, Durations) {
  EXPECT_THAT(ToDuration("90"), Optional(90));
  EXPECT_THAT(ToDuration("90s"), Optional(90));
  EXPECT_THAT(ToDuration("1.5m"), Optional(90));
  EXPECT_THAT(ToDuration("2h"), Optional(7200));
  EXPECT_THAT(ToDuration("1d"), Optional(86400));
  for (const char* text : {"", "s", "-1s", "1w", "1h30m", "1e300d"}) EXPECT_EQ(ToDuration(text), std::nullopt) << text;
}

TEST(JobValues, NumberTextReadsBackAsTheSameNumber) {
  EXPECT_EQ(NumberText(0.1), "0.1");
  EXPECT_EQ(NumberText(5e-7), "5e-07");
  EXPECT_EQ(NumberText(2), "2");
  std::mt19937_64 random(1);
  for (int i = 0; i < 10000; ++i) {
    const uint64_t bits = random();
    double value = 0;
    std::memcpy(&value, &bits, sizeof(value));
    if (!std::isfinite(value)) continue;
    ASSERT_THAT(ToNumber(NumberText(value)), Optional(value));
  }
}

TEST(JobValues, Ranges) {
  EXPECT_EQ(CheckRange("", -5), std::nullopt);
  EXPECT_EQ(CheckRange("> 0", 1e-300), std::nullopt);
  EXPECT_THAT(CheckRange("> 0", 0), Optional(std::string("must be > 0, not 0")));
  EXPECT_EQ(CheckRange(">= 0", 0), std::nullopt);
  EXPECT_NE(CheckRange(">= 0", -1e-9), std::nullopt);
  EXPECT_EQ(CheckRange("0 to 1", 1), std::nullopt);
  EXPECT_NE(CheckRange("0 to 1", 1.0000001), std::nullopt);
  EXPECT_NE(CheckRange("0 to below 1", 1), std::nullopt);
  EXPECT_EQ(CheckRange("0 to below 1", 0.999), std::nullopt);
}

}  // namespace
}  // namespace simpo
