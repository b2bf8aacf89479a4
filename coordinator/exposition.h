#ifndef SIMPO_COORDINATOR_EXPOSITION_H_
#define SIMPO_COORDINATOR_EXPOSITION_H_

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "coordinator/dispatcher.h"
#include "coordinator/job_views.h"
#include "coordinator/rpc_stats.h"

namespace simpo {

// Everything that one scrape shows.
struct ExpositionSnapshot {
  int64_t now_ms = 0;  // Unix time
  std::vector<JobViews::View> jobs;
  int64_t keep_ended_ms = 0;  // how long after its end a job is still shown
  Dispatcher::Stats stats;
  RpcStats::Durations rpc_durations;
  int slots_total = 0;
  std::string version;
};

// The families of a snapshot. What is said of a job comes from one picture of it, so all values of a
// split belong to one step. Pure.
std::vector<prometheus::MetricFamily> CollectFamilies(const ExpositionSnapshot& snapshot);

// In the form in which prometheus-cpp collects.
class CoordinatorCollectable final : public prometheus::Collectable {
 public:
  explicit CoordinatorCollectable(std::function<ExpositionSnapshot()> take) : take_(std::move(take)) {}
  std::vector<prometheus::MetricFamily> Collect() const override { return CollectFamilies(take_()); }

 private:
  const std::function<ExpositionSnapshot()> take_;
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_EXPOSITION_H_
