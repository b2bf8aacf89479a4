#include "worker/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>

namespace simpo {
namespace {

using testing::ElementsAre;
using Pairs = std::vector<int64_t>;

Pairs Epoch(BatchSampler& sampler, int64_t epoch) {
  Pairs all;
  for (int64_t i = 0; i < sampler.steps_per_epoch(); ++i) {
    const Pairs batch = sampler.Batch(epoch * sampler.steps_per_epoch() + i);
    all.insert(all.end(), batch.begin(), batch.end());
  }
  return all;
}

TEST(BatchSampler, TakesRowsInOrderWithoutShuffling) {
  BatchSampler sampler(7, 3, 42, /*shuffle=*/false);
  EXPECT_EQ(sampler.steps_per_epoch(), 3);
  EXPECT_THAT(sampler.Batch(0), ElementsAre(0, 1, 2));
  EXPECT_THAT(sampler.Batch(2), ElementsAre(6));  // the last batch of an epoch is partial
  EXPECT_THAT(sampler.Batch(3), ElementsAre(0, 1, 2));
  EXPECT_DOUBLE_EQ(sampler.Epoch(1), 3.0 / 7);
  EXPECT_DOUBLE_EQ(sampler.Epoch(3), 1);
  EXPECT_DOUBLE_EQ(sampler.Epoch(5), 1 + 6.0 / 7);
}

TEST(BatchSampler, EveryEpochIsAPermutation) {
  BatchSampler sampler(100, 8, 42, /*shuffle=*/true);
  Pairs sorted(100);
  std::iota(sorted.begin(), sorted.end(), 0);
  std::set<Pairs> seen;
  for (int64_t epoch = 0; epoch < 5; ++epoch) {
    Pairs order = Epoch(sampler, epoch);
    seen.insert(order);
    std::sort(order.begin(), order.end());
    EXPECT_EQ(order, sorted);
  }
  EXPECT_EQ(seen.size(), 5u);
}

TEST(BatchSampler, IsAFunctionOfSeedAndStep) {
  BatchSampler forwards(100, 8, 42, true);
  BatchSampler jumping(100, 8, 42, true);
  const Pairs late = jumping.Batch(40);
  const Pairs early = jumping.Batch(3);
  for (int64_t step = 0; step < 40; ++step) {
    const Pairs batch = forwards.Batch(step);
    if (step == 3) {
      EXPECT_EQ(batch, early);
    }
  }
  EXPECT_EQ(forwards.Batch(40), late);
  BatchSampler other(100, 8, 43, true);
  EXPECT_NE(Epoch(other, 0), Epoch(forwards, 0));
}

// A change of these numbers would change every user's run: it must be meant.
TEST(BatchSampler, OrderIsTheSameOnEveryPlatform) {
  BatchSampler sampler(10, 10, 42, true);
  EXPECT_THAT(sampler.Batch(0), ElementsAre(4, 2, 8, 6, 7, 1, 5, 9, 3, 0));
}

TEST(BalanceOverRanks, EveryPairOnceAndLoadsAreClose) {
  Pairs batch(64);
  std::iota(batch.begin(), batch.end(), 1000);
  Pairs tokens;
  for (int64_t i = 0; i < 64; ++i) tokens.push_back(50 + (i * 37) % 400);
  for (const int ranks : {1, 2, 3, 8}) {
    const std::vector<Pairs> plan = BalanceOverRanks(batch, tokens, ranks);
    ASSERT_EQ(plan.size(), static_cast<size_t>(ranks));
    Pairs all;
    Pairs loads;
    for (const Pairs& mine : plan) {
      EXPECT_TRUE(std::is_sorted(mine.begin(), mine.end()));  // in the order of the batch
      all.insert(all.end(), mine.begin(), mine.end());
      loads.push_back(0);
      for (int64_t pair : mine) loads.back() += tokens[pair - 1000];
    }
    std::sort(all.begin(), all.end());
    EXPECT_EQ(all, batch);
    EXPECT_LE(*std::max_element(loads.begin(), loads.end()) - *std::min_element(loads.begin(), loads.end()), 450);
  }
}

TEST(BalanceOverRanks, FewerPairsThanRanksLeavesSomeWithout) {
  const std::vector<Pairs> plan = BalanceOverRanks(Pairs{5}, Pairs{80}, 4);
  EXPECT_EQ(std::count_if(plan.begin(), plan.end(), [](const Pairs& mine) { return mine.empty(); }), 3);
}

TEST(MicroBatches, KeepTheBudgets) {
  const Pairs pairs = {0, 1, 2, 3, 4, 5};
  const Pairs tokens = {40, 50, 20, 200, 30, 30};
  EXPECT_THAT(MicroBatches(pairs, tokens, 100, 0), ElementsAre(Pairs{0, 1}, Pairs{2}, Pairs{3}, Pairs{4, 5}));
  EXPECT_THAT(MicroBatches(pairs, tokens, 1000, 4), ElementsAre(Pairs{0, 1, 2, 3}, Pairs{4, 5}));
  EXPECT_THAT(MicroBatches(pairs, tokens, 1, 0).size(), 6u);
  EXPECT_TRUE(MicroBatches(Pairs{}, Pairs{}, 100, 0).empty());
}

}  // namespace
}  // namespace simpo
