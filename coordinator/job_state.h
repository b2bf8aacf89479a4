#ifndef SIMPO_COORDINATOR_JOB_STATE_H_
#define SIMPO_COORDINATOR_JOB_STATE_H_

#include <array>
#include <optional>
#include <string>

#include "simpo/v1/job.pb.h"

namespace simpo {

// What can happen to a job.
enum class JobTrigger {
  kSlotsAssigned,      // placement found room for the next attempt
  kRanksAttached,      // every rank of the gang has said hello
  kAttemptSucceeded,   // the gang left with 0
  kAttemptRefused,     // the gang left with a code that says that another attempt would end the same way
  kAttemptFaulted,     // the gang was lost, and another attempt is allowed
  kRestartsExhausted,  // the gang was lost, and no other attempt is allowed
  kCancelRequested,    // a user or the time limit wants the job to end
  kPreempted,          // a job of higher priority needs the slots, or the node is drained
};
inline constexpr std::array kJobTriggers = {
    JobTrigger::kSlotsAssigned,   JobTrigger::kRanksAttached,  JobTrigger::kAttemptSucceeded,
    JobTrigger::kAttemptRefused,  JobTrigger::kAttemptFaulted, JobTrigger::kRestartsExhausted,
    JobTrigger::kCancelRequested, JobTrigger::kPreempted,
};
inline constexpr std::array kJobStates = {
    v1::JOB_STATE_QUEUED,     v1::JOB_STATE_LAUNCHING,  v1::JOB_STATE_RUNNING,
    v1::JOB_STATE_RESTARTING, v1::JOB_STATE_PREEMPTING, v1::JOB_STATE_CANCELLING,
    v1::JOB_STATE_SUCCEEDED,  v1::JOB_STATE_FAILED,     v1::JOB_STATE_CANCELLED,
};

// What the controller does once the new state is on disk.
enum class JobAction { kNone, kLaunch, kStopGang };

struct Transition {
  v1::JobState next;
  JobAction action;
  bool operator==(const Transition&) const = default;
};

// The whole life of a job. Empty: the trigger cannot occur in that state, and the controller ignores
// it with an error in its log.
std::optional<Transition> NextState(v1::JobState state, JobTrigger trigger);

bool IsFinal(v1::JobState state);
// Processes of the job may exist, and its slots are taken.
bool HoldsGang(v1::JobState state);
// The next attempt waits for slots.
bool WaitsForSlots(v1::JobState state);

// "RUNNING" of JOB_STATE_RUNNING.
std::string JobStateName(v1::JobState state);
const char* JobTriggerName(JobTrigger trigger);
// The table as markdown, for the docs.
std::string JobStateTable();

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_JOB_STATE_H_
