#include "coordinator/liveness.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace simpo {
namespace {

using std::chrono::seconds;
using ::testing::HasSubstr;

constexpr LivenessLimits kLimits{.attach = seconds(100), .heartbeat = seconds(30), .exit = seconds(60)};
const SteadyTime kStart = SteadyTime(seconds(1000));

TEST(LivenessTest, NothingIsAskedBeforeTheGangStarts) {
  EXPECT_FALSE(FindHungRank(kStart + seconds(9999), std::nullopt, {RankHealth{}}, kLimits));
}

TEST(LivenessTest, ARankThatNeverComes) {
  const std::vector<RankHealth> ranks = {{.attached = true, .last_heard = kStart + seconds(99)}, {}};
  EXPECT_FALSE(FindHungRank(kStart + seconds(100), kStart, ranks, kLimits));
  EXPECT_THAT(*FindHungRank(kStart + seconds(101), kStart, ranks, kLimits), HasSubstr("rank 1 did not report"));
}

TEST(LivenessTest, ARankThatFallsSilent) {
  const std::vector<RankHealth> ranks = {{.attached = true, .last_heard = kStart + seconds(50)},
                                         {.attached = true, .last_heard = kStart + seconds(20)}};
  EXPECT_FALSE(FindHungRank(kStart + seconds(50), kStart, ranks, kLimits));
  EXPECT_THAT(*FindHungRank(kStart + seconds(51), kStart, ranks, kLimits),
              HasSubstr("rank 1 has been silent for 31 s"));
}

TEST(LivenessTest, AFinishedRankMayBeSilentButTheGangMustEnd) {
  std::vector<RankHealth> ranks = {{.attached = true, .finished = true, .last_heard = kStart + seconds(10)},
                                   {.attached = true, .last_heard = kStart + seconds(100)}};
  EXPECT_FALSE(FindHungRank(kStart + seconds(110), kStart, ranks, kLimits));
  ranks[1].finished = true;
  EXPECT_FALSE(FindHungRank(kStart + seconds(160), kStart, ranks, kLimits));
  EXPECT_THAT(*FindHungRank(kStart + seconds(161), kStart, ranks, kLimits), HasSubstr("did not end within 60 s"));
}

}  // namespace
}  // namespace simpo
