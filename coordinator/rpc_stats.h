#ifndef SIMPO_COORDINATOR_RPC_STATS_H_
#define SIMPO_COORDINATOR_RPC_STATS_H_

#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "coordinator/histogram.h"

namespace simpo {

// How long users' calls took, by method and outcome. Thread-safe.
class RpcStats {
 public:
  using Durations = std::map<std::pair<std::string, std::string>, Histogram>;  // (method, code)

  void Add(const std::string& method, absl::StatusCode code, double seconds) {
    const std::lock_guard lock(mutex_);
    durations_[{method, absl::StatusCodeToString(code)}].Add(seconds);
  }
  Durations Get() const {
    const std::lock_guard lock(mutex_);
    return durations_;
  }

 private:
  mutable std::mutex mutex_;
  Durations durations_;  // guarded by mutex_
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_RPC_STATS_H_
