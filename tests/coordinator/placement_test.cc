#include "coordinator/placement.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace simpo {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(PlacementTest, PriorityThenAge) {
  const PlacementDecision decision = DecidePlacement(0, 8, 0,
                                                     {{.id = "old", .sequence = 1, .slots = 2},
                                                      {.id = "new", .sequence = 2, .slots = 2},
                                                      {.id = "urgent", .priority = 5, .sequence = 3, .slots = 2}});
  EXPECT_THAT(decision.start, ElementsAre("urgent", "old", "new"));
  EXPECT_THAT(decision.reasons, IsEmpty());
}

TEST(PlacementTest, AllSlotsOrNoneAndNobodyPasses) {
  const PlacementDecision decision =
      DecidePlacement(0, 4, 2, {{.id = "big", .sequence = 1, .slots = 3}, {.id = "small", .sequence = 2, .slots = 1}});
  EXPECT_THAT(decision.start, IsEmpty());
  EXPECT_EQ(decision.reasons.at("big"), "waiting: 2 of 4 slots free, needs 3");
  EXPECT_EQ(decision.reasons.at("small"), "waiting: 1 job ahead, 2 of 4 slots free, needs 1");
}

TEST(PlacementTest, PausesAndImpossibleJobsArePassed) {
  const PlacementDecision decision =
      DecidePlacement(1000, 2, 0,
                      {{.id = "never", .sequence = 1, .slots = 3},
                       {.id = "paused", .sequence = 2, .slots = 2, .not_before_ms = 2500},
                       {.id = "next", .sequence = 3, .slots = 2}});
  EXPECT_THAT(decision.start, ElementsAre("next"));
  EXPECT_THAT(decision.reasons.at("never"), HasSubstr("can never start here"));
  EXPECT_THAT(decision.reasons.at("paused"), HasSubstr("in 2 s"));
}

TEST(PlacementTest, EveryJobStartsOrHasAReason) {
  for (int taken = 0; taken <= 4; ++taken) {
    std::vector<WaitingJob> waiting;
    for (int i = 0; i < 6; ++i) {
      waiting.push_back(
          {.id = std::string(1, static_cast<char>('a' + i)), .priority = i % 2, .sequence = i, .slots = 1 + i});
    }
    const PlacementDecision decision = DecidePlacement(0, 4, taken, waiting);
    EXPECT_EQ(decision.start.size() + decision.reasons.size(), waiting.size());
    int used = taken;
    for (const std::string& id : decision.start) used += 1 + (id[0] - 'a');
    EXPECT_LE(used, 4);
  }
}

TEST(PlacementTest, ThreadsShareTheSlots) {
  EXPECT_EQ(ThreadsPerRank(3, 2, 8), 3);
  EXPECT_EQ(ThreadsPerRank(0, 2, 8), 4);
  EXPECT_EQ(ThreadsPerRank(0, 16, 8), 1);
}

}  // namespace
}  // namespace simpo
