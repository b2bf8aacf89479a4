// A gang from its start to its end: faults and restarts, ranks that stand still, and who is asked to leave.
#include <unistd.h>

#include "dispatcher_fixture.h"

namespace simpo {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class PreemptionTest : public DispatcherTest {
 protected:
  PreemptionTest() {
    queue_.preemption = true;
    StartCoordinator();
    low_ = Start(JobYaml(4, "time_limit: 300\n"));
    channels_ = AttachAll(low_, 1, 4);
    for (int step = 1; step <= 3; ++step) Say(low_, 1, 0, StepMessage(step));
    Say(low_, 1, 0, EventMessage("checkpoint", "checkpoint after step 2", 2));
  }
  // Time passes, and the ranks are heard of.
  void Train(int seconds_in_all) {
    for (int i = 0; i < seconds_in_all; i += 10) {
      Pass(seconds(10));
      for (int rank = 0; rank < 4; ++rank) Say(low_, 1, rank, HeartbeatMessage("train"));
    }
  }
  void Interrupt() { urgent_ = Start(JobYaml(2, "priority: 5\n")); }
  std::string low_, urgent_;
  std::vector<std::shared_ptr<FakeChannel>> channels_;
};

TEST_F(PreemptionTest, AJobOfLowerPriorityCheckpointsAndWaitsAgain) {
  Train(60);
  Interrupt();
  EXPECT_EQ(State(low_), "PREEMPTING");
  EXPECT_EQ(Job(low_).reason(), absl::StrCat("pre-empted by job ", urgent_, " (priority 5)"));
  for (const auto& channel : channels_) EXPECT_TRUE(channel->WasToldToStop());
  EXPECT_EQ(launcher_.Count("terminate"), 0);
  EXPECT_THAT(Job(urgent_).reason(), HasSubstr(absl::StrCat("job ", low_, " is making room for it")));
  Say(low_, 1, 0, EventMessage("checkpoint", "checkpoint after step 3", 3));
  launcher_.End(low_, 1, 143);
  Pass(milliseconds(200));
  EXPECT_EQ(State(low_), "QUEUED");
  EXPECT_EQ(Job(low_).restarts(), 0) << "no fault of its own";
  EXPECT_TRUE(views_->FindById(low_)->attempts[0].preempted());
  EXPECT_THAT(EventTypes(low_),
              ElementsAre("submitted", "launched", "running", "checkpoint", "preempting", "checkpoint", "preempted"));
  EXPECT_EQ(State(urgent_), "LAUNCHING");
  EXPECT_THAT(Job(low_).reason(), HasSubstr(absl::StrCat("pre-empted by job ", urgent_)));
  EXPECT_THAT(Job(low_).reason(), HasSubstr("1st of 1 in the queue"));

  Pass(seconds(1000));
  launcher_.End(urgent_, 1, 0);
  Pass(milliseconds(200));
  EXPECT_EQ(State(low_), "LAUNCHING");
  EXPECT_TRUE(launcher_.started().back().resume_latest);
  Pass(seconds(239));
  EXPECT_EQ(State(low_), "LAUNCHING") << "the time limit counts the time that it ran";
  Pass(seconds(2));
  EXPECT_EQ(State(low_), "CANCELLING");
}

TEST_F(PreemptionTest, ANewCoordinatorKnowsThatItWasAsked) {
  Interrupt();
  StartCoordinator();
  EXPECT_EQ(State(low_), "PREEMPTING");
  EXPECT_TRUE(AttachAll(low_, 1, 4)[0]->WasToldToStop());
  launcher_.End(low_, 1, 143);
  Pass(milliseconds(200));
  EXPECT_EQ(State(low_), "QUEUED");
  EXPECT_EQ(Job(low_).restarts(), 0);
  EXPECT_EQ(State(urgent_), "LAUNCHING");
  StartCoordinator();
  EXPECT_EQ(State(low_), "QUEUED");
  launcher_.End(urgent_, 1, 0);
  Pass(milliseconds(200));
  EXPECT_EQ(State(low_), "LAUNCHING");
}

TEST_F(PreemptionTest, WhoDoesNotLeaveIsEnded) {
  Interrupt();
  Train(130);
  EXPECT_EQ(launcher_.Count("terminate"), 1);
  Pass(seconds(16));
  EXPECT_EQ(launcher_.Count("kill"), 1);
  launcher_.End(low_, 1, 137);
  Pass(milliseconds(200));
  EXPECT_EQ(State(low_), "QUEUED");
  EXPECT_EQ(Job(low_).restarts(), 0);
}

TEST_F(PreemptionTest, CancelledWhileItMakesRoom) {
  Interrupt();
  EXPECT_EQ(Cancel(low_).state(), v1::JOB_STATE_CANCELLING);
  launcher_.End(low_, 1, 143);
  Pass(milliseconds(200));
  EXPECT_EQ(State(low_), "CANCELLED");
  EXPECT_EQ(State(urgent_), "LAUNCHING");
}

TEST_F(PreemptionTest, DoneBeforeTheRequestCame) {
  Interrupt();
  launcher_.End(low_, 1, 0);
  Pass(milliseconds(200));
  EXPECT_EQ(State(low_), "SUCCEEDED");
}

TEST_F(DispatcherTest, AFaultRestartsFromTheCheckpointUntilNoRestartIsLeft) {
  const std::string id = Start(JobYaml(2, "max_restarts: 2\n"));
  AttachAll(id, 1, 2);
  for (int step = 1; step <= 5; ++step) Say(id, 1, 0, StepMessage(step));
  Say(id, 1, 0, EventMessage("checkpoint", "checkpoint after step 4", 4));
  launcher_.End(id, 1, 137);
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "RESTARTING");
  EXPECT_EQ(Job(id).restarts(), 1);
  EXPECT_THAT(EventTypes(id).back(), "restarting");
  EXPECT_EQ(Job(id).progress().checkpoint_step(), 4);

  Pass(milliseconds(500));
  EXPECT_EQ(State(id), "RESTARTING") << "the first pause is a second";
  Pass(milliseconds(600));
  EXPECT_EQ(State(id), "LAUNCHING");
  ASSERT_EQ(launcher_.started().size(), 2u);
  EXPECT_TRUE(launcher_.started()[1].resume_latest);
  EXPECT_EQ(launcher_.started()[1].attempt, 2);

  // The worker finds steps 1 to 4 in its file and replays them; they are stored once.
  AttachAll(id, 2, 2);
  Say(id, 2, 0, EventMessage("resumed", "resumed after step 4", 4));
  for (int step = 1; step <= 6; ++step) Say(id, 2, 0, StepMessage(step, 0.25));
  EXPECT_THAT(StoredSteps(id), ElementsAre(1, 2, 3, 4, 5, 6));
  const auto points = ValueOf(stores_.metrics->ListPoints(1, "train", 0, 10));
  EXPECT_EQ(points[3].attempt(), 1);
  EXPECT_EQ(points[4].attempt(), 2);
  EXPECT_EQ(views_->FindById(id)->attempts[1].first_step(), 4);

  launcher_.End(id, 2, 134);
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "RESTARTING");
  Pass(milliseconds(1100));
  EXPECT_EQ(State(id), "RESTARTING") << "the second pause is twice as long";
  Pass(milliseconds(1000));
  launcher_.End(id, 3, 75);
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "FAILED");
  EXPECT_THAT(Job(id).reason(), HasSubstr("max_restarts is 2"));
  EXPECT_EQ(Job(id).restarts(), 2);
  EXPECT_EQ(Job(id).attempt(), 3);
}

TEST_F(DispatcherTest, BadJobsAndBadDataAreNotRetried) {
  for (int code : {2, 3}) {
    const std::string id = Start(JobYaml(2));
    WriteText(std::filesystem::path(launcher_.started().back().log_dir) / "launcher.log",
              "note: something\nsimpo-worker: data.jsonl:7: the row has no chosen\n  and more\n"
              "2024-01-01T00:00:00.000Z I ended\n");
    launcher_.End(id, 1, code);
    Pass(milliseconds(200));
    EXPECT_EQ(State(id), "FAILED");
    EXPECT_EQ(Job(id).reason(), absl::StrCat("data.jsonl:7: the row has no chosen\n  and more (exit code ", code, ")"));
    EXPECT_EQ(Job(id).restarts(), 0);
  }
}

TEST_F(DispatcherTest, ALostGangIsSweptAndRestarted) {
  const std::string id = Start(JobYaml(1));
  launcher_.Lose(id, 1, "its supervisor ended without a word");
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "RESTARTING");
  EXPECT_EQ(launcher_.Count("kill"), 1);
  EXPECT_FALSE(views_->FindById(id)->attempts[0].has_exit_code());
}

TEST_F(DispatcherTest, AGangThatCannotBeLookedAtIsNotLost) {
  const std::string id = Start(JobYaml(1));
  AttachAll(id, 1, 1);
  const absl::Status full = absl::UnavailableError("too many open files");
  launcher_.FailLooks(full);
  StartCoordinator();
  for (int i = 0; i < 100; ++i) Pass(seconds(1));
  EXPECT_EQ(State(id), "RUNNING");
  EXPECT_EQ(Job(id).attempt(), 1);
  launcher_.FailLooks(absl::OkStatus());
  Pass(seconds(1));
  EXPECT_EQ(launcher_.Count("publish"), 1) << "now its ranks are let in and know where to go";
  EXPECT_FALSE(views_->FindById(id)->secret.empty());
  AttachAll(id, 1, 1);

  // What could not be sent is sent when it can be.
  launcher_.FailLooks(full);
  Cancel(id);
  for (int i = 0; i < 20; ++i) Pass(seconds(1));
  launcher_.FailLooks(absl::OkStatus());
  Pass(milliseconds(200));
  EXPECT_EQ(launcher_.Count("terminate"), 1);
  EXPECT_EQ(launcher_.Count("kill"), 1);
  Pass(seconds(1));
  EXPECT_EQ(launcher_.Count("terminate"), 1);
  EXPECT_EQ(launcher_.Count("kill"), 1);
}

TEST_F(DispatcherTest, AStartThatMayHaveBeenMadeIsNotMadeAgain) {
  const std::string id = Start(JobYaml(1));
  launcher_.FailLooks(absl::UnavailableError("too many open files"));
  launcher_.FailStarts(absl::UnavailableError("too many open files"));
  StartCoordinator();
  for (int i = 0; i < 10; ++i) Pass(seconds(1));
  EXPECT_EQ(State(id), "LAUNCHING");
  launcher_.FailLooks(absl::OkStatus());
  Pass(seconds(1));
  EXPECT_EQ(State(id), "LAUNCHING") << "it runs";
  EXPECT_EQ(Job(id).attempt(), 1);
  EXPECT_FALSE(views_->FindById(id)->secret.empty());
  EXPECT_EQ(launcher_.started().size(), 1u);
}

TEST_F(DispatcherTest, AGangThatCannotBeStartedIsAFault) {
  launcher_.FailStarts(absl::UnavailableError("disk full"));
  const std::string id = Start(JobYaml(1, "max_restarts: 0\n"));
  EXPECT_EQ(State(id), "RESTARTING") << "no fault of the job";
  EXPECT_THAT(Job(id).reason(), HasSubstr("disk full"));
  for (int i = 0; i < 25; ++i) Pass(seconds(80));
  EXPECT_EQ(State(id), "FAILED");
  EXPECT_EQ(Job(id).attempt(), 21);
  EXPECT_THAT(Job(id).reason(), HasSubstr("could not be started: disk full; the machine has failed it 21 times "
                                          "(max_machine_faults is 20)"));
}

TEST_F(DispatcherTest, ASilentRankEndsTheAttempt) {
  const std::string id = Start(JobYaml(2));
  AttachAll(id, 1, 2);
  Pass(milliseconds(200));
  for (int i = 0; i < 31; ++i) {
    Pass(seconds(1));
    Say(id, 1, 0, HeartbeatMessage("train"));
  }
  EXPECT_THAT(EventTypes(id).back(), "rank_lost");
  EXPECT_EQ(launcher_.Count("terminate"), 1);
  Pass(seconds(16));
  EXPECT_EQ(launcher_.Count("kill"), 1) << "SIGTERM was not enough";
  launcher_.End(id, 1, 137);
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "RESTARTING");
  EXPECT_THAT(views_->FindById(id)->attempts[0].reason(), HasSubstr("rank 1 has been silent"));
}

TEST_F(DispatcherTest, AClockThatIsSetMovesNeitherLimitNorPause) {
  constexpr int64_t kHour = 3'600'000;
  const std::string id = Start(JobYaml(1, "time_limit: 10m\n"));
  AttachAll(id, 1, 1);
  for (const int64_t jump : {kHour, -2 * kHour, kHour}) {
    now_.unix_ms += jump;
    Pass(seconds(1));
    EXPECT_EQ(State(id), "RUNNING");
  }
  launcher_.Lose(id, 1, "gone");
  now_.unix_ms -= kHour;
  Pass(seconds(1));
  EXPECT_EQ(State(id), "RESTARTING");
  const v1::Attempt& first = views_->FindById(id)->attempts[0];
  EXPECT_GE(UnixMillis(first.end_time()), UnixMillis(first.start_time()));
  now_.unix_ms -= kHour;
  Pass(seconds(2));
  EXPECT_EQ(State(id), "LAUNCHING") << "the pause was a second";
  AttachAll(id, 2, 1);
  Pass(seconds(590));
  EXPECT_EQ(State(id), "RUNNING");
  Pass(seconds(10));
  EXPECT_EQ(State(id), "CANCELLING") << "ten minutes have passed in all";
}

// A path or a library's words may be any bytes; what is stored with them must be readable for the next coordinator.
TEST_F(DispatcherTest, AReasonThatIsNotUtf8IsStored) {
  options_.restart.max_machine_faults = 0;
  StartCoordinator();
  launcher_.FailStarts(absl::UnavailableError(absl::StrCat("cannot make the folder \xff", std::string(20'000, 'x'))));
  const std::string id = Start(JobYaml());
  ASSERT_EQ(State(id), "FAILED");
  EXPECT_THAT(Job(id).reason(), HasSubstr("cannot make the folder ?xxx"));
  EXPECT_LE(Job(id).reason().size(), 8192u);
  StartCoordinator();
  EXPECT_EQ(State(id), "FAILED");
  EXPECT_THAT(views_->FindById(id)->attempts[0].reason(), HasSubstr("cannot make the folder ?xxx"));
  EXPECT_EQ(EventTypes(id).back(), "failed");
}

TEST_F(DispatcherTest, CheckpointsAreKnownHoweverManyEventsThereWere) {
  const std::string id = Start(JobYaml());
  AttachAll(id, 1, 1);
  v1::AttachRequest message = EventMessage("advice", "");
  for (int i = 0; i < 10'010; ++i) {
    message.mutable_event()->set_message(absl::StrCat("number ", i));
    dispatcher_->Receive({id, 1, 0}, message, now_);
  }
  Flush();
  EXPECT_EQ(EventTypes(id).back(), "events_left_out");
  v1::AttachRequest checkpoint = EventMessage("checkpoint", "step 7");
  checkpoint.mutable_event()->set_step(7);
  Say(id, 1, 0, checkpoint);
  EXPECT_EQ(Job(id).progress().checkpoint_step(), 7);
  EXPECT_EQ(EventTypes(id).back(), "events_left_out");
  StartCoordinator();
  EXPECT_EQ(Job(id).progress().checkpoint_step(), 7);
}

TEST_F(DispatcherTest, TimeInWhichTheCoordinatorDidNotListenIsNobodysSilence) {
  options_.liveness.heartbeat = seconds(20);
  StartCoordinator();
  const std::string id = Start(JobYaml(2));
  AttachAll(id, 1, 2);
  const auto stall = [&](seconds time) {
    now_.steady += time;
    now_.unix_ms += std::chrono::milliseconds(time).count();
    dispatcher_->ExcuseSilence(now_, time);
    dispatcher_->Tick(now_);
    Flush();
  };
  for (int i = 0; i < 3; ++i) stall(seconds(100));
  EXPECT_EQ(State(id), "RUNNING");
  EXPECT_EQ(launcher_.Count("terminate"), 0);
  // Its real silence goes on from where it was. Pauses that hide nothing count.
  for (int i = 0; i < 9; ++i) stall(seconds(2));
  Say(id, 1, 0, HeartbeatMessage("train"));
  EXPECT_EQ(launcher_.Count("terminate"), 0);
  for (int i = 0; i < 2; ++i) stall(seconds(2));
  EXPECT_EQ(launcher_.Count("terminate"), 1);
  EXPECT_THAT(stores_.jobs->LastEvents(1, 10)->back().message(), HasSubstr("rank 1 has been silent for 22 s"));
}

TEST_F(DispatcherTest, CancelAsksForACheckpointThenTerminatesThenKills) {
  const std::string id = Start(JobYaml(2));
  const auto channels = AttachAll(id, 1, 2);
  Say(id, 1, 0, StepMessage(1));
  EXPECT_EQ(Cancel(id).state(), v1::JOB_STATE_CANCELLING);
  EXPECT_TRUE(channels[0]->WasToldToStop());
  EXPECT_TRUE(channels[1]->WasToldToStop());
  EXPECT_EQ(launcher_.Count("terminate"), 0);
  for (int i = 0; i < 25; ++i) {
    Pass(seconds(5));
    for (int rank : {0, 1}) Say(id, 1, rank, HeartbeatMessage("train"));
  }
  EXPECT_EQ(launcher_.Count("terminate"), 1);
  Pass(seconds(16));
  EXPECT_EQ(launcher_.Count("kill"), 1);
  launcher_.End(id, 1, 143);
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "CANCELLED");
  EXPECT_EQ(Job(id).restarts(), 0);
  EXPECT_EQ(Cancel(id).state(), v1::JOB_STATE_CANCELLED) << "harmless on a job that has ended";
}

TEST_F(DispatcherTest, AGangThatIsWritingItsLastCheckpointHasMoreTime) {
  const std::string id = Start(JobYaml(1));
  AttachAll(id, 1, 1);
  Say(id, 1, 0, StepMessage(1));
  Cancel(id);
  for (int i = 0; i < 60; ++i) {
    Pass(seconds(25));
    Say(id, 1, 0, HeartbeatMessage("checkpoint"));
  }
  EXPECT_EQ(launcher_.Count("terminate"), 0) << "after 1,500 s";
  for (int i = 0; i < 13; ++i) {
    Pass(seconds(25));
    Say(id, 1, 0, HeartbeatMessage("checkpoint"));
  }
  EXPECT_EQ(launcher_.Count("terminate"), 1) << "checkpoint_timeout_s is over";
}

TEST_F(DispatcherTest, WhatTheMachineDoesIsNoRestartOfTheJob) {
  const std::string id = Start(JobYaml(1, "max_restarts: 0\n"));
  AttachAll(id, 1, 1);
  launcher_.Lose(id, 1, "the machine was restarted");
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "RESTARTING");
  EXPECT_EQ(Job(id).restarts(), 0);
  EXPECT_EQ(Job(id).machine_faults(), 1);
  EXPECT_THAT(ValueOf(stores_.jobs->LastEvents(1, 1))[0].message(),
              HasSubstr("attempt 1 was lost to a fault of the machine: the machine was restarted"));
  EXPECT_EQ(views_->FindById(id)->attempts[0].fault(), v1::FAULT_KIND_MACHINE);
  StartCoordinator();
  EXPECT_EQ(Job(id).machine_faults(), 1);
  Pass(seconds(2));
  launcher_.End(id, 2, 137);
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "FAILED") << "this one is a fault of the job";
  EXPECT_EQ(views_->FindById(id)->attempts[1].fault(), v1::FAULT_KIND_JOB);
}

TEST_F(DispatcherTest, AFaultThatComesBackAtTheSamePlaceIsGivenUp) {
  const std::string id = Start(JobYaml(1, "max_restarts: 100\n"));
  for (int attempt = 1; attempt <= 3; ++attempt) {
    AttachAll(id, attempt, 1);
    if (attempt == 1) {
      Say(id, 1, 0, StepMessage(1));
      Say(id, 1, 0, EventMessage("checkpoint", "checkpoint after step 1", 1));
    }
    launcher_.End(id, attempt, 139);
    Pass(milliseconds(200));
    if (attempt < 3) {
      EXPECT_EQ(State(id), "RESTARTING");
    }
    Pass(seconds(10));
    if (attempt == 1) StartCoordinator();
  }
  EXPECT_EQ(State(id), "FAILED");
  EXPECT_THAT(Job(id).reason(), HasSubstr("3 attempts in a row have ended after the checkpoint of step 1"));
}

TEST_F(DispatcherTest, ARankThatStandsStillIsNamedAndThenEnded) {
  options_.liveness.step = seconds(100);
  StartCoordinator();
  const std::string id = Start(JobYaml(2));
  AttachAll(id, 1, 2);
  v1::AttachRequest stuck = HeartbeatMessage("train"), waiting = HeartbeatMessage("train");
  stuck.mutable_heartbeat()->mutable_collective()->set_number(7);
  waiting.mutable_heartbeat()->mutable_collective()->set_number(8);
  waiting.mutable_heartbeat()->mutable_collective()->set_verb("all-gather");
  for (int second = 0; second < 50; ++second) {
    waiting.mutable_heartbeat()->mutable_collective()->set_waiting_seconds(second + 1);
    Say(id, 1, 0, waiting);
    Say(id, 1, 1, stuck);
    Pass(seconds(1));
  }
  EXPECT_EQ(EventTypes(id).back(), "rank_stalled") << "within 60 s, and once";
  EXPECT_EQ(views_->FindById(id)->ranks[0].last_collective(), "waiting for all-gather 8 (0 bytes) for 50 s");
  EXPECT_EQ(launcher_.Count("terminate"), 0);
  for (int second = 0; second < 60; ++second) {
    Say(id, 1, 0, waiting);
    Say(id, 1, 1, stuck);
    Pass(seconds(1));
  }
  EXPECT_EQ(EventTypes(id).back(), "rank_lost");
  EXPECT_EQ(launcher_.Count("terminate"), 1);
  launcher_.End(id, 1, 143);
  Pass(milliseconds(200));
  EXPECT_THAT(views_->FindById(id)->attempts[0].reason(), HasSubstr("rank 1 has not got on for 101 s"));
  EXPECT_EQ(views_->FindById(id)->attempts[0].fault(), v1::FAULT_KIND_JOB);
}

TEST_F(DispatcherTest, APreparationThatNeverEndsIsEnded) {
  options_.liveness.prepare = seconds(100);
  StartCoordinator();
  const std::string id = Start(JobYaml(1));
  launcher_.SetPhase(id, 1, GangStatus::Phase::kPreparing);
  for (int i = 0; i < 10; ++i) Pass(seconds(10));
  EXPECT_EQ(launcher_.Count("terminate"), 0);
  Pass(seconds(11));
  Pass(seconds(1));
  EXPECT_EQ(launcher_.Count("terminate"), 1);
  launcher_.End(id, 1, 143);
  Pass(milliseconds(200));
  EXPECT_THAT(Job(id).reason(), HasSubstr("were not prepared within 100 s"));
}

TEST_F(DispatcherTest, ACheckpointOnRequest) {
  const std::string id = Start(JobYaml(1));
  const auto ask = [&] {
    absl::StatusOr<v1::CheckpointJobResponse> result = absl::UnknownError("not answered");
    dispatcher_->Checkpoint(id, now_, [&](auto answer) { result = std::move(answer); });
    Flush();
    return result;
  };
  EXPECT_EQ(ask().status().code(), absl::StatusCode::kFailedPrecondition) << "it does not train yet";
  const auto channels = AttachAll(id, 1, 1);
  EXPECT_EQ(ValueOf(ask()).job().id(), id);
  EXPECT_EQ(channels[0]->sent().back().command().kind(), v1::COMMAND_KIND_CHECKPOINT);
  EXPECT_EQ(EventTypes(id).back(), "checkpoint_asked");

  // The stream broke, or the coordinator ended: the rank may not have heard of it, until the checkpoint is complete.
  const auto told_again = [&] {
    return AttachAll(id, 1, 1)[0]->sent().back().command().kind() == v1::COMMAND_KIND_CHECKPOINT;
  };
  EXPECT_TRUE(told_again());
  StartCoordinator();
  EXPECT_TRUE(told_again());
  Say(id, 1, 0, EventMessage("checkpoint", "checkpoint after step 1", 1));
  EXPECT_FALSE(told_again());
  StartCoordinator();
  EXPECT_FALSE(told_again());
  Say(id, 1, 0, StepMessage(1));
  Cancel(id);
  EXPECT_EQ(ask().status().code(), absl::StatusCode::kFailedPrecondition) << "it is about to leave";
}

TEST_F(DispatcherTest, WhatIsKeptOfAttemptsGoesWithTheJobsEnd) {
  const std::string id = Start(JobYaml(1));
  AttachAll(id, 1, 1);
  launcher_.End(id, 1, 137);
  Pass(milliseconds(200));
  Pass(seconds(2));
  EXPECT_EQ(launcher_.Count("forget"), 0) << "it goes on";
  launcher_.End(id, 2, 0);
  Pass(milliseconds(200));
  EXPECT_EQ(launcher_.Count("forget"), 1);
}

class DrainTest : public DispatcherTest {
 protected:
  absl::StatusOr<v1::NodeState> SetDrained(const std::string& node, const std::string& reason, bool keep = false) {
    absl::StatusOr<v1::NodeState> result = absl::UnknownError("not answered");
    dispatcher_->SetDrained(node, reason, keep, now_, [&](auto answer) { result = std::move(answer); });
    Flush();
    return result;
  }
};

TEST_F(DrainTest, GangsLeaveWithACheckpointAndComeBack) {
  const std::string id = Start(JobYaml(1));
  const auto channels = AttachAll(id, 1, 1);
  Say(id, 1, 0, StepMessage(1));
  const v1::NodeState node = ValueOf(SetDrained("local", "new disks"));
  EXPECT_FALSE(node.up());
  EXPECT_EQ(node.drain_reason(), "new disks");
  EXPECT_EQ(node.jobs_size(), 1);
  EXPECT_EQ(State(id), "PREEMPTING");
  EXPECT_TRUE(channels[0]->WasToldToStop());
  Say(id, 1, 0, EventMessage("checkpoint", "checkpoint after step 1", 1));
  launcher_.End(id, 1, 143);
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "QUEUED");
  EXPECT_EQ(Job(id).restarts() + Job(id).machine_faults(), 0) << "nobody's fault";
  const std::string other = Start(JobYaml(1));
  Pass(seconds(100));
  EXPECT_EQ(State(other), "QUEUED");
  EXPECT_THAT(Job(other).reason(), HasSubstr("down or drained"));

  StartCoordinator();
  Pass(seconds(1));
  EXPECT_EQ(State(id), "QUEUED") << "it stays drained";
  EXPECT_TRUE(ValueOf(SetDrained("local", "")).up());
  EXPECT_EQ(State(id), "LAUNCHING");
  EXPECT_TRUE(launcher_.started().back().resume_latest || launcher_.started().size() == 3);
  StartCoordinator();
  EXPECT_TRUE(ValueOf(dispatcher_->ListNodes({})).nodes(0).up());
}

TEST_F(DrainTest, ThoseThatRunMayGoOn) {
  const std::string id = Start(JobYaml(1));
  AttachAll(id, 1, 1);
  EXPECT_FALSE(ValueOf(SetDrained("local", "soon", /*keep=*/true)).up());
  EXPECT_EQ(State(id), "RUNNING");
  const std::string other = Start(JobYaml(1));
  Pass(seconds(1));
  EXPECT_EQ(State(other), "QUEUED");
  EXPECT_EQ(SetDrained("nowhere", "x").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(DispatcherTest, CancelWithNothingToKeepTerminatesAtOnce) {
  const std::string id = Start(JobYaml(1));
  Pass(milliseconds(200));
  Cancel(id);
  EXPECT_EQ(launcher_.Count("terminate"), 1);
  launcher_.End(id, 1, 0);
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "SUCCEEDED") << "it was done before the request reached it";
}

TEST_F(DispatcherTest, CancelBeforeTheStart) {
  Start(JobYaml(4));
  const std::string id = Start(JobYaml(4));
  EXPECT_EQ(Cancel(id).state(), v1::JOB_STATE_CANCELLED);
  EXPECT_THAT(EventTypes(id), ElementsAre("submitted", "cancelled"));
}

TEST_F(DispatcherTest, TheTimeLimitEndsAJob) {
  const std::string id = Start(JobYaml(1, "time_limit: 10\n"));
  const auto channels = AttachAll(id, 1, 1);
  Say(id, 1, 0, StepMessage(1));
  Pass(seconds(9));
  EXPECT_EQ(State(id), "RUNNING");
  Pass(seconds(2));
  EXPECT_EQ(State(id), "CANCELLING");
  EXPECT_THAT(Job(id).reason(), HasSubstr("time limit of 10 s"));
  EXPECT_TRUE(channels[0]->WasToldToStop());
}

TEST_F(DispatcherTest, StrangersAndOldAttemptsAreTurnedAway) {
  const std::string id = Start(JobYaml(2));
  for (const auto& [attempt, rank, world] :
       {std::tuple(2, 0, 2), std::tuple(1, 2, 2), std::tuple(1, -1, 2), std::tuple(1, 0, 3)}) {
    v1::Hello hello;
    hello.set_job_id(id);
    hello.set_attempt(attempt);
    hello.set_rank(rank);
    hello.set_world_size(world);
    const auto channel = std::make_shared<FakeChannel>();
    dispatcher_->Attach(hello, channel, now_);
    Flush();
    ASSERT_TRUE(channel->closed());
    EXPECT_EQ(channel->closed()->code(), absl::StatusCode::kFailedPrecondition);
  }
  Say(id, 7, 0, StepMessage(1));
  EXPECT_THAT(StoredSteps(id), ElementsAre());
}

TEST_F(DispatcherTest, ASecondStreamOfARankTakesThePlaceOfTheFirst) {
  const std::string id = Start(JobYaml(1));
  const auto first = AttachAll(id, 1, 1)[0];
  const auto second = AttachAll(id, 1, 1)[0];
  ASSERT_TRUE(first->closed());
  EXPECT_EQ(first->closed()->code(), absl::StatusCode::kAborted);
  dispatcher_->Leave({id, 1, 0}, first);  // comes late, and must not take away the second
  Say(id, 1, 0, StepMessage(1));
  EXPECT_EQ(second->acknowledged(), 1);
  dispatcher_->Leave({id, 1, 0}, second);
  Flush();
  ASSERT_TRUE(second->closed());
  EXPECT_TRUE(second->closed()->ok());
}

TEST_F(DispatcherTest, OnlyRankZeroReports) {
  const std::string id = Start(JobYaml(2));
  AttachAll(id, 1, 2);
  Say(id, 1, 1, StepMessage(1));
  Say(id, 1, 1, EventMessage("checkpoint", "mine", 1));
  EXPECT_THAT(StoredSteps(id), ElementsAre());
  EXPECT_THAT(EventTypes(id).back(), "running");
}

TEST_F(DispatcherTest, AFolderThatCannotBeMadeIsNoFaultOfTheMachine) {
  Start(JobYaml(4));
  const std::string id = Start(JobYaml(4, absl::StrCat("output_dir: ", (dir_ / "later/out").string(), "\n")));
  WriteText(dir_ / "later", "a file");
  Cancel(Job(launcher_.started()[0].job_id).id());
  launcher_.End(launcher_.started()[0].job_id, 1, 143);
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "FAILED");
  EXPECT_THAT(Job(id).reason(), HasSubstr("is not a folder"));
  EXPECT_EQ(launcher_.started().size(), 1u);
}

TEST_F(DispatcherTest, AFolderThatNobodyCanMakeIsTriedOnce) {
  if (geteuid() != 0) GTEST_SKIP() << "it is refused at the submit of any other account";
  const std::string id = Start(JobYaml(4, "output_dir: /proc/simpo/out\n"));
  EXPECT_EQ(State(id), "FAILED");
  EXPECT_THAT(Job(id).reason(), HasSubstr("cannot be made"));
  EXPECT_THAT(launcher_.started(), ::testing::IsEmpty());
}

TEST_F(DispatcherTest, AStopIsHeardAfterTheWelcome) {
  const std::string id = Start(JobYaml(1));
  AttachAll(id, 1, 1);
  Say(id, 1, 0, StepMessage(1));
  const auto channel = std::make_shared<FakeChannel>();
  v1::Hello hello;
  hello.set_job_id(id);
  hello.set_attempt(1);
  hello.set_world_size(1);
  dispatcher_->Attach(hello, channel, now_);
  Cancel(id);
  ASSERT_EQ(channel->sent().size(), 2u);
  EXPECT_TRUE(channel->sent()[0].has_welcome());
  EXPECT_TRUE(channel->sent()[1].has_command());
}

}  // namespace
}  // namespace simpo
