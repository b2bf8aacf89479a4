#ifndef SIMPO_WORKER_ADVICE_H_
#define SIMPO_WORKER_ADVICE_H_

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "common/job_config.h"
#include "worker/model/model_config.h"
#include "worker/shard/sharded_params.h"

namespace simpo {

// What an experienced user would say while a run goes on. Decides from the job and the metrics alone.
// Each piece of advice is given once.
class Advisor {
 public:
  Advisor(const JobConfig& config, int64_t total_steps);

  // What can be said before the first step.
  std::vector<std::string> BeforeTraining();
  // After step `step` (from 1) with its training metrics.
  std::vector<std::string> AfterStep(int64_t step, const std::map<std::string, double>& metrics);

  // For a checkpoint: what the run began with and what has been said, as numbers.
  std::map<std::string, double> State() const;
  void Restore(const std::map<std::string, double>& state);

 private:
  // Means over a window of steps.
  struct Means {
    double loss = 0, logps_chosen = 0, logps_rejected = 0, margin = 0;
  };
  Means RecentMeans() const;
  std::optional<std::string> Divergence(const Means& now) const;
  std::optional<std::string> Forgetting(const Means& now) const;
  std::optional<std::string> FlatMargin(const Means& now) const;

  const JobConfig& config_;
  const int64_t total_steps_;
  const int64_t warmup_steps_;
  std::optional<Means> start_;  // of the first window
  std::deque<Means> recent_;
  std::set<std::string> said_;
};

// Bytes of the tensors of one rank, by the formulas of docs/architecture.md; activations come on top.
struct MemoryNeed {
  double weights = 0, grads = 0, optimizer = 0;  // held throughout
  double in_flight = 0;                          // weights and gradients of the two largest buckets under way
  // Where they are: with offload, gradients and optimizer state are on the host whatever the device.
  double on_device = 0, on_host = 0;
  double total() const { return weights + grads + optimizer + in_flight; }
};
MemoryNeed EstimateMemory(const ModelConfig& model, const ShardingOptions& sharding, int world_size);

// Nothing when `ranks_here` ranks fit into `bytes` of host memory; else the numbers, and what to change.
std::optional<std::string> MemoryAdvice(const MemoryNeed& need, const ShardingOptions& sharding, int ranks_here,
                                        double bytes);

}  // namespace simpo

#endif  // SIMPO_WORKER_ADVICE_H_
