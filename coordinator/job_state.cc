#include "coordinator/job_state.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace simpo {
namespace {

constexpr v1::JobState kQueued = v1::JOB_STATE_QUEUED;
constexpr v1::JobState kLaunching = v1::JOB_STATE_LAUNCHING;
constexpr v1::JobState kRunning = v1::JOB_STATE_RUNNING;
constexpr v1::JobState kRestarting = v1::JOB_STATE_RESTARTING;
constexpr v1::JobState kPreempting = v1::JOB_STATE_PREEMPTING;
constexpr v1::JobState kCancelling = v1::JOB_STATE_CANCELLING;
constexpr v1::JobState kSucceeded = v1::JOB_STATE_SUCCEEDED;
constexpr v1::JobState kFailed = v1::JOB_STATE_FAILED;
constexpr v1::JobState kCancelled = v1::JOB_STATE_CANCELLED;

struct Row {
  v1::JobState state;
  JobTrigger trigger;
  Transition transition;
};

// Every cell that is not listed is impossible.
constexpr Row kTable[] = {
    {kQueued, JobTrigger::kSlotsAssigned, {kLaunching, JobAction::kLaunch}},
    {kQueued, JobTrigger::kCancelRequested, {kCancelled, JobAction::kNone}},

    {kLaunching, JobTrigger::kRanksAttached, {kRunning, JobAction::kNone}},
    {kLaunching, JobTrigger::kAttemptSucceeded, {kSucceeded, JobAction::kNone}},
    {kLaunching, JobTrigger::kAttemptRefused, {kFailed, JobAction::kNone}},
    {kLaunching, JobTrigger::kAttemptFaulted, {kRestarting, JobAction::kNone}},
    {kLaunching, JobTrigger::kRestartsExhausted, {kFailed, JobAction::kNone}},
    {kLaunching, JobTrigger::kCancelRequested, {kCancelling, JobAction::kStopGang}},
    {kLaunching, JobTrigger::kPreempted, {kPreempting, JobAction::kStopGang}},

    // After an outage the ranks attach again.
    {kRunning, JobTrigger::kRanksAttached, {kRunning, JobAction::kNone}},
    {kRunning, JobTrigger::kAttemptSucceeded, {kSucceeded, JobAction::kNone}},
    {kRunning, JobTrigger::kAttemptRefused, {kFailed, JobAction::kNone}},
    {kRunning, JobTrigger::kAttemptFaulted, {kRestarting, JobAction::kNone}},
    {kRunning, JobTrigger::kRestartsExhausted, {kFailed, JobAction::kNone}},
    {kRunning, JobTrigger::kCancelRequested, {kCancelling, JobAction::kStopGang}},
    {kRunning, JobTrigger::kPreempted, {kPreempting, JobAction::kStopGang}},

    {kRestarting, JobTrigger::kSlotsAssigned, {kLaunching, JobAction::kLaunch}},
    {kRestarting, JobTrigger::kCancelRequested, {kCancelled, JobAction::kNone}},

    {kPreempting, JobTrigger::kRanksAttached, {kPreempting, JobAction::kNone}},
    {kPreempting, JobTrigger::kAttemptSucceeded, {kSucceeded, JobAction::kNone}},
    {kPreempting, JobTrigger::kAttemptRefused, {kFailed, JobAction::kNone}},
    // However it ended, it had been asked to; that is no fault of its own.
    {kPreempting, JobTrigger::kAttemptFaulted, {kQueued, JobAction::kNone}},
    {kPreempting, JobTrigger::kRestartsExhausted, {kQueued, JobAction::kNone}},
    {kPreempting, JobTrigger::kCancelRequested, {kCancelling, JobAction::kStopGang}},

    {kCancelling, JobTrigger::kRanksAttached, {kCancelling, JobAction::kNone}},
    // It was done before the request reached it.
    {kCancelling, JobTrigger::kAttemptSucceeded, {kSucceeded, JobAction::kNone}},
    {kCancelling, JobTrigger::kAttemptRefused, {kCancelled, JobAction::kNone}},
    {kCancelling, JobTrigger::kAttemptFaulted, {kCancelled, JobAction::kNone}},
    {kCancelling, JobTrigger::kRestartsExhausted, {kCancelled, JobAction::kNone}},
    {kCancelling, JobTrigger::kCancelRequested, {kCancelling, JobAction::kNone}},

    {kSucceeded, JobTrigger::kCancelRequested, {kSucceeded, JobAction::kNone}},
    {kFailed, JobTrigger::kCancelRequested, {kFailed, JobAction::kNone}},
    {kCancelled, JobTrigger::kCancelRequested, {kCancelled, JobAction::kNone}},
};

const char* ActionText(JobAction action) {
  switch (action) {
    case JobAction::kNone:
      return "";
    case JobAction::kLaunch:
      return ", start the gang";
    case JobAction::kStopGang:
      return ", stop the gang";
  }
  return "";
}

}  // namespace

std::optional<Transition> NextState(v1::JobState state, JobTrigger trigger) {
  for (const Row& row : kTable) {
    if (row.state == state && row.trigger == trigger) return row.transition;
  }
  return std::nullopt;
}

bool IsFinal(v1::JobState state) { return state == kSucceeded || state == kFailed || state == kCancelled; }

bool HoldsGang(v1::JobState state) {
  return state == kLaunching || state == kRunning || state == kPreempting || state == kCancelling;
}

bool WaitsForSlots(v1::JobState state) { return state == kQueued || state == kRestarting; }

std::string JobStateName(v1::JobState state) {
  const std::string& name = v1::JobState_Name(state);
  return std::string(absl::StripPrefix(name, "JOB_STATE_"));
}

const char* JobTriggerName(JobTrigger trigger) {
  switch (trigger) {
    case JobTrigger::kSlotsAssigned:
      return "slots assigned";
    case JobTrigger::kRanksAttached:
      return "all ranks attached";
    case JobTrigger::kAttemptSucceeded:
      return "gang left with 0";
    case JobTrigger::kAttemptRefused:
      return "gang left with 2 or 3";
    case JobTrigger::kAttemptFaulted:
      return "gang lost";
    case JobTrigger::kRestartsExhausted:
      return "gang lost, no restarts left";
    case JobTrigger::kCancelRequested:
      return "cancel requested";
    case JobTrigger::kPreempted:
      return "pre-empted";
  }
  return "";
}

std::string JobStateTable() {
  std::string text = "| state |";
  std::string rule = "|---|";
  for (JobTrigger trigger : kJobTriggers) {
    absl::StrAppend(&text, " ", JobTriggerName(trigger), " |");
    rule += "---|";
  }
  absl::StrAppend(&text, "\n", rule, "\n");
  for (v1::JobState state : kJobStates) {
    absl::StrAppend(&text, "| ", JobStateName(state), " |");
    for (JobTrigger trigger : kJobTriggers) {
      const std::optional<Transition> to = NextState(state, trigger);
      absl::StrAppend(&text, " ", to ? JobStateName(to->next) + ActionText(to->action) : "-", " |");
    }
    text += "\n";
  }
  return text;
}

}  // namespace simpo
