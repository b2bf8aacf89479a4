#include "coordinator/placement.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

// A scheduler whose jobs are spoken of by letters.
class PlacementTest : public ::testing::Test {
 protected:
  void Nodes(const std::vector<int>& slots) {
    for (int count : slots) {
      options_.nodes.push_back({.name = absl::StrCat("n", options_.nodes.size() + 1), .slots = count});
    }
    scheduler_.emplace(options_);
  }
  void Wait(char id, GangShape shape, int priority = 0, int64_t limit_s = 0, JobOwner owner = {}) {
    scheduler_->Wait({.sequence = ++sequence_,
                      .id = std::string(1, id),
                      .owner = std::move(owner),
                      .priority = priority,
                      .shape = shape,
                      .time_left_ms = limit_s * 1000,
                      .waiting_since_ms = now_s_ * 1000});
    sequences_[id] = sequence_;
  }
  void Wait(char id, int slots, int priority = 0, int64_t limit_s = 0, JobOwner owner = {}) {
    Wait(id, GangShape{1, slots}, priority, limit_s, std::move(owner));
  }
  void End(char id) { scheduler_->Remove(sequences_[id]); }
  char IdOf(int64_t sequence) const {
    for (const auto& [id, known] : sequences_) {
      if (known == sequence) return id;
    }
    return '?';
  }
  // What starts, then "!" and who is asked to leave.
  std::string Decide(int64_t now_s = -1) {
    if (now_s >= 0) now_s_ = now_s;
    const PlacementDecision decision = scheduler_->Decide(now_s_ * 1000);
    std::string text;
    for (const auto& start : decision.start) text += IdOf(start.sequence);
    for (const auto& preemption : decision.preempt) text += std::string("!") + IdOf(preemption.victim);
    return text;
  }
  std::string Why(char id) {
    std::string text;
    scheduler_->Explain(now_s_ * 1000, 1000, 1, 0, [&](int64_t sequence, std::string reason) {
      if (IdOf(sequence) == id) text = reason;
    });
    return text;
  }

  Scheduler::Options options_;
  std::optional<Scheduler> scheduler_;
  int64_t now_s_ = 1'000'000;
  int64_t sequence_ = 0;
  std::map<char, int64_t> sequences_;
};

TEST_F(PlacementTest, ManyThatMayNotStartAreNoReasonNotToLookFurther) {
  options_.user_quotas = {{"over", 1}};
  Nodes({4});
  Wait('r', 1, /*priority=*/9, /*limit_s=*/100, {.user = "over"});
  EXPECT_EQ(Decide(), "r");
  Wait('h', 4, /*priority=*/9);
  for (int i = 0; i < 1'500; ++i) Wait('q', 1, /*priority=*/5, /*limit_s=*/1, {.user = "over"});
  for (int i = 0; i < 1'500; ++i) {
    scheduler_->Wait({.sequence = ++sequence_,
                      .priority = 5,
                      .shape = {1, 1},
                      .time_left_ms = 1'000,
                      .waiting_since_ms = now_s_ * 1000,
                      .not_before_ms = (now_s_ + 60) * 1000});
  }
  Wait('s', 1, /*priority=*/0, /*limit_s=*/10);
  EXPECT_EQ(Decide(), "s");
}

TEST_F(PlacementTest, PriorityThenAge) {
  Nodes({8});
  Wait('o', 2);
  Wait('n', 2);
  Wait('u', 2, /*priority=*/5);
  EXPECT_EQ(Decide(), "uon");
  EXPECT_EQ(scheduler_->cluster().slots_free(), 2);
  EXPECT_EQ(Decide(), "") << "what has started does not start again";
}

TEST_F(PlacementTest, AllSlotsOrNoneWithPlaceAndReason) {
  Nodes({4});
  Wait('r', 3);
  EXPECT_EQ(Decide(), "r");
  Wait('b', 4);
  Wait('c', 2);
  Wait('d', 1);
  EXPECT_EQ(Decide(), "");
  EXPECT_EQ(Why('b'), "waiting: 1st of 3 in the queue; 1 of 4 slots free, needs 4");
  EXPECT_EQ(Why('c'), "waiting: 2nd of 3 in the queue, behind b; 1 of 4 slots free, needs 2");
  EXPECT_EQ(Why('d'),
            "waiting: 3rd of 3 in the queue, behind b and 1 more; 1 of 4 slots free, needs 1; they are kept for b");
}

TEST_F(PlacementTest, PausesAndImpossibleJobsArePassed) {
  Nodes({2});
  Wait('n', 3);
  scheduler_->Wait({.sequence = 90, .id = "paused", .shape = {1, 2}, .not_before_ms = now_s_ * 1000 + 1500});
  sequences_['p'] = 90;
  Wait('o', 2);
  EXPECT_EQ(Decide(), "o");
  EXPECT_THAT(Why('n'), HasSubstr("can never start here: it needs 3 slots and this coordinator has 2"));
  EXPECT_THAT(Why('p'), HasSubstr("in 2 s"));
  EXPECT_EQ(scheduler_->in_line(), 1) << "what never starts is not in line";
}

TEST_F(PlacementTest, AGangSpansNodesAllOrNone) {
  Nodes({4, 4, 2});
  Wait('a', {2, 3});
  Wait('b', {2, 2});
  EXPECT_EQ(Decide(), "a");
  EXPECT_EQ(Why('b'), "waiting: 1st of 1 in the queue; 2 slots are free on 1 of 3 nodes, needs 2");
  Wait('c', 3);
  EXPECT_EQ(Decide(), "");
  EXPECT_THAT(Why('c'), HasSubstr("4 of 10 slots free, at most 2 on one node, needs 3"));
  Wait('d', {3, 4});
  Decide();
  EXPECT_THAT(Why('d'),
              HasSubstr("can never start here: it needs 4 slots on each of 3 nodes, and 2 of 3 nodes have as many"));
  End('a');
  EXPECT_EQ(Decide(), "bc");
}

TEST_F(PlacementTest, SmallGangsFillTheFullestNode) {
  Nodes({4, 4});
  Wait('a', 3);
  Wait('b', 1);
  Wait('c', 4);
  EXPECT_EQ(Decide(), "abc");
}

TEST_F(PlacementTest, BackfillWithinTheTimeThatTheHeadMustWait) {
  Nodes({4});
  Wait('r', 3, 0, /*limit_s=*/100);
  EXPECT_EQ(Decide(), "r");
  Wait('h', 4);
  Wait('l', 1, 0, 101);
  Wait('e', 1);
  Wait('s', 1, 0, 100);
  EXPECT_EQ(Decide(), "s") << "l would end too late, e has no limit";
  EXPECT_THAT(Why('h'), HasSubstr("time limits make room for it by "));
  EXPECT_THAT(Why('l'), HasSubstr("behind h"));
}

TEST_F(PlacementTest, BackfillOfLongJobsIntoWhatTheHeadLeaves) {
  Nodes({6});
  Wait('r', 4, 0, 100);
  EXPECT_EQ(Decide(), "r");
  Wait('h', 5);
  Wait('a', 2);
  Wait('b', 1);
  Wait('c', 1);
  EXPECT_EQ(Decide(), "b") << "of 6 the head takes 5: one is left, not two";
}

// Without limits any set of gangs may end next.
TEST_F(PlacementTest, BackfillBesideEndlessJobsOnlyIntoWhatTheHeadCannotUse) {
  Nodes({8});
  Wait('r', 4);
  EXPECT_EQ(Decide(), "r");
  Wait('h', 6);
  Wait('a', 2);
  Wait('b', 1);
  EXPECT_EQ(Decide(), "a") << "when r ends, 8 are free and h takes 6";
  End('a');
  End('h');
  End('b');
  End('r');
  Wait('x', 2);
  Wait('y', 2);
  EXPECT_EQ(Decide(), "xy");
  Wait('h', 6);
  Wait('a', 1);
  EXPECT_EQ(Decide(), "") << "the end of x or of y alone would be enough for h, and is not with a";
  // A node that is too small for the head is free to use.
  options_.nodes.clear();
  Nodes({8, 2});
  Wait('x', 8);
  EXPECT_EQ(Decide(), "x");
  Wait('h', 8);
  Wait('a', 2);
  EXPECT_EQ(Decide(), "a");
}

// The promise of back-fill, against what would happen without it: the head never starts later.
TEST_F(PlacementTest, BackfillNeverDelaysTheHead) {
  std::mt19937 random(7);
  const auto draw = [&](int from, int to) { return std::uniform_int_distribution<int>(from, to)(random); };
  for (int round = 0; round < 400; ++round) {
    const std::vector<int> sizes = {draw(2, 8), draw(2, 8), draw(2, 8)};
    struct Job {
      GangShape shape;
      int64_t limit_s;
      int64_t runs_s;
    };
    std::vector<Job> jobs;
    constexpr int kRunning = 4;  // come first; then the head, then those that may pass it
    // The head's time is a promise where limits are kept to the second, or where there are none.
    const bool limits = round % 2 == 0;
    for (int i = 0; i < 12; ++i) {
      const int runs_s = draw(1, 60);
      const bool limited = i < kRunning ? limits : draw(0, 1) == 0;
      jobs.push_back({{draw(1, 2), draw(1, 4)}, limited ? runs_s : 0, runs_s});
    }
    const auto start_of_head = [&](bool with_others) -> int64_t {
      Scheduler::Options options;
      options.starvation_ms = 0;
      for (int slots : sizes) options.nodes.push_back({.name = absl::StrCat(options.nodes.size()), .slots = slots});
      Scheduler scheduler(options);
      std::map<int64_t, int64_t> ends;  // by sequence
      for (int64_t now = 0; now < 400; ++now) {
        for (auto end = ends.begin(); end != ends.end();) {
          if (end->second > now) {
            ++end;
            continue;
          }
          scheduler.Remove(end->first);
          end = ends.erase(end);
        }
        const auto wait = [&](int i) {
          scheduler.Wait(
              {.sequence = i, .id = absl::StrCat(i), .shape = jobs[i].shape, .time_left_ms = jobs[i].limit_s * 1000});
        };
        if (now == 0) {
          for (int i = 0; i < kRunning; ++i) wait(i);
        }
        if (now == 1) wait(kRunning);
        if (now == 2 && with_others) {
          for (size_t i = kRunning + 1; i < jobs.size(); ++i) wait(static_cast<int>(i));
        }
        for (const auto& start : scheduler.Decide(now * 1000).start) {
          if (start.sequence == kRunning) return now;
          ends[start.sequence] = now + jobs[start.sequence].runs_s;
        }
        for (int i = 0; now == 0 && i < kRunning; ++i) {
          if (!ends.contains(i)) scheduler.Remove(i);
        }
      }
      return -1;
    };
    const int64_t alone = start_of_head(false);
    EXPECT_LE(start_of_head(true), alone) << "round " << round;
  }
}

TEST_F(PlacementTest, Quotas) {
  options_.user_quotas = {{"alice", 3}, {"*", 2}};
  options_.label_quotas = {{"team=red", 4}};
  Nodes({16});
  Wait('a', 2, 0, 0, {.user = "alice"});
  Wait('b', 2, 0, 0, {.user = "alice"});
  Wait('c', 2, 0, 0, {.user = "bob", .labels = {{"team", "red"}}});
  Wait('d', 1, 0, 0, {.user = "bob"});
  Wait('e', 2, 0, 0, {.user = "carol", .labels = {{"team", "red"}}});
  Wait('f', 1, 0, 0, {.user = "dan", .labels = {{"team", "red"}}});
  EXPECT_EQ(Decide(), "ace") << "who is over a quota is passed, and keeps nobody waiting";
  EXPECT_THAT(Why('b'), HasSubstr("1st of 3 in the queue; user alice has 2 of at most 3 slots, needs 2"));
  EXPECT_THAT(Why('d'), HasSubstr("user bob has 2 of at most 2 slots, needs 1"));
  EXPECT_THAT(Why('f'), HasSubstr("label team=red has 4 of at most 4 slots, needs 1"));
  Wait('g', 4, 0, 0, {.user = "alice"});
  EXPECT_THAT(Why('g'), HasSubstr("can never start here: it needs 4 slots, and user alice may have 3 at a time"));
  End('a');
  End('e');
  EXPECT_EQ(Decide(), "bf");
}

TEST_F(PlacementTest, PreemptionTakesTheFewestAndYoungestOfTheLowestPriority) {
  options_.preemption = true;
  Nodes({4});
  Wait('a', 1, 1);
  Wait('b', 1, 0);
  EXPECT_EQ(Decide(0), "ab");
  Wait('c', 1, 0);
  Wait('d', 1, 2);
  EXPECT_EQ(Decide(10), "dc");
  Wait('h', 1, 5);
  EXPECT_EQ(Decide(20), "!c") << "priority 0, the younger of both";
  EXPECT_THAT(Why('h'), HasSubstr("job c is making room for it"));
  EXPECT_EQ(Decide(21), "") << "room is coming; nobody else has to leave";
  End('c');
  EXPECT_EQ(Decide(22), "h");
  Wait('g', 2, 5);
  EXPECT_EQ(Decide(23), "!b!a") << "the two lowest levels are needed";
}

TEST_F(PlacementTest, PreemptionPrefersOneLargeVictimToManySmall) {
  options_.preemption = true;
  Nodes({6});
  Wait('a', 3);
  Wait('b', 1);
  Wait('c', 1);
  Wait('d', 1);
  EXPECT_EQ(Decide(0), "abcd");
  Wait('h', 3, 1);
  EXPECT_EQ(Decide(1), "!a");
  End('a');
  EXPECT_EQ(Decide(2), "h");
  Wait('g', 4, 1);
  EXPECT_EQ(Decide(3), "") << "b, c and d are 3 slots: leaving would not help";
}

TEST_F(PlacementTest, PreemptionNeverForEqualPriorityAndNeverWithoutLeave) {
  options_.preemption = true;
  Nodes({2});
  Wait('a', 2, 3);
  EXPECT_EQ(Decide(), "a");
  Wait('b', 2, 3);
  EXPECT_EQ(Decide(), "");
  options_.preemption = false;
  options_.nodes.clear();
  Nodes({2});
  Wait('a', 2);
  EXPECT_EQ(Decide(), "a");
  Wait('b', 2, 9);
  EXPECT_EQ(Decide(), "");
}

TEST_F(PlacementTest, PreemptionOverSeveralNodes) {
  options_.preemption = true;
  Nodes({2, 2, 2});
  Wait('w', {2, 2}, 0);
  Wait('x', 1, 1);
  Wait('y', 1, 1);
  EXPECT_EQ(Decide(0), "xyw");
  Wait('h', {2, 2}, 5);
  EXPECT_EQ(Decide(1), "!w") << "one gang on two nodes rather than two and a half";
  options_.nodes.clear();
  Nodes({4, 2});
  Wait('w', {2, 2});
  EXPECT_EQ(Decide(2), "w");
  Wait('a', 2);
  EXPECT_EQ(Decide(3), "a");
  Wait('h', {2, 2}, 5);
  EXPECT_EQ(Decide(4), "!w") << "a is the younger on its node, but w must go from the other and is enough";
}

TEST_F(PlacementTest, NobodyIsLetInToBeSentAway) {
  options_.preemption = true;
  Nodes({4});
  Wait('a', 3);
  EXPECT_EQ(Decide(0), "a");
  Wait('h', 4, 5);
  Wait('b', 1, 0, /*limit_s=*/1);
  EXPECT_EQ(Decide(1), "!a") << "b would be in the way of h";
  EXPECT_EQ(Decide(2), "");
  End('a');
  EXPECT_EQ(Decide(3), "h");
}

TEST_F(PlacementTest, WhoWaitsLongHasItsTurn) {
  options_.starvation_ms = 60'000;
  options_.preemption = true;
  Nodes({1});
  Wait('r', 1, 10);
  EXPECT_EQ(Decide(0), "r");
  now_s_ = 0;
  Wait('l', 1, 0);
  EXPECT_EQ(Decide(1), "");
  now_s_ = 230;  // just younger than four periods of l: 7 < 10
  Wait('m', 1, 10);
  End('r');
  EXPECT_EQ(Decide(), "m");
  Wait('n', 1, 10);
  EXPECT_EQ(Decide(241), "") << "l has 15 now";
  EXPECT_THAT(Why('l'), HasSubstr("1st of 2 in the queue, priority raised by 15 for its long wait"));
  EXPECT_THAT(Why('n'), HasSubstr("2nd of 2 in the queue, behind l"));
  End('m');
  EXPECT_EQ(Decide(242), "l");
  EXPECT_EQ(Decide(243), "") << "what has started by its wait is not pre-empted by those that it has passed";
}

TEST_F(PlacementTest, NodesGoAndComeBack) {
  Nodes({2, 2});
  Wait('a', 2);
  EXPECT_EQ(Decide(), "a");
  EXPECT_FALSE(scheduler_->SetNodeUp("n9", false));
  EXPECT_TRUE(scheduler_->SetNodeUp("n1", false));
  EXPECT_TRUE(scheduler_->SetNodeUp("n2", false));
  EXPECT_EQ(scheduler_->cluster().slots_total(), 0);
  Wait('b', {2, 2});
  Wait('c', 1);
  EXPECT_EQ(Decide(), "");
  EXPECT_THAT(Why('b'), HasSubstr("nodes that are large enough are down"));
  End('a');
  EXPECT_TRUE(scheduler_->SetNodeUp("n2", true));
  EXPECT_EQ(Decide(), "c") << "a job whose nodes are down keeps nothing from others";
  End('c');
  EXPECT_TRUE(scheduler_->SetNodeUp("n1", true));
  EXPECT_EQ(Decide(), "b");
}

// Random stories: slots are never given twice, and every job starts or has a reason.
TEST_F(PlacementTest, SlotsAreNeverGivenTwice) {
  std::mt19937 random(3);
  const auto draw = [&](int from, int to) { return std::uniform_int_distribution<int>(from, to)(random); };
  for (int round = 0; round < 50; ++round) {
    Scheduler::Options options;
    options.preemption = round % 2 == 0;
    options.starvation_ms = 5'000;
    options.user_quotas = {{"*", 9}};
    for (int i = 0; i < 4; ++i) options.nodes.push_back({.name = absl::StrCat(i), .slots = draw(1, 6)});
    Scheduler scheduler(options);
    std::set<int64_t> waiting, running;
    for (int64_t step = 1; step < 200; ++step) {
      if (draw(0, 1) == 0) {
        scheduler.Wait({.sequence = step,
                        .id = absl::StrCat(step),
                        .owner = {.user = absl::StrCat("u", draw(0, 2))},
                        .priority = draw(0, 3),
                        .shape = {draw(1, 3), draw(1, 6)},
                        .time_left_ms = draw(0, 1) * draw(1, 20) * 1000,
                        .waiting_since_ms = step * 1000});
        waiting.insert(step);
      }
      if (draw(0, 3) == 0 && !running.empty()) {
        scheduler.Remove(*running.begin());
        running.erase(running.begin());
      }
      if (draw(0, 20) == 0) scheduler.SetNodeUp(absl::StrCat(draw(0, 3)), draw(0, 2) > 0);
      const PlacementDecision decision = scheduler.Decide(step * 1000);
      for (const auto& start : decision.start) {
        EXPECT_EQ(waiting.erase(start.sequence), 1u);
        running.insert(start.sequence);
        std::set<int> nodes;
        for (const NodeShare& share : start.where) nodes.insert(share.node);
        EXPECT_EQ(nodes.size(), start.where.size()) << "each part of a gang has a node of its own";
      }
      for (const auto& [victim, winner] : decision.preempt) {
        EXPECT_TRUE(running.contains(victim));
        EXPECT_TRUE(waiting.contains(winner));
        scheduler.Remove(victim);
        running.erase(victim);
      }
      int taken = 0;
      for (size_t node = 0; node < options.nodes.size(); ++node) {
        const int free = scheduler.cluster().free(static_cast<int>(node));
        ASSERT_GE(free, 0);
        taken += options.nodes[node].slots - free;
      }
      int held = 0;
      for (const auto& [sequence, job] : scheduler.cluster().running()) {
        for (const NodeShare& share : job.where) held += share.slots;
      }
      ASSERT_EQ(taken, held);
      std::set<int64_t> told;
      scheduler.Explain(step * 1000, 1000, 1, 0, [&](int64_t sequence, std::string reason) {
        EXPECT_THAT(reason, Not(IsEmpty()));
        told.insert(sequence);
      });
      for (int64_t sequence : told) EXPECT_TRUE(waiting.contains(sequence));
      EXPECT_GE(told.size(), static_cast<size_t>(scheduler.in_line()));
    }
  }
}

TEST(ThreadsPerRankTest, ThreadsShareTheSlots) {
  EXPECT_EQ(ThreadsPerRank(3, 2, 8), 3);
  EXPECT_EQ(ThreadsPerRank(0, 2, 8), 4);
  EXPECT_EQ(ThreadsPerRank(0, 16, 8), 1);
}

}  // namespace
}  // namespace simpo
