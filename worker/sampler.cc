#include "worker/sampler.h"

#include <algorithm>
#include <numeric>

namespace simpo {
namespace {

// splitmix64 (Steele, Lea, Flood 2014): the same sequence on every platform and library version.
struct SplitMix64 {
  uint64_t state;
  uint64_t operator()() {
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }
};

}  // namespace

BatchSampler::BatchSampler(int64_t num_pairs, int64_t global_batch_size, int64_t seed, bool shuffle)
    : num_pairs_(num_pairs), global_batch_size_(global_batch_size), seed_(seed), shuffle_(shuffle) {}

int64_t BatchSampler::steps_per_epoch() const { return (num_pairs_ + global_batch_size_ - 1) / global_batch_size_; }

std::vector<int64_t> BatchSampler::Batch(int64_t step) {
  const int64_t epoch = step / steps_per_epoch();
  if (epoch != epoch_) {
    epoch_ = epoch;
    order_.resize(num_pairs_);
    std::iota(order_.begin(), order_.end(), 0);
    if (shuffle_) {
      SplitMix64 random{static_cast<uint64_t>(seed_) * 0x9e3779b97f4a7c15ull + static_cast<uint64_t>(epoch)};
      for (int64_t i = num_pairs_ - 1; i > 0; --i) {
        std::swap(order_[i], order_[random() % static_cast<uint64_t>(i + 1)]);
      }
    }
  }
  const int64_t begin = step % steps_per_epoch() * global_batch_size_;
  const int64_t end = std::min(begin + global_batch_size_, num_pairs_);
  return {order_.begin() + begin, order_.begin() + end};
}

double BatchSampler::Epoch(int64_t steps_done) const {
  const int64_t whole = steps_done / steps_per_epoch();
  const int64_t rest = std::min(steps_done % steps_per_epoch() * global_batch_size_, num_pairs_);
  return static_cast<double>(whole) + static_cast<double>(rest) / static_cast<double>(num_pairs_);
}

std::vector<std::vector<int64_t>> BalanceOverRanks(std::span<const int64_t> batch, std::span<const int64_t> tokens,
                                                   int world_size) {
  std::vector<size_t> by_size(batch.size());
  std::iota(by_size.begin(), by_size.end(), 0);
  std::stable_sort(by_size.begin(), by_size.end(), [&](size_t a, size_t b) { return tokens[a] > tokens[b]; });
  std::vector<int64_t> load(world_size, 0);
  std::vector<int> rank_of(batch.size());
  for (size_t i : by_size) {
    const auto rank = std::min_element(load.begin(), load.end()) - load.begin();
    rank_of[i] = static_cast<int>(rank);
    load[rank] += tokens[i];
  }
  std::vector<std::vector<int64_t>> ranks(world_size);
  for (size_t i = 0; i < batch.size(); ++i) ranks[rank_of[i]].push_back(batch[i]);
  return ranks;
}

std::vector<std::vector<int64_t>> MicroBatches(std::span<const int64_t> pairs, std::span<const int64_t> tokens,
                                               int64_t max_tokens, int64_t max_pairs) {
  std::vector<std::vector<int64_t>> micro_batches;
  int64_t filled = 0;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const bool full = micro_batches.empty() || filled + tokens[i] > max_tokens ||
                      (max_pairs > 0 && static_cast<int64_t>(micro_batches.back().size()) >= max_pairs);
    if (full) {
      micro_batches.emplace_back();
      filled = 0;
    }
    micro_batches.back().push_back(pairs[i]);
    filled += tokens[i];
  }
  return micro_batches;
}

std::vector<std::vector<int64_t>> MicroBatchesOfRank(std::span<const int64_t> batch, std::span<const int64_t> tokens,
                                                     int64_t max_tokens, int64_t max_pairs, int rank, int world_size) {
  // Dealt out as positions in the batch, so that each pair keeps its size.
  std::vector<int64_t> positions(batch.size());
  std::iota(positions.begin(), positions.end(), 0);
  std::vector<std::vector<int64_t>> mine;
  size_t most = 0;
  const auto ranks = BalanceOverRanks(positions, tokens, world_size);
  for (int r = 0; r < world_size; ++r) {
    std::vector<int64_t> sizes;
    for (int64_t i : ranks[r]) sizes.push_back(tokens[i]);
    std::vector<std::vector<int64_t>> micro_batches = MicroBatches(ranks[r], sizes, max_tokens, max_pairs);
    most = std::max(most, micro_batches.size());
    if (r == rank) mine = std::move(micro_batches);
  }
  for (std::vector<int64_t>& micro_batch : mine) {
    for (int64_t& item : micro_batch) item = batch[item];
  }
  mine.resize(most);
  return mine;
}

}  // namespace simpo
