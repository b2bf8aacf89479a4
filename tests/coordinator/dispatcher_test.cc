// Stories of jobs, told to a Dispatcher moment by moment. No thread, no process, no waiting.
#include "coordinator/dispatcher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "testing.h"

namespace simpo {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class DispatcherTest : public ::testing::Test {
 protected:
  DispatcherTest() { StartCoordinator(); }

  // A new coordinator on the same database; what the last one had in memory is gone.
  void StartCoordinator() {
    LoadAnew();
    dispatcher_->Adopt(launcher_, now_);
    Flush();
  }
  void LoadAnew() {
    dispatcher_.reset();
    views_.emplace();
    stores_ = {};
    stores_ = Stores::Open(dir_ / "test.db");
    options_.slots_total = 4;
    options_.outputs_dir = dir_ / "outputs";
    options_.queue = queue_;
    options_.restart.jitter = 0;
    dispatcher_.emplace(options_, *stores_.database, *stores_.jobs, *stores_.metrics, *views_);
    ASSERT_OK(dispatcher_->Load(now_));
  }
  void Flush() { ASSERT_OK(dispatcher_->FlushAll(now_)); }
  void Pass(milliseconds time) {
    now_.steady += time;
    now_.unix_ms += time.count();
    dispatcher_->Tick(now_);
    Flush();
  }

  Submission Prepared(const v1::SubmitJobRequest& request) {
    Submission submission = CheckSubmission(request, 4);
    EXPECT_TRUE(dispatcher_->Prepare(submission).ok());
    return submission;
  }
  absl::StatusOr<v1::SubmitJobResponse> Submit(const std::string& yaml, const std::string& request_id = "") {
    absl::StatusOr<v1::SubmitJobResponse> result = absl::UnknownError("not answered");
    const Submission submission = Prepared(SubmitRequest(yaml, request_id));
    EXPECT_TRUE(submission.violations.empty());
    dispatcher_->Submit(submission, request_id, now_, [&](auto answer) { result = std::move(answer); });
    Flush();
    return result;
  }
  std::string Start(const std::string& yaml) { return Submit(yaml)->job().id(); }
  v1::Job Cancel(const std::string& id) {
    absl::StatusOr<v1::CancelJobResponse> result = absl::UnknownError("not answered");
    dispatcher_->Cancel(id, now_, [&](auto answer) { result = std::move(answer); });
    Flush();
    return result->job();
  }
  std::vector<std::shared_ptr<FakeChannel>> AttachAll(const std::string& id, int attempt, int ranks) {
    std::vector<std::shared_ptr<FakeChannel>> channels;
    for (int rank = 0; rank < ranks; ++rank) {
      channels.push_back(std::make_shared<FakeChannel>());
      v1::Hello hello;
      hello.set_job_id(id);
      hello.set_attempt(attempt);
      hello.set_rank(rank);
      hello.set_world_size(ranks);
      dispatcher_->Attach(hello, channels.back(), now_);
    }
    Flush();
    return channels;
  }
  void Say(const std::string& id, int attempt, int rank, const v1::AttachRequest& message) {
    dispatcher_->Receive({id, attempt, rank}, message, now_);
    Flush();
  }
  v1::Job Job(const std::string& id) { return views_->FindById(id)->job; }
  std::string State(const std::string& id) { return JobStateName(Job(id).state()); }
  std::vector<std::string> EventTypes(const std::string& id) {
    std::vector<std::string> types;
    for (const v1::JobEvent& event : ValueOf(stores_.jobs->LastEvents(views_->FindById(id)->sequence, 100))) {
      types.push_back(event.type());
    }
    return types;
  }
  std::vector<int64_t> StoredSteps(const std::string& id, const std::string& split = "train") {
    std::vector<int64_t> steps;
    const int64_t job = views_->FindById(id)->sequence;
    for (const auto& point : ValueOf(stores_.metrics->ListPoints(job, split, -1, 1000))) {
      steps.push_back(point.step());
    }
    return steps;
  }

  TempDir dir_;
  Moment now_{.steady = SteadyTime(seconds(100'000)), .unix_ms = 1'700'000'000'000};
  Dispatcher::Options options_;
  FakeLauncher launcher_;
  Scheduler::Options queue_;  // counts from StartCoordinator on
  Stores stores_;
  std::optional<JobViews> views_;
  std::optional<Dispatcher> dispatcher_;
};

TEST_F(DispatcherTest, AJobFromSubmissionToSuccess) {
  const std::string id = Start(JobYaml(2));
  EXPECT_EQ(State(id), "LAUNCHING");
  ASSERT_EQ(launcher_.started().size(), 1u);
  EXPECT_EQ(launcher_.started()[0].ranks, 2);
  EXPECT_FALSE(launcher_.started()[0].resume_latest);
  EXPECT_EQ(launcher_.started()[0].output_dir, dir_ / "outputs" / ("test-" + id));

  const auto channels = AttachAll(id, 1, 2);
  EXPECT_EQ(State(id), "RUNNING");
  ASSERT_FALSE(channels[0]->sent().empty());
  EXPECT_EQ(channels[0]->sent()[0].welcome().last_stored_step(), 0);
  EXPECT_EQ(channels[0]->sent()[0].welcome().last_stored_eval_step(), -1);

  Say(id, 1, 0, HeartbeatMessage("train"));
  Say(id, 1, 0, StepMessage(1, 0.7));
  Say(id, 1, 0, StepMessage(2, 0.6));
  Say(id, 1, 0, StepMessage(2, 0.4, "eval"));
  EXPECT_EQ(channels[0]->acknowledged(), 2);
  const v1::Job job = Job(id);
  EXPECT_EQ(job.progress().phase(), "train");
  EXPECT_EQ(job.progress().step(), 2);
  EXPECT_EQ(job.progress().metrics().at("loss"), 0.6);
  EXPECT_EQ(job.progress().eval_metrics().at("eval_loss"), 0.4);
  EXPECT_DOUBLE_EQ(job.progress().eta_seconds(), 98 * 0.25);

  Say(id, 1, 0, EventMessage("finished", ""));
  launcher_.End(id, 1, 0);
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "SUCCEEDED");
  EXPECT_TRUE(Job(id).has_end_time());
  EXPECT_TRUE(channels[0]->closed());
  EXPECT_THAT(EventTypes(id), ElementsAre("submitted", "launched", "running", "succeeded"));
  EXPECT_THAT(StoredSteps(id), ElementsAre(1, 2));
  EXPECT_THAT(StoredSteps(id, "eval"), ElementsAre(2));
}

TEST_F(DispatcherTest, TheSameRequestIsTheSameJob) {
  const auto first = Submit(JobYaml(), "request-1");
  const auto again = Submit(JobYaml(), "request-1");
  EXPECT_EQ(again->job().id(), first->job().id());
  EXPECT_FALSE(first->already_existed());
  EXPECT_TRUE(again->already_existed());
  EXPECT_EQ(Submit(JobYaml(2), "request-1").status().code(), absl::StatusCode::kAlreadyExists);
  StartCoordinator();
  EXPECT_EQ(Submit(JobYaml(), "request-1")->job().id(), first->job().id());
  EXPECT_EQ(views_->All().size(), 1u);
  EXPECT_EQ(launcher_.started().size(), 1u);
}

// Only the database holds it, so that ended jobs cost little memory for as long as they are kept.
TEST_F(DispatcherTest, TheJobFileIsGivenBackAtAnyTime) {
  const auto first = Submit(JobYaml(), "request-1");
  const std::string id = first->job().id();
  const std::string& yaml = first->job().config_yaml();
  EXPECT_THAT(yaml, HasSubstr("model_name_or_path: \"org/model\""));
  EXPECT_EQ(launcher_.started().at(0).job_yaml, yaml);
  EXPECT_EQ(Submit(JobYaml(), "request-1")->job().config_yaml(), yaml);
  AttachAll(id, 1, 1);
  launcher_.End(id, 1, 75);
  Pass(milliseconds(200));
  StartCoordinator();
  EXPECT_EQ(views_->FindById(id)->info.model, "org/model");
  Pass(seconds(2));
  ASSERT_EQ(launcher_.started().size(), 2u);
  EXPECT_EQ(launcher_.started().at(1).job_yaml, yaml) << "of another attempt, by another coordinator";

  launcher_.End(id, 2, 0);
  Pass(milliseconds(200));
  ASSERT_EQ(State(id), "SUCCEEDED");
  EXPECT_EQ(Submit(JobYaml(), "request-1")->job().config_yaml(), yaml);
  EXPECT_EQ(views_->FindById(id)->info.model, "org/model");
  StartCoordinator();
  EXPECT_EQ(Submit(JobYaml(), "request-1")->job().config_yaml(), yaml);
  EXPECT_EQ(views_->FindById(id)->info.model, "org/model") << "it may still be on the metrics page";
}

TEST_F(DispatcherTest, QueueByPriorityThenAgeWithReasons) {
  const std::string running = Start(JobYaml(4));
  const std::string old = Start(JobYaml(3));
  const std::string young = Start(JobYaml(1));
  const std::string urgent = Start(JobYaml(2, "priority: 9\n"));
  EXPECT_EQ(State(old), "QUEUED");
  EXPECT_EQ(Job(urgent).reason(), "waiting: 1st of 3 in the queue; 0 of 4 slots free, needs 2");
  EXPECT_EQ(Job(old).reason(),
            absl::StrCat("waiting: 2nd of 3 in the queue, behind ", urgent, "; 0 of 4 slots free, needs 3"));
  launcher_.End(running, 1, 0);
  Pass(milliseconds(200));
  EXPECT_EQ(State(urgent), "LAUNCHING");
  EXPECT_EQ(State(old), "QUEUED");
  EXPECT_EQ(State(young), "LAUNCHING") << "when urgent ends there is room for old beside it";
}

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

TEST_F(DispatcherTest, ThePriorityOfAJobCanBeChanged) {
  const auto set = [&](const std::string& id, int priority) {
    absl::StatusOr<v1::SetPriorityResponse> result = absl::UnknownError("not answered");
    dispatcher_->SetPriority(id, priority, now_, [&](auto answer) { result = std::move(answer); });
    Flush();
    return result;
  };
  const std::string running = Start(JobYaml(4));
  const std::string first = Start(JobYaml(4));
  const std::string second = Start(JobYaml(4));
  EXPECT_EQ(set(second, 3)->job().priority(), 3);
  EXPECT_THAT(Job(second).reason(), HasSubstr("1st of 2"));
  EXPECT_THAT(Job(first).reason(), HasSubstr("2nd of 2"));
  EXPECT_THAT(EventTypes(second), ElementsAre("submitted", "priority"));
  EXPECT_EQ(set("nobody", 1).status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(set(first, 1'000'001).status().code(), absl::StatusCode::kInvalidArgument);
  StartCoordinator();
  EXPECT_EQ(Job(second).priority(), 3);
  launcher_.End(running, 1, 0);
  Pass(milliseconds(200));
  EXPECT_EQ(State(second), "LAUNCHING");
  EXPECT_EQ(set(running, 1).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(DispatcherTest, NodesAndWhoHoldsTheirSlots) {
  queue_.nodes = {{.name = "b", .slots = 2}, {.name = "a", .slots = 4, .labels = {{"rack", "r1"}}}};
  StartCoordinator();
  const std::string small = Start(JobYaml(1));
  const std::string large = Start(JobYaml(4));
  const auto check = [&] {
    v1::ListNodesRequest request;
    request.set_page_size(1);
    const v1::ListNodesResponse page = ValueOf(dispatcher_->ListNodes(request));
    ASSERT_EQ(page.nodes_size(), 1);
    const v1::NodeState& a = page.nodes(0);
    EXPECT_EQ(a.name(), "a");
    EXPECT_EQ(a.labels().at("rack"), "r1");
    EXPECT_EQ(a.slots_taken(), 4);
    EXPECT_EQ(a.jobs(0).job_id(), large);
    EXPECT_TRUE(a.up());
    request.set_page_token(page.next_page_token());
    const v1::ListNodesResponse rest = ValueOf(dispatcher_->ListNodes(request));
    ASSERT_EQ(rest.nodes_size(), 1);
    EXPECT_EQ(rest.nodes(0).name(), "b");
    EXPECT_EQ(rest.nodes(0).slots_taken(), 1);
    EXPECT_EQ(rest.nodes(0).jobs(0).job_id(), small);
    EXPECT_EQ(rest.next_page_token(), "");
    request.set_page_size(-1);
    EXPECT_EQ(dispatcher_->ListNodes(request).status().code(), absl::StatusCode::kInvalidArgument);
  };
  check();
  StartCoordinator();  // it reads where gangs run
  check();
  ASSERT_EQ(launcher_.started().size(), 2u);
  EXPECT_THAT(launcher_.started()[1].nodes, ElementsAre("a"));
}

TEST_F(DispatcherTest, WhatCanNeverStartIsRefused) {
  queue_.user_quotas = {{"alice", 2}};
  StartCoordinator();
  const auto refused = Submit(JobYaml(3));
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("user alice may have 2 at a time"));
  EXPECT_TRUE(Submit(JobYaml(2)).ok());
  // A quota that shrinks later leaves the job where it is, and says so.
  const std::string id = Start(JobYaml(2));
  queue_.user_quotas = {{"alice", 1}};
  StartCoordinator();
  EXPECT_THAT(Job(id).reason(), HasSubstr("can never start here: it needs 2 slots, and user alice may have 1"));
}

TEST_F(DispatcherTest, EveryJobOfALongQueueLearnsItsPlace) {
  Start(JobYaml(4));
  std::vector<std::string> waiting;
  for (int i = 0; i < 500; ++i) waiting.push_back(Start(JobYaml(1)));
  for (int i = 0; i < 3; ++i) Pass(milliseconds(200));
  for (size_t i = 0; i < waiting.size(); ++i) {
    EXPECT_THAT(Job(waiting[i]).reason(), HasSubstr(absl::StrCat(i + 1)));
    EXPECT_THAT(Job(waiting[i]).reason(), HasSubstr(" of 500 in the queue"));
  }
  Cancel(waiting[0]);
  for (int i = 0; i < 3; ++i) Pass(milliseconds(200));
  EXPECT_THAT(Job(waiting[499]).reason(), HasSubstr("499th of 499 in the queue"));
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

TEST_F(DispatcherTest, AClockThatWasSetMovesNoLimitAfterARestartEither) {
  for (const auto jump : {std::chrono::hours(24), std::chrono::hours(-24)}) {
    const std::string id = Start(JobYaml(4, "time_limit: 10m\n"));
    AttachAll(id, 1, 4);
    Pass(seconds(30));
    now_.unix_ms += milliseconds(jump).count();
    Pass(seconds(30));
    launcher_.Lose(id, 1, "gone");
    Pass(seconds(1));
    ASSERT_EQ(State(id), "RESTARTING");
    EXPECT_NEAR(views_->FindById(id)->attempts[0].run_seconds(), 60, 1);
    StartCoordinator();
    Pass(seconds(2));
    ASSERT_EQ(State(id), "LAUNCHING");
    AttachAll(id, 2, 4);
    Pass(seconds(530));
    EXPECT_EQ(State(id), "RUNNING");
    Pass(seconds(20));
    EXPECT_EQ(State(id), "CANCELLING") << "ten minutes have passed in all";
    launcher_.End(id, 2, 143);
    Pass(seconds(1));
    ASSERT_EQ(State(id), "CANCELLED");
  }
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

// Nobody was there when it ended, for much longer than it may run.
TEST_F(DispatcherTest, TimeAfterAnUnseenEndIsNoTimeOfTheJob) {
  constexpr int64_t kSecond = 1'000;
  const std::string id = Start(JobYaml(1, "time_limit: 10m\n"));
  AttachAll(id, 1, 1);
  const int64_t began = now_.unix_ms;
  launcher_.End(id, 1, 75, began + 120 * kSecond);
  now_.steady += seconds(7200);
  now_.unix_ms += 7200 * kSecond;
  StartCoordinator();
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "RESTARTING");
  EXPECT_EQ(UnixMillis(views_->FindById(id)->attempts[0].end_time()), began + 120 * kSecond);
  Pass(seconds(2));
  ASSERT_EQ(State(id), "LAUNCHING");

  // Lost, and nobody knows when: it has reported after 60 seconds.
  AttachAll(id, 2, 1);
  for (int i = 0; i < 60; ++i) Pass(seconds(1));
  Say(id, 2, 0, StepMessage(1));
  launcher_.Lose(id, 2, "the machine was restarted");
  now_.steady += seconds(7200);
  now_.unix_ms += 7200 * kSecond;
  LoadAnew();
  dispatcher_->Adopt(launcher_, now_);
  Flush();
  StartCoordinator();  // the one before has adopted it and was gone before it looked
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "RESTARTING");
  Pass(seconds(3));
  ASSERT_EQ(State(id), "LAUNCHING");

  // One that was to be started two hours ago begins now.
  FakeLauncher fresh;
  now_.steady += seconds(7200);
  now_.unix_ms += 7200 * kSecond;
  LoadAnew();
  dispatcher_->Adopt(fresh, now_);
  Flush();
  ASSERT_EQ(fresh.started().size(), 1u);
  EXPECT_EQ(UnixMillis(views_->FindById(id)->attempts[2].start_time()), now_.unix_ms);
  AttachAll(id, 3, 1);
  Pass(seconds(600 - 120 - 60 - 5));
  EXPECT_EQ(State(id), "RUNNING") << Job(id).reason();
  Pass(seconds(10));
  EXPECT_EQ(State(id), "CANCELLING");
}

TEST_F(DispatcherTest, ANewCoordinatorAdoptsWhatRuns) {
  const std::string id = Start(JobYaml(2));
  AttachAll(id, 1, 2);
  Say(id, 1, 0, StepMessage(1));
  Say(id, 1, 0, StepMessage(2));
  Say(id, 1, 0, EventMessage("checkpoint", "checkpoint after step 2", 2));
  StartCoordinator();
  EXPECT_EQ(State(id), "RUNNING");
  EXPECT_EQ(launcher_.started().size(), 1u) << "never started twice";
  EXPECT_EQ(launcher_.Count("publish"), 1);
  EXPECT_EQ(Job(id).progress().step(), 2);
  EXPECT_EQ(Job(id).progress().checkpoint_step(), 2);
  EXPECT_NE(views_->FindById(id)->checkpoint_ms, 0);

  const auto channels = AttachAll(id, 1, 2);
  EXPECT_EQ(channels[0]->sent()[0].welcome().last_stored_step(), 2);
  Say(id, 1, 0, EventMessage("checkpoint", "checkpoint after step 2", 2));  // nobody had confirmed it
  for (int step = 3; step <= 4; ++step) Say(id, 1, 0, StepMessage(step));
  Say(id, 1, 0, EventMessage("finished", ""));
  launcher_.End(id, 1, 0);
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "SUCCEEDED");
  EXPECT_EQ(Job(id).attempt(), 1);
  EXPECT_THAT(StoredSteps(id), ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(EventTypes(id), ElementsAre("submitted", "launched", "running", "checkpoint", "adopted", "succeeded"));
}

TEST_F(DispatcherTest, AdoptedRanksHaveTheHeartbeatTimeToBeBack) {
  const std::string id = Start(JobYaml(1));
  AttachAll(id, 1, 1);
  StartCoordinator();
  Pass(seconds(29));
  EXPECT_EQ(launcher_.Count("terminate"), 0) << "unreachable is not failed";
  Pass(seconds(2));
  EXPECT_EQ(launcher_.Count("terminate"), 1);
}

// The database says LAUNCHING, but the launcher has never heard of it.
TEST_F(DispatcherTest, AStartThatTheCrashPreventedIsMadeUpFor) {
  const std::string id = Start(JobYaml(1));
  FakeLauncher fresh;
  LoadAnew();
  dispatcher_->Adopt(fresh, now_);
  Pass(milliseconds(200));  // the first look at it comes before the start, and must not find it lost
  ASSERT_EQ(fresh.started().size(), 1u);
  EXPECT_EQ(fresh.started()[0].attempt, 1);
  EXPECT_EQ(State(id), "LAUNCHING");
  EXPECT_EQ(Job(id).restarts(), 0);
}

TEST_F(DispatcherTest, AStartThatTheCrashPreventedCanBeCancelled) {
  const std::string id = Start(JobYaml(1));
  FakeLauncher fresh;
  LoadAnew();
  dispatcher_->Adopt(fresh, now_);
  Cancel(id);
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "CANCELLED");
  EXPECT_TRUE(fresh.started().empty());
}

TEST_F(DispatcherTest, PointsOfAGangThatEndedWithoutACoordinatorAreTakenFromItsFile) {
  const std::string id = Start(JobYaml(1));
  AttachAll(id, 1, 1);
  Say(id, 1, 0, StepMessage(1, 0.5));
  const std::filesystem::path output = Job(id).output_dir();
  WriteText(output / "metrics.jsonl",
            "{\"step\":1,\"loss\":0.5}\n{\"step\":2,\"loss\":0.25}\n{\"step\":3,\"loss\":\"NaN\"}\n{\"step\":4,\"lo");
  WriteText(output / "eval_metrics.jsonl", "{\"step\":0,\"eval_loss\":0.75}\n");
  launcher_.End(id, 1, 0);
  StartCoordinator();
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "SUCCEEDED");
  EXPECT_THAT(StoredSteps(id), ElementsAre(1, 2, 3));
  EXPECT_THAT(StoredSteps(id, "eval"), ElementsAre(0));
}

TEST_F(DispatcherTest, RanksThatTrainAndAreLostBeforeTheyHaveReportedHaveTheirFolder) {
  // The coordinator was away from their start to their end.
  const std::string id = Start(JobYaml(1));
  const std::filesystem::path output = Job(id).output_dir();
  WriteText(output / "metrics.jsonl", "{\"step\":1,\"loss\":0.5}\n{\"step\":2,\"loss\":0.25}\n");
  launcher_.Lose(id, 1, "killed");
  StartCoordinator();
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "RESTARTING");
  EXPECT_THAT(StoredSteps(id), ElementsAre(1, 2));
  Pass(seconds(2));
  ASSERT_EQ(launcher_.started().size(), 2u);
  EXPECT_TRUE(launcher_.started()[1].resume_latest) << "the worker would refuse the folder as another run's";

  // The next one resumes after step 1 and ends unheard too: only what is new is stored as its own.
  WriteText(output / "metrics.jsonl",
            "{\"step\":1,\"loss\":0.5}\n{\"step\":2,\"loss\":0.25}\n{\"step\":3,\"loss\":0.125}\n");
  launcher_.End(id, 2, 0);
  StartCoordinator();
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "SUCCEEDED");
  const auto points = ValueOf(stores_.metrics->ListPoints(1, "train", 0, 10));
  ASSERT_EQ(points.size(), 3u);
  EXPECT_EQ(points[1].attempt(), 1);
  EXPECT_EQ(points[2].attempt(), 2);
}

TEST_F(DispatcherTest, AnotherRunsFolderIsNotTakenForAJobsOwn) {
  const std::filesystem::path output = dir_ / "another";
  WriteText(output / "metrics.jsonl", "{\"step\":1,\"loss\":0.5}\n");
  const std::string id = Start(JobYaml(1, "output_dir: " + output.string() + "\n"));
  launcher_.Lose(id, 1, "killed before it had looked at the folder");
  Pass(milliseconds(200));
  EXPECT_THAT(StoredSteps(id), ElementsAre());
  Pass(seconds(2));
  ASSERT_EQ(launcher_.started().size(), 2u);
  EXPECT_FALSE(launcher_.started()[1].resume_latest);
}

TEST_F(DispatcherTest, AnAdoptedCancelIsGoneOnWith) {
  const std::string id = Start(JobYaml(1));
  AttachAll(id, 1, 1);
  Say(id, 1, 0, StepMessage(1));
  Cancel(id);
  StartCoordinator();
  const auto channels = AttachAll(id, 1, 1);
  EXPECT_TRUE(channels[0]->WasToldToStop());
  launcher_.End(id, 1, 143);
  Pass(milliseconds(200));
  EXPECT_EQ(State(id), "CANCELLED");
}

TEST_F(DispatcherTest, PausesSurviveARestart) {
  const std::string id = Start(JobYaml(1));
  launcher_.End(id, 1, 75);
  Pass(milliseconds(200));
  StartCoordinator();
  EXPECT_EQ(State(id), "RESTARTING");
  Pass(milliseconds(1100));
  EXPECT_EQ(State(id), "LAUNCHING");
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

TEST_F(DispatcherTest, TwoLiveJobsDoNotShareAnOutputFolder) {
  std::filesystem::create_directories(dir_ / "a/out");
  std::filesystem::create_symlink(dir_ / "a/out", dir_ / "link");
  const auto yaml = [&](const char* folder) {
    return JobYaml(1, absl::StrCat("output_dir: ", dir_.path().string(), "/", folder, "\n"));
  };
  const std::string id = Start(yaml("a/out"));
  const auto folders = {"a/out", "a/out/", "a//./out/.", "a/x/../out", "link", "link/sub", "a/out/sub/deep", "a"};
  for (const char* folder : folders) {
    const auto second = Submit(yaml(folder));
    EXPECT_EQ(second.status().code(), absl::StatusCode::kInvalidArgument) << folder;
    EXPECT_THAT(std::string(second.status().message()), HasSubstr(id)) << folder;
  }
  for (const char* folder : {"a/out-2", "a/ou", "a/out!"}) EXPECT_TRUE(Submit(yaml(folder)).ok()) << folder;
  Cancel(id);
  launcher_.End(id, 1, 143);
  Pass(milliseconds(200));
  EXPECT_TRUE(Submit(yaml("link/sub")).ok()) << "nobody writes there any more";
}

TEST_F(DispatcherTest, AUserMayHaveSoManyJobs) {
  options_.max_jobs_per_user = 3;
  StartCoordinator();
  const std::string id = Start(JobYaml(4));
  for (int i = 0; i < 2; ++i) ASSERT_OK(Submit(JobYaml(), absl::StrCat("id-", i)).status());
  const auto refused = [&] {
    const absl::Status status = Submit(JobYaml()).status();
    EXPECT_THAT(std::string(status.message()), HasSubstr("user alice has 3 jobs")) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("--max-jobs-per-user"));
    return status.code() == absl::StatusCode::kResourceExhausted;
  };
  EXPECT_TRUE(refused());
  EXPECT_TRUE(Submit(JobYaml(), "id-0")->already_existed()) << "is no new job";
  v1::SubmitJobRequest request = SubmitRequest(JobYaml());
  request.set_user("bob");
  bool bob = false;
  dispatcher_->Submit(Prepared(request), "", now_, [&](const auto& answer) { bob = answer.ok(); });
  Flush();
  EXPECT_TRUE(bob);
  StartCoordinator();
  EXPECT_TRUE(refused()) << "a new coordinator counts the same";
  Cancel(id);
  launcher_.End(id, 1, 143);
  Pass(milliseconds(200));
  EXPECT_TRUE(Submit(JobYaml()).ok());
  EXPECT_TRUE(refused());
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

TEST_F(DispatcherTest, PointsThatWaitForTheirDiskHoldUpNoState) {
  const std::string id = Start(JobYaml(1));
  const auto channel = AttachAll(id, 1, 1)[0];
  Sqlite other = ValueOf(Sqlite::Open(dir_ / kMetricsFile, /*read_only=*/false));
  ASSERT_OK(other.Execute("BEGIN IMMEDIATE"));  // nobody else can write there now

  dispatcher_->Receive({id, 1, 0}, StepMessage(1), now_);
  ASSERT_OK(dispatcher_->Flush(now_));
  EXPECT_EQ(channel->acknowledged(), -1);
  EXPECT_EQ(Job(id).progress().step(), 0) << "what is shown is stored";
  bool answered = false;
  dispatcher_->Submit(Prepared(SubmitRequest(JobYaml())), "", now_, [&](auto answer) { answered = answer.ok(); });
  ASSERT_OK(dispatcher_->Flush(now_));
  EXPECT_TRUE(answered);
  const auto again = std::make_shared<FakeChannel>();
  v1::Hello hello;
  hello.set_job_id(id);
  hello.set_attempt(1);
  hello.set_world_size(1);
  dispatcher_->Attach(hello, again, now_);
  launcher_.End(id, 1, 0);
  now_.steady += milliseconds(200);
  dispatcher_->Tick(now_);
  ASSERT_OK(dispatcher_->Flush(now_));
  EXPECT_TRUE(again->sent().empty()) << "what it is welcomed with must be stored";
  EXPECT_EQ(State(id), "RUNNING") << "nobody would send the point again after the end";

  ASSERT_OK(other.Execute("COMMIT"));
  Flush();
  EXPECT_TRUE(again->closed()) << "the gang had gone already: there is nobody to welcome";
  EXPECT_EQ(State(id), "SUCCEEDED");
  EXPECT_EQ(Job(id).progress().step(), 1);
  EXPECT_THAT(StoredSteps(id), ElementsAre(1));
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

TEST_F(DispatcherTest, OldJobsAreRemovedWithAllThatIsTheirs) {
  options_.keep_jobs = std::chrono::days(10);
  StartCoordinator();
  const auto run = [&](const std::string& request_id) {
    const std::string id = Submit(JobYaml(1), request_id)->job().id();
    AttachAll(id, 1, 1);
    for (int step = 1; step <= 3; ++step) Say(id, 1, 0, StepMessage(step));
    launcher_.End(id, 1, 0);
    Pass(milliseconds(200));
    EXPECT_EQ(State(id), "SUCCEEDED");
    return id;
  };
  const std::string old = run("old");
  Pass(std::chrono::days(5));
  const std::string young = run("young");
  Pass(std::chrono::days(4));
  EXPECT_TRUE(views_->FindById(old));
  Pass(std::chrono::days(2));
  EXPECT_TRUE(Eventually([&] {
    Pass(milliseconds(200));
    return !views_->FindById(old);
  }));
  EXPECT_EQ(StoredSteps(young).size(), 3u);
  EXPECT_TRUE(ValueOf(stores_.metrics->ListPoints(1, "train", -1, 10)).empty());
  EXPECT_TRUE(ValueOf(stores_.jobs->LastEvents(1, 10)).empty());
  EXPECT_EQ(Cancel(young).state(), v1::JOB_STATE_SUCCEEDED);
  StartCoordinator();
  EXPECT_FALSE(views_->FindById(old));
  EXPECT_EQ(views_->All().size(), 1u);
  EXPECT_FALSE(Submit(JobYaml(1), "old")->already_existed());
}

TEST_F(DispatcherTest, PointsOfJobsThatEndedLongAgoAreThinned) {
  options_.keep_points = std::chrono::days(3);
  StartCoordinator();
  const std::string id = Start(JobYaml(1));
  AttachAll(id, 1, 1);
  for (int step = 1; step <= 2500; ++step) dispatcher_->Receive({id, 1, 0}, StepMessage(step), now_);
  Flush();
  Pass(std::chrono::days(4));
  EXPECT_EQ(stores_.metrics->chores_waiting(), 0u) << "it has not ended";
  launcher_.End(id, 1, 0);
  Pass(milliseconds(200));
  Pass(std::chrono::days(4));
  ASSERT_TRUE(Eventually([&] { return stores_.metrics->chores_waiting() == 0; }));
  EXPECT_EQ(ValueOf(stores_.metrics->ListPoints(1, "train", -1, 9999)).size(), 834u);
}

TEST_F(DispatcherTest, NothingIsAcknowledgedThatIsNotOnDisk) {
  bool answered = false;
  absl::Status answer;
  dispatcher_->Submit(Prepared(SubmitRequest(JobYaml())), "", now_, [&](auto result) {
    answered = true;
    answer = result.status();
  });
  EXPECT_FALSE(answered);
  // The writes so far are lost behind the dispatcher's back, and the commit fails.
  ASSERT_OK(stores_.database->writer().Execute("ROLLBACK"));
  EXPECT_FALSE(dispatcher_->Flush(now_).ok());
  EXPECT_TRUE(answered);
  EXPECT_EQ(answer.code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(launcher_.started().empty());
  EXPECT_TRUE(views_->All().empty());
}

}  // namespace
}  // namespace simpo
