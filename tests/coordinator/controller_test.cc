// Many threads at one controller, without gRPC: so that under the thread sanitizer every lock is ours
// and seen.
#include "coordinator/controller.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "coordinator/rpc_stats.h"
#include "coordinator/stream_pump.h"
#include "coordinator/training_service.h"
#include "testing.h"

namespace simpo {
namespace {

class ControllerTest : public ::testing::Test {
 protected:
  ControllerTest() {
    Dispatcher::Options options;
    options.slots_total = 4;
    options.outputs_dir = dir_ / "outputs";
    dispatcher_.emplace(options, *stores_.database, *stores_.jobs, *stores_.metrics, views_);
    views_.SetListener([this] { pump_.Wake(); });
    EXPECT_TRUE(dispatcher_->Load(Moment::Now()).ok());
    controller_.emplace(*dispatcher_, [](const absl::Status& status) { ADD_FAILURE() << status; });
    stores_.metrics->SetListener([this] { controller_->Wake(); });
    controller_->Start(launcher_);
  }

  // Answered or refused: one of both always comes.
  absl::StatusOr<v1::SubmitJobResponse> Submit(const std::string& request_id) {
    std::atomic<bool> answered = false;
    absl::StatusOr<v1::SubmitJobResponse> result = absl::UnknownError("not answered");
    controller_->Submit(CheckSubmission(SubmitRequest(JobYaml(), request_id), 4), request_id, [&](auto answer) {
      result = std::move(answer);
      answered = true;
    });
    EXPECT_TRUE(Eventually([&] { return answered.load(); }));
    return result;
  }

  TempDir dir_;
  Stores stores_ = Stores::Open(dir_ / "test.db");
  FakeLauncher launcher_;
  JobViews views_;
  StreamPump pump_;
  std::optional<Dispatcher> dispatcher_;
  std::optional<Controller> controller_;
};

TEST_F(ControllerTest, ManyThreadsSubmitReportReadAndCancel) {
  constexpr int kThreads = 8, kJobs = 5, kSteps = 20;
  std::atomic<bool> done = false;
  std::atomic<int> taken = 0;
  std::thread reader([&] {
    while (!done) {
      for (const JobViews::View& view : views_.All()) EXPECT_FALSE(view->job.id().empty());
      EXPECT_LE(SlotsTaken(views_), 4);
      EXPECT_GE(controller_->stats().points, 0);
      std::this_thread::yield();
    }
  });
  std::vector<std::thread> users;
  for (int user = 0; user < kThreads; ++user) {
    users.emplace_back([&, user] {
      for (int i = 0; i < kJobs; ++i) {
        const auto response = Submit(absl::StrCat(user, "-", i));
        ASSERT_TRUE(response.ok()) << response.status();
        const std::string id = response->job().id();
        EXPECT_TRUE(views_.FindById(id)) << "seen by everyone once it is answered";
        v1::Hello hello;
        hello.set_job_id(id);
        hello.set_attempt(1);
        hello.set_world_size(1);
        const auto channel = std::make_shared<FakeChannel>();
        controller_->Attach(hello, channel);
        for (int step = 1; step <= kSteps; ++step)
          controller_->Receive({id, 1, 0}, StepMessage(step), [&] { ++taken; });
        controller_->Leave({id, 1, 0}, channel);
        controller_->Cancel(id, [](const auto& answer) { EXPECT_TRUE(answer.ok()); });
        EXPECT_TRUE(Eventually([&] { return channel->closed().has_value(); }));
        launcher_.End(id, 1, 143);
      }
    });
  }
  for (std::thread& user : users) user.join();
  EXPECT_TRUE(Eventually([&] {
    for (const JobViews::View& view : views_.All()) {
      if (!IsFinal(view->job.state())) return false;
    }
    return true;
  }));
  done = true;
  reader.join();
  EXPECT_EQ(views_.All().size(), static_cast<size_t>(kThreads * kJobs));
  EXPECT_EQ(taken, kThreads * kJobs * kSteps);
}

TEST_F(ControllerTest, StopAnswersEverybody) {
  std::atomic<int> answers = 0;
  std::vector<std::thread> users;
  for (int user = 0; user < 4; ++user) {
    users.emplace_back([&, user] {
      for (int i = 0; i < 50; ++i) {
        const std::string request = absl::StrCat(user, "-", i);
        controller_->Submit(CheckSubmission(SubmitRequest(JobYaml(), request), 4), request, [&](auto) { ++answers; });
      }
    });
  }
  controller_->Stop();
  for (std::thread& user : users) user.join();
  EXPECT_EQ(answers, 200);
  EXPECT_EQ(Submit("late").status().code(), absl::StatusCode::kUnavailable);
  // Whatever was accepted is on disk.
  EXPECT_EQ(ValueOf(stores_.jobs->LoadJobs()).size(), views_.All().size());
}

// As while the disk hangs: what waits is bounded by number and by size, and each is answered in the end.
TEST_F(ControllerTest, OnlySoMuchOfUsersWaits) {
  int answers = 0, waiting = 0;
  absl::Status refused;
  {
    Controller never_started(*dispatcher_, [](const absl::Status&) {});
    const auto fill = [&](const std::function<void(const std::function<void(absl::Status)>&)>& ask) {
      for (refused = absl::OkStatus(); refused.ok() && waiting < 500'000; ++waiting) {
        ask([&](absl::Status status) {
          ++answers;
          refused = std::move(status);
        });
      }
    };
    Submission large = CheckSubmission(SubmitRequest(JobYaml()), 4);
    large.config.chat_template = std::string(1 << 20, 'x');
    fill([&](auto done) { never_started.Submit(large, "", [done](const auto& answer) { done(answer.status()); }); });
    EXPECT_LT(waiting, 200);
    EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(refused.message()), ::testing::HasSubstr("ask again"));
    fill([&](auto done) { never_started.Cancel("job", [done](const auto& answer) { done(answer.status()); }); });
    EXPECT_GT(waiting, 50'000) << "a fleet's calls that come at once are taken";
    EXPECT_LT(waiting, 200'000);
    EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(answers, 2);
  }
  EXPECT_EQ(answers, waiting);
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
}

// A stream that counts its pumps and is over after some.
class CountedStream final : public PumpedStream {
 public:
  explicit CountedStream(int pumps) : left_(pumps) {}
  bool Pump(bool stop) override { return !stop && --left_ > 0; }
  bool over() const { return left_ <= 0; }

 private:
  std::atomic<int> left_;
};

TEST(StreamPumpTest, FeedsEveryStreamUntilItIsOver) {
  StreamPump pump;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      const auto stream = std::make_shared<CountedStream>(3);
      pump.Add(stream);
      EXPECT_TRUE(Eventually([&] {
        pump.Wake();
        return stream->over();
      }));
      EXPECT_TRUE(Eventually([&] { return stream.use_count() == 1; })) << "a stream that is over is let go";
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto endless = std::make_shared<CountedStream>(1'000'000);
  pump.Add(endless);
  pump.Stop();
  EXPECT_TRUE(Eventually([&] { return endless.use_count() == 1; }));
}

TEST(RpcStatsTest, ByMethodAndCode) {
  RpcStats stats;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int j = 0; j < 100; ++j) stats.Add("GetJob", absl::StatusCode::kOk, 0.01);
      stats.Add("GetJob", absl::StatusCode::kNotFound, 1);
    });
  }
  for (std::thread& thread : threads) thread.join();
  const auto durations = stats.Get();
  EXPECT_EQ(durations.at({"GetJob", "OK"}).count, 400);
  EXPECT_EQ(durations.at({"GetJob", "NOT_FOUND"}).sum, 4);
}

}  // namespace
}  // namespace simpo
