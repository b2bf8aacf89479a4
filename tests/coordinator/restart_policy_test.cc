#include "coordinator/restart_policy.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace simpo {
namespace {

using std::chrono::milliseconds;
using ::testing::HasSubstr;

v1::Job JobWith(int restarts, int max_restarts, int machine_faults = 0) {
  v1::Job job;
  job.set_id("job1");
  job.set_restarts(restarts);
  job.set_max_restarts(max_restarts);
  job.set_machine_faults(machine_faults);
  return job;
}

// One attempt for each: what it was lost to, and the checkpoint that there was when it ended.
std::vector<v1::Attempt> Attempts(const std::vector<std::pair<v1::FaultKind, int>>& ends) {
  std::vector<v1::Attempt> attempts;
  for (const auto& [fault, checkpoint] : ends) {
    v1::Attempt& attempt = attempts.emplace_back();
    attempt.set_number(static_cast<int>(attempts.size()));
    attempt.set_fault(fault);
    attempt.set_checkpoint_step(checkpoint);
  }
  return attempts;
}
constexpr v1::FaultKind kJob = v1::FAULT_KIND_JOB, kMachine = v1::FAULT_KIND_MACHINE,
                        kNone = v1::FAULT_KIND_UNSPECIFIED;

TEST(RestartPolicyTest, WhatExitCodesMean) {
  const RestartPolicy policy;
  EXPECT_EQ(MeaningOf(policy, {.exit_code = 0}), ExitMeaning::kDone);
  for (int code : {2, 3}) EXPECT_EQ(MeaningOf(policy, {.exit_code = code}), ExitMeaning::kRefused) << code;
  for (int code : {1, 75, 134, 137, 139}) EXPECT_EQ(MeaningOf(policy, {.exit_code = code}), ExitMeaning::kJobFault);
  for (int code : {127, 129, 143}) EXPECT_EQ(MeaningOf(policy, {.exit_code = code}), ExitMeaning::kMachineFault);
  EXPECT_EQ(MeaningOf(policy, {}), ExitMeaning::kMachineFault) << "nothing is left that could tell";
  EXPECT_EQ(MeaningOf(policy, {.seen = kMachine}), ExitMeaning::kMachineFault);
  EXPECT_EQ(MeaningOf(policy, {.exit_code = 143, .seen = kJob}), ExitMeaning::kJobFault);
  EXPECT_EQ(MeaningOf(policy, {.exit_code = 1, .seen = kMachine}), ExitMeaning::kMachineFault);
  EXPECT_EQ(MeaningOf(policy, {.exit_code = 0, .seen = kJob}), ExitMeaning::kDone) << "0 is 0";
}

TEST(RestartPolicyTest, TheOperatorHasTheLastWordOnExitCodes) {
  const RestartPolicy policy{.exit_codes = {{134, ExitMeaning::kRefused}, {3, ExitMeaning::kJobFault}}};
  EXPECT_EQ(MeaningOf(policy, {.exit_code = 134}), ExitMeaning::kRefused);
  EXPECT_EQ(MeaningOf(policy, {.exit_code = 3}), ExitMeaning::kJobFault);
  EXPECT_EQ(MeaningOf(policy, {.exit_code = 0}), ExitMeaning::kDone);
  EXPECT_EQ(ParseExitMeaning("fail"), ExitMeaning::kRefused);
  EXPECT_EQ(ParseExitMeaning("restart"), ExitMeaning::kJobFault);
  EXPECT_EQ(ParseExitMeaning("machine"), ExitMeaning::kMachineFault);
  EXPECT_FALSE(ParseExitMeaning("retry"));
}

TEST(RestartPolicyTest, FaultsOfTheJobAndOfTheMachineHaveBudgetsOfTheirOwn) {
  const RestartPolicy policy{.max_machine_faults = 5};
  const auto attempts = Attempts({{kNone, 10}});
  EXPECT_TRUE(Judge(policy, JobWith(1, 2, 5), attempts, {.exit_code = 137}).again);
  const Verdict out = Judge(policy, JobWith(2, 2, 0), attempts, {.exit_code = 137});
  EXPECT_FALSE(out.again);
  EXPECT_THAT(out.why_not, HasSubstr("max_restarts is 2"));
  EXPECT_TRUE(Judge(policy, JobWith(2, 2, 4), attempts, {}).again) << "no fault of the job";
  const Verdict machine = Judge(policy, JobWith(0, 2, 5), attempts, {});
  EXPECT_FALSE(machine.again);
  EXPECT_THAT(machine.why_not, HasSubstr("max_machine_faults is 5"));
}

TEST(RestartPolicyTest, NoMoreAttemptsWhereCheckpointsDoNotAdvance) {
  const RestartPolicy policy;
  const AttemptEnd fault{.exit_code = 139};
  const v1::Job job = JobWith(2, 100);
  EXPECT_TRUE(Judge(policy, job, Attempts({{kJob, 0}, {kNone, 0}}), fault).again);
  Verdict verdict = Judge(policy, job, Attempts({{kJob, 0}, {kJob, 0}, {kNone, 0}}), fault);
  EXPECT_FALSE(verdict.again);
  EXPECT_THAT(verdict.why_not, HasSubstr("3 attempts in a row have ended before the first checkpoint"));
  verdict = Judge(policy, job, Attempts({{kJob, 40}, {kJob, 40}, {kNone, 40}}), fault);
  EXPECT_FALSE(verdict.again);
  EXPECT_THAT(verdict.why_not, HasSubstr("after the checkpoint of step 40 and before another"));
  EXPECT_TRUE(Judge(policy, job, Attempts({{kJob, 40}, {kJob, 40}, {kNone, 50}}), fault).again) << "it got on";
  EXPECT_TRUE(Judge(policy, job, Attempts({{kJob, 40}, {kMachine, 40}, {kNone, 40}}), fault).again)
      << "only faults of the job in a row count";
}

TEST(RestartPolicyTest, PausesGrowWhileNothingIsGainedAndDiffer) {
  RestartPolicy policy{.first_pause = milliseconds(1000), .longest_pause = milliseconds(6000), .jitter = 0};
  const v1::Job job = JobWith(0, 100);
  EXPECT_EQ(PauseBeforeNext(policy, job, Attempts({{kJob, 0}})).count(), 1000);
  EXPECT_EQ(PauseBeforeNext(policy, job, Attempts({{kJob, 0}, {kMachine, 0}})).count(), 2000);
  EXPECT_EQ(PauseBeforeNext(policy, job, Attempts({{kJob, 0}, {kJob, 0}, {kJob, 0}})).count(), 4000);
  EXPECT_EQ(PauseBeforeNext(policy, job, Attempts({{kJob, 0}, {kJob, 0}, {kJob, 0}, {kJob, 0}})).count(), 6000);
  EXPECT_EQ(PauseBeforeNext(policy, job, Attempts({{kJob, 0}, {kJob, 0}, {kJob, 8}})).count(), 1000) << "it got on";

  policy.jitter = 0.25;
  std::set<int64_t> pauses;
  for (int i = 0; i < 20; ++i) {
    v1::Job other = job;
    other.set_id("job" + std::to_string(i));
    const milliseconds pause = PauseBeforeNext(policy, other, Attempts({{kJob, 0}}));
    EXPECT_EQ(pause, PauseBeforeNext(policy, other, Attempts({{kJob, 0}}))) << "the same after a restart";
    EXPECT_GE(pause.count(), 1000);
    EXPECT_LE(pause.count(), 1250);
    pauses.insert(pause.count());
  }
  EXPECT_GT(pauses.size(), 10u);
}

}  // namespace
}  // namespace simpo
