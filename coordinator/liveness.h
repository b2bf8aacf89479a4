#ifndef SIMPO_COORDINATOR_LIVENESS_H_
#define SIMPO_COORDINATOR_LIVENESS_H_

#include <chrono>
#include <optional>
#include <string>
#include <vector>

namespace simpo {

using SteadyTime = std::chrono::steady_clock::time_point;

// What was heard of one rank.
struct RankHealth {
  bool attached = false;    // has said hello to this coordinator, or had to an earlier one
  bool finished = false;    // has said that it is done
  SteadyTime last_heard{};  // of the hello, a heartbeat or a report
};

struct LivenessLimits {
  std::chrono::milliseconds attach{600'000};    // from the gang's start to a rank's hello
  std::chrono::milliseconds heartbeat{30'000};  // between two signs of life
  std::chrono::milliseconds exit{60'000};       // from the last rank's `finished` to the gang's end
};

// Why a gang must be ended, or nothing when it may go on. A broken connection alone is no reason:
// only silence beyond the limit is. `gang_started`: when mpirun was started; empty while the job is
// still being prepared. Pure.
std::optional<std::string> FindHungRank(SteadyTime now, std::optional<SteadyTime> gang_started,
                                        const std::vector<RankHealth>& ranks, const LivenessLimits& limits);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_LIVENESS_H_
