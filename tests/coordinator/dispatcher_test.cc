// Stories of jobs, told to a Dispatcher moment by moment. No thread, no process, no waiting.
#include "coordinator/dispatcher.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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

  absl::StatusOr<v1::SubmitJobResponse> Submit(const std::string& yaml, const std::string& request_id = "") {
    absl::StatusOr<v1::SubmitJobResponse> result = absl::UnknownError("not answered");
    const Submission submission = CheckSubmission(SubmitRequest(yaml, request_id), 4);
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

TEST_F(DispatcherTest, QueueByPriorityThenAgeWithReasons) {
  const std::string running = Start(JobYaml(4));
  const std::string old = Start(JobYaml(3));
  const std::string young = Start(JobYaml(1));
  const std::string urgent = Start(JobYaml(2, "priority: 9\n"));
  EXPECT_EQ(State(old), "QUEUED");
  EXPECT_EQ(Job(urgent).reason(), "waiting: 0 of 4 slots free, needs 2");
  EXPECT_THAT(Job(old).reason(), HasSubstr("1 job ahead"));
  launcher_.End(running, 1, 0);
  Pass(milliseconds(200));
  EXPECT_EQ(State(urgent), "LAUNCHING");
  EXPECT_EQ(State(old), "QUEUED");
  EXPECT_EQ(State(young), "QUEUED") << "it must not pass a job that waits for slots";
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

  launcher_.End(id, 2, 143);  // nobody had asked for it
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

TEST_F(DispatcherTest, AGangThatCannotBeStartedIsAFault) {
  launcher_.FailStarts(absl::UnavailableError("disk full"));
  const std::string id = Start(JobYaml(1, "max_restarts: 0\n"));
  EXPECT_EQ(State(id), "FAILED");
  EXPECT_THAT(Job(id).reason(), HasSubstr("disk full"));
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
    for (int rank : {0, 1}) Say(id, 1, rank, HeartbeatMessage("checkpoint"));
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
  const std::string yaml = JobYaml(1, absl::StrCat("output_dir: ", (dir_ / "out").string(), "\n"));
  const std::string id = Start(yaml);
  const auto second = Submit(yaml);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(id));
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
  dispatcher_->Submit(CheckSubmission(SubmitRequest(JobYaml()), 4), "", now_,
                      [&](auto answer) { answered = answer.ok(); });
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
  EXPECT_TRUE(again->closed()) << "there is nothing more to say";
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
  const Submission submission = CheckSubmission(SubmitRequest(JobYaml()), 4);
  dispatcher_->Submit(submission, "", now_, [&](auto result) {
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
