#ifndef SIMPO_COORDINATOR_RESTART_POLICY_H_
#define SIMPO_COORDINATOR_RESTART_POLICY_H_

#include <chrono>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "simpo/v1/job.pb.h"

namespace simpo {

// What an exit code of a gang means.
enum class ExitMeaning {
  kDone,
  kRefused,       // another attempt would end the same way
  kJobFault,      // counts against the job's max_restarts
  kMachineFault,  // counts against max_machine_faults
};

// "done", "fail", "restart", "machine": as the coordinator's config file says it.
std::optional<ExitMeaning> ParseExitMeaning(const std::string& name);

struct RestartPolicy {
  // Wins over what codes mean by themselves: 0 done; 2 and 3 refused; 127 (a program is missing), 143 (SIGTERM that
  // this coordinator did not send) and 129 (SIGHUP) a fault of the machine; all others one of the job.
  std::map<int, ExitMeaning> exit_codes;
  int max_machine_faults = 20;
  // Attempts in a row that were lost to faults of the job after one and the same checkpoint (or before the first),
  // after which there is no other.
  int max_without_progress = 3;
  std::chrono::milliseconds first_pause{1'000};  // before the second attempt; doubles with each further one
  std::chrono::milliseconds longest_pause{60'000};
  double jitter = 0.25;  // the largest part of a pause that is added to it
};

// How the gang of an attempt ended.
struct AttemptEnd {
  std::optional<int> exit_code;  // empty: nothing is left that could tell
  // What the coordinator itself saw, such as a rank that hangs, and ended the gang for. It then counts, not the code.
  std::optional<v1::FaultKind> seen;
};

struct Verdict {
  ExitMeaning meaning = ExitMeaning::kJobFault;
  bool again = false;   // another attempt follows
  std::string why_not;  // with a fault that no attempt follows: which limit was reached
};

ExitMeaning MeaningOf(const RestartPolicy& policy, const AttemptEnd& end);

// `attempts`: all of the job; the last one is the one that has ended, with checkpoint_step filled in. `job`: its
// counts do not hold that one yet. Pure.
Verdict Judge(const RestartPolicy& policy, const v1::Job& job, const std::vector<v1::Attempt>& attempts,
              const AttemptEnd& end);

// Between the last attempt, which was lost, and the next. Grows with the attempts in a row that were lost after the
// same checkpoint. A part is added, another one for each job and attempt, so that jobs that were lost together do
// not come back together. The same for the same arguments. Pure.
std::chrono::milliseconds PauseBeforeNext(const RestartPolicy& policy, const v1::Job& job,
                                          const std::vector<v1::Attempt>& attempts);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_RESTART_POLICY_H_
