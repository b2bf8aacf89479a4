#ifndef SIMPO_COORDINATOR_LIVENESS_H_
#define SIMPO_COORDINATOR_LIVENESS_H_

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "simpo/v1/worker_service.pb.h"

namespace simpo {

using SteadyTime = std::chrono::steady_clock::time_point;

// What was heard of one rank.
struct RankHealth {
  bool attached = false;    // has said hello to this coordinator, or had to an earlier one
  bool finished = false;    // has said that it is done
  SteadyTime last_heard{};  // of the hello, a heartbeat or a report
  std::string hostname;     // of the hello
  v1::Heartbeat heartbeat;  // the last one
  SteadyTime last_moved{};  // when it was heard last that the rank had got on
  double busy_seconds = 0;  // of a step, without waiting for other ranks, over the latest ones; 0: not known
  int steps_heard = 0;      // that busy_seconds comes from
};

// Takes in what a heartbeat says.
void TakeHeartbeat(const v1::Heartbeat& heartbeat, SteadyTime now, RankHealth* health);

// How long a rank may take before its gang is ended. The phases are those of the heartbeats; within one,
// the time runs since the rank last got on: finished a micro-batch, a tensor, a collective, a step.
struct LivenessLimits {
  std::chrono::milliseconds prepare{21'600'000};    // downloads and the token cache, before the ranks start
  std::chrono::milliseconds attach{600'000};        // from the gang's start to a rank's hello
  std::chrono::milliseconds heartbeat{30'000};      // between two signs of life
  std::chrono::milliseconds load{1'800'000};        // phase load
  std::chrono::milliseconds step{1'800'000};        // phase train
  std::chrono::milliseconds eval{1'800'000};        // phase eval
  std::chrono::milliseconds checkpoint{1'800'000};  // phases checkpoint and export
  std::chrono::milliseconds exit{60'000};           // from the last rank's `finished` to the gang's end
  std::chrono::milliseconds stalled{30'000};        // without getting on before users are told, in train and eval
};

// Why a gang must be ended.
struct HungRank {
  std::string why;
  bool of_machine = false;  // the rank may be fine, but cannot be heard
};

// Nothing when the gang may go on. A broken connection alone is no reason to end it: only silence beyond
// the limit is. `gang_started`: when mpirun was started; empty while the job is still being prepared. Pure.
std::optional<HungRank> FindHungRank(SteadyTime now, std::optional<SteadyTime> gang_started,
                                     const std::vector<RankHealth>& ranks, const LivenessLimits& limits);

// Which rank keeps the others from getting on, while that is not yet a reason to end the gang. Where
// steps are slow it takes longer until this says something. Pure.
std::optional<std::string> FindStalledRank(SteadyTime now, const std::vector<RankHealth>& ranks,
                                           const LivenessLimits& limits);

// A rank that the others wait for in every step: it has been busy for much longer than the median of the
// others over the latest steps.
struct Straggler {
  int rank = 0;
  std::string text;
};
std::optional<Straggler> FindStraggler(const std::vector<RankHealth>& ranks);

// "waiting for all-reduce 845 (4096 bytes) for 31 s". Empty: there was none yet.
std::string DescribeCollective(const v1::Heartbeat& heartbeat);
// "rank 3 (host-b)".
std::string NameRank(size_t rank, const RankHealth& health);
// "in train after step 12, waiting for all-reduce 845 (4096 bytes) for 31 s". Empty: nothing was heard.
std::string DescribeRank(const RankHealth& health);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_LIVENESS_H_
