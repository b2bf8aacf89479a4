#include "coordinator/liveness.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

using std::chrono::seconds;
using ::testing::HasSubstr;

constexpr LivenessLimits kLimits{.attach = seconds(100),
                                 .heartbeat = seconds(30),
                                 .load = seconds(500),
                                 .step = seconds(200),
                                 .eval = seconds(300),
                                 .checkpoint = seconds(400),
                                 .exit = seconds(60),
                                 .stalled = seconds(30)};
const SteadyTime kStart = SteadyTime(seconds(1000));

TEST(LivenessTest, NothingIsAskedBeforeTheGangStarts) {
  EXPECT_FALSE(FindHungRank(kStart + seconds(9999), std::nullopt, {RankHealth{}}, kLimits));
}

TEST(LivenessTest, ARankThatNeverComes) {
  const std::vector<RankHealth> ranks = {{.attached = true, .last_heard = kStart + seconds(99)}, {}};
  EXPECT_FALSE(FindHungRank(kStart + seconds(100), kStart, ranks, kLimits));
  EXPECT_THAT(FindHungRank(kStart + seconds(101), kStart, ranks, kLimits)->why,
              ::testing::ContainsRegex("rank 1 did not report .*--rank -1"));
}

TEST(LivenessTest, ARankThatFallsSilent) {
  const std::vector<RankHealth> ranks = {{.attached = true, .last_heard = kStart + seconds(50)},
                                         {.attached = true, .last_heard = kStart + seconds(20)}};
  EXPECT_FALSE(FindHungRank(kStart + seconds(50), kStart, ranks, kLimits));
  const auto hung = FindHungRank(kStart + seconds(51), kStart, ranks, kLimits);
  EXPECT_THAT(hung->why, HasSubstr("rank 1 has been silent for 31 s"));
  EXPECT_TRUE(hung->of_machine) << "it may be fine, but cannot be heard";
}

TEST(LivenessTest, AFinishedRankMayBeSilentButTheGangMustEnd) {
  std::vector<RankHealth> ranks = {{.attached = true, .finished = true, .last_heard = kStart + seconds(10)},
                                   {.attached = true, .last_heard = kStart + seconds(100)}};
  EXPECT_FALSE(FindHungRank(kStart + seconds(110), kStart, ranks, kLimits));
  ranks[1].finished = true;
  EXPECT_FALSE(FindHungRank(kStart + seconds(160), kStart, ranks, kLimits));
  EXPECT_THAT(FindHungRank(kStart + seconds(161), kStart, ranks, kLimits)->why, HasSubstr("did not end within 60 s"));
}

// Ranks that were heard at each second, and said the same each time.
class RanksTest : public ::testing::Test {
 protected:
  // One that is in collective `number`, waiting for it, or not.
  void Beat(size_t rank, const std::string& phase, int64_t step, int64_t number, double waiting_s, int64_t moves = 0) {
    if (ranks_.size() <= rank) ranks_.resize(rank + 1);
    RankHealth& health = ranks_[rank];
    health.attached = true;
    health.last_heard = now_;
    health.hostname = absl::StrCat("host-", rank);
    v1::Heartbeat heartbeat;
    heartbeat.set_phase(phase);
    heartbeat.set_step(step);
    heartbeat.set_moves(moves);
    heartbeat.set_last_step_seconds(step_seconds_);
    heartbeat.set_last_step_wait_seconds(wait_seconds_);
    if (number > 0) {
      v1::LastCollective& last = *heartbeat.mutable_collective();
      last.set_number(number);
      last.set_verb("all-reduce");
      last.set_bytes(64);
      last.set_waiting_seconds(waiting_s);
    }
    TakeHeartbeat(heartbeat, now_, &health);
  }
  std::optional<HungRank> Hung() const { return FindHungRank(now_, kStart, ranks_, kLimits); }

  SteadyTime now_ = kStart;
  std::vector<RankHealth> ranks_;
  double step_seconds_ = 1, wait_seconds_ = 0;
};

TEST_F(RanksTest, TheRankThatTheOthersWaitForIsNamed) {
  for (int second = 0; second <= 201; ++second) {
    Beat(0, "train", 12, 46, second);
    Beat(1, "train", 12, 45, 0);
    Beat(2, "train", 12, 46, second);
    if (second == 30) {
      EXPECT_FALSE(FindStalledRank(now_, ranks_, kLimits));
    }
    if (second == 31) {
      EXPECT_EQ(FindStalledRank(now_, ranks_, kLimits),
                "rank 1 (host-1) has not got on for 31 s (limit 30 s): it is in train after step 12, not waiting since "
                "all-reduce 45 (64 bytes); 2 ranks wait for it in all-reduce 46 (64 bytes)");
    }
    if (second == 200) {
      EXPECT_FALSE(Hung());
    }
    if (second < 201) now_ += seconds(1);
  }
  ASSERT_TRUE(Hung());
  EXPECT_THAT(Hung()->why, HasSubstr("rank 1 (host-1) has not got on for 201 s (limit 200 s)"));
  EXPECT_FALSE(Hung()->of_machine);
}

TEST_F(RanksTest, WhereAllWaitTheNetworkIsSuspected) {
  for (int second = 0; second <= 201; ++second) {
    for (size_t rank : {0, 1}) Beat(rank, "train", 3, 9, second + 0.5);
    now_ += seconds(1);
  }
  EXPECT_THAT(Hung()->why, HasSubstr("waiting for all-reduce 9 (64 bytes) for 202 s; all ranks wait, so the network"));
}

TEST_F(RanksTest, ARankThatWaitsForWhatIsOverForTheOthersIsNamed) {
  for (int second = 0; second <= 201; ++second) {
    Beat(0, "train", 3, 12, second + 0.5);
    Beat(1, "train", 3, 9, second + 0.5);
    now_ += seconds(1);
  }
  EXPECT_THAT(Hung()->why, HasSubstr("rank 1 (host-1) has not got on for 202 s"));
  EXPECT_THAT(Hung()->why, HasSubstr("waiting for all-reduce 9 (64 bytes) for 202 s; rank 0 (host-0) waits for it in "
                                     "all-reduce 12 (64 bytes)"));
}

TEST_F(RanksTest, ARankThatGetsOnIsNotHungHoweverLongTheOthersWait) {
  for (int second = 0; second <= 1000; ++second) {
    Beat(0, "eval", 12, 46, second);
    Beat(1, "eval", 12, 45, 0, /*moves=*/second / 20);  // a micro-batch each 20 s
    now_ += seconds(1);
    EXPECT_FALSE(Hung());
    EXPECT_FALSE(FindStalledRank(now_, ranks_, kLimits));
  }
}

TEST_F(RanksTest, EachPhaseHasItsLimit) {
  for (const auto& [phase, limit] : {std::pair("load", 500), std::pair("train", 200), std::pair("eval", 300),
                                     std::pair("checkpoint", 400), std::pair("export", 400)}) {
    now_ = kStart;
    ranks_.clear();
    Beat(0, phase, 1, 0, 0);
    for (int second = 0; second < limit; ++second) {
      now_ += seconds(1);
      Beat(0, phase, 1, 0, 0);
    }
    EXPECT_FALSE(Hung()) << phase;
    now_ += seconds(1);
    EXPECT_TRUE(Hung()) << phase;
    EXPECT_THAT(Hung()->why, HasSubstr(absl::StrCat("(limit ", limit, " s): it is in ", phase)));
  }
}

TEST_F(RanksTest, SlowStepsAreNoStall) {
  step_seconds_ = 60;
  Beat(0, "train", 5, 0, 0);
  for (int second = 0; second < 290; second += 10) {
    now_ += seconds(10);
    Beat(0, "train", 5, 0, 0);
    EXPECT_FALSE(FindStalledRank(now_, ranks_, kLimits)) << second;
  }
  now_ += seconds(11);
  EXPECT_TRUE(FindStalledRank(now_, ranks_, kLimits));
}

TEST_F(RanksTest, ASilentRankIsNamedWithWhatItWasIn) {
  Beat(0, "train", 12, 46, 1);
  Beat(1, "train", 12, 45, 0);
  now_ += seconds(31);
  Beat(0, "train", 12, 46, 31);
  EXPECT_THAT(Hung()->why,
              HasSubstr("rank 1 (host-1) has been silent for 31 s (limit 30 s); it was last in train after "
                        "step 12, not waiting since all-reduce 45"));
}

TEST_F(RanksTest, AStragglerIsNamedOnceItIsSure) {
  for (int step = 1; step <= 20; ++step) {
    EXPECT_FALSE(FindStraggler(ranks_)) << step;
    for (size_t rank = 0; rank < 4; ++rank) {
      wait_seconds_ = rank == 2 ? 0.01 : 0.51;  // of a second
      Beat(rank, "train", step, step, 0);
    }
  }
  const auto straggler = FindStraggler(ranks_);
  ASSERT_TRUE(straggler);
  EXPECT_EQ(straggler->rank, 2);
  EXPECT_THAT(straggler->text, HasSubstr("rank 2 (host-2) holds the others up: it is busy for 0.99 s of a step, the "
                                         "others for 0.49 s"));
}

TEST_F(RanksTest, RanksThatDifferALittleAreNoStragglers) {
  for (int step = 1; step <= 50; ++step) {
    for (size_t rank = 0; rank < 4; ++rank) {
      wait_seconds_ = 0.1 * static_cast<double>(rank);
      Beat(rank, "train", step, step, 0);
    }
  }
  EXPECT_FALSE(FindStraggler(ranks_)) << "1.0 s and 0.8 s";
}

}  // namespace
}  // namespace simpo
