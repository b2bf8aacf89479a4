// Jobs that are submitted, wait, and are kept: what a Dispatcher answers, and in which order it starts them.
#include "dispatcher_fixture.h"

namespace simpo {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

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
