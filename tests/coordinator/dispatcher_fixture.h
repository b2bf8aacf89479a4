// A Dispatcher that is told stories of jobs moment by moment. No thread, no process, no waiting.
#ifndef SIMPO_TESTS_COORDINATOR_DISPATCHER_FIXTURE_H_
#define SIMPO_TESTS_COORDINATOR_DISPATCHER_FIXTURE_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "coordinator/dispatcher.h"
#include "testing.h"

namespace simpo {

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
  void Pass(std::chrono::milliseconds time) {
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
  Moment now_{.steady = SteadyTime(std::chrono::seconds(100'000)), .unix_ms = 1'700'000'000'000};
  Dispatcher::Options options_;
  FakeLauncher launcher_;
  Scheduler::Options queue_;  // counts from StartCoordinator on
  Stores stores_;
  std::optional<JobViews> views_;
  std::optional<Dispatcher> dispatcher_;
};

}  // namespace simpo

#endif  // SIMPO_TESTS_COORDINATOR_DISPATCHER_FIXTURE_H_
