// What a new coordinator makes of the jobs, gangs and clocks that it finds.
#include "dispatcher_fixture.h"

namespace simpo {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using ::testing::ElementsAre;

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

}  // namespace
}  // namespace simpo
