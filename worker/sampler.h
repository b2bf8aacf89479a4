#ifndef SIMPO_WORKER_SAMPLER_H_
#define SIMPO_WORKER_SAMPLER_H_

#include <cstdint>
#include <span>
#include <vector>

namespace simpo {

// Which pairs make up each global batch: every epoch a permutation of all pairs that depends on the
// seed and the epoch alone, cut into consecutive batches, the last one partial. A pure function of
// the step, so a resumed run sees the same batches.
class BatchSampler {
 public:
  BatchSampler(int64_t num_pairs, int64_t global_batch_size, int64_t seed, bool shuffle);
  int64_t steps_per_epoch() const;
  // Pairs of the optimizer step `step` (from 0).
  std::vector<int64_t> Batch(int64_t step);
  // Epochs done after `steps_done` steps, in pairs.
  double Epoch(int64_t steps_done) const;

 private:
  int64_t num_pairs_, global_batch_size_, seed_;
  bool shuffle_;
  int64_t epoch_ = -1;
  std::vector<int64_t> order_;
};

// Deals `batch` out over the ranks so that their token sums are close: longest first, each to the
// rank with the fewest tokens so far. Every rank computes the same plan. Returns each rank's pairs,
// in the order of `batch`. tokens[i] is the size of batch[i].
std::vector<std::vector<int64_t>> BalanceOverRanks(std::span<const int64_t> batch, std::span<const int64_t> tokens,
                                                   int world_size);

// Cuts one rank's pairs into micro-batches of at most max_tokens tokens and max_pairs pairs (0: any
// number); a pair larger than max_tokens stands alone.
std::vector<std::vector<int64_t>> MicroBatches(std::span<const int64_t> pairs, std::span<const int64_t> tokens,
                                               int64_t max_tokens, int64_t max_pairs);

// What `rank` does of `batch`: its micro-batches, with empty ones at the end where another rank has more.
// Every rank gets as many, so that all walk through the same collectives.
std::vector<std::vector<int64_t>> MicroBatchesOfRank(std::span<const int64_t> batch, std::span<const int64_t> tokens,
                                                     int64_t max_tokens, int64_t max_pairs, int rank, int world_size);

}  // namespace simpo

#endif  // SIMPO_WORKER_SAMPLER_H_
