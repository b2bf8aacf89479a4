#include "coordinator/job_state.h"

#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <string>
#include <utility>

namespace simpo {
namespace {

// Every cell, as a person reads it: the next state, and what is done; "-" is impossible.
struct Line {
  const char* state;
  const char* cells[kJobTriggers.size()];
};
constexpr Line kWanted[] = {
    // slots        all attached  0             2 or 3       lost          exhausted    cancel       pre-empted
    {"QUEUED", {"LAUNCHING+", "-", "-", "-", "-", "-", "CANCELLED", "-"}},
    {"LAUNCHING", {"-", "RUNNING", "SUCCEEDED", "FAILED", "RESTARTING", "FAILED", "CANCELLING!", "PREEMPTING!"}},
    {"RUNNING", {"-", "RUNNING", "SUCCEEDED", "FAILED", "RESTARTING", "FAILED", "CANCELLING!", "PREEMPTING!"}},
    {"RESTARTING", {"LAUNCHING+", "-", "-", "-", "-", "-", "CANCELLED", "-"}},
    {"PREEMPTING", {"-", "PREEMPTING", "SUCCEEDED", "FAILED", "QUEUED", "QUEUED", "CANCELLING!", "-"}},
    {"CANCELLING", {"-", "CANCELLING", "SUCCEEDED", "CANCELLED", "CANCELLED", "CANCELLED", "CANCELLING", "-"}},
    {"SUCCEEDED", {"-", "-", "-", "-", "-", "-", "SUCCEEDED", "-"}},
    {"FAILED", {"-", "-", "-", "-", "-", "-", "FAILED", "-"}},
    {"CANCELLED", {"-", "-", "-", "-", "-", "-", "CANCELLED", "-"}},
};

std::string CellText(v1::JobState state, JobTrigger trigger) {
  const std::optional<Transition> to = NextState(state, trigger);
  if (!to) return "-";
  const char* marks[] = {"", "+", "!"};
  return JobStateName(to->next) + marks[static_cast<int>(to->action)];
}

TEST(JobStateTest, EveryCell) {
  ASSERT_EQ(std::size(kWanted), kJobStates.size());
  for (size_t row = 0; row < kJobStates.size(); ++row) {
    EXPECT_EQ(JobStateName(kJobStates[row]), kWanted[row].state);
    for (size_t column = 0; column < kJobTriggers.size(); ++column) {
      EXPECT_EQ(CellText(kJobStates[row], kJobTriggers[column]), kWanted[row].cells[column])
          << kWanted[row].state << ": " << JobTriggerName(kJobTriggers[column]);
    }
  }
}

TEST(JobStateTest, EveryStateCanEndAndFinalStatesStay) {
  for (v1::JobState start : kJobStates) {
    std::set<v1::JobState> reached = {start};
    for (size_t before = 0; before != reached.size();) {
      before = reached.size();
      for (v1::JobState state : std::set(reached)) {
        for (JobTrigger trigger : kJobTriggers) {
          if (const auto to = NextState(state, trigger)) reached.insert(to->next);
        }
      }
    }
    bool ends = false;
    for (v1::JobState state : reached) ends |= IsFinal(state);
    EXPECT_TRUE(ends) << JobStateName(start);
    if (!IsFinal(start)) continue;
    EXPECT_EQ(reached.size(), 1u) << JobStateName(start);
  }
}

// In any state with processes each way in which they can end leads on, and a cancel is always understood.
TEST(JobStateTest, NoEndOfAGangIsLost) {
  for (v1::JobState state : kJobStates) {
    EXPECT_TRUE(NextState(state, JobTrigger::kCancelRequested)) << JobStateName(state);
    for (JobTrigger trigger : {JobTrigger::kAttemptSucceeded, JobTrigger::kAttemptRefused, JobTrigger::kAttemptFaulted,
                               JobTrigger::kRestartsExhausted}) {
      const auto to = NextState(state, trigger);
      EXPECT_EQ(to.has_value(), HoldsGang(state)) << JobStateName(state);
      EXPECT_FALSE(to && HoldsGang(to->next)) << JobStateName(state);
    }
    EXPECT_EQ(NextState(state, JobTrigger::kSlotsAssigned).has_value(), WaitsForSlots(state)) << JobStateName(state);
  }
}

TEST(JobStateTest, TheDocsShowTheTable) {
  std::ifstream file(SIMPO_SOURCE_DIR "/docs/architecture.md");
  const std::string docs(std::istreambuf_iterator<char>(file), {});
  EXPECT_NE(docs.find(JobStateTable()), std::string::npos) << "docs/architecture.md must show:\n" << JobStateTable();
}

}  // namespace
}  // namespace simpo
