#include "simpoctl/follow.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <thread>
#include <vector>

#include "simpoctl/exit_codes.h"
#include "tests/simpoctl/fake_service.h"
#include "tests/simpoctl/test_jobs.h"

namespace simpo {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

using Writer = grpc::ServerWriter<v1::WatchJobResponse>;

struct Outcome {
  absl::StatusOr<int> code;
  std::string out;
  std::string err;
};

class Follow : public ::testing::Test {
 protected:
  Follow() {
    service_.on_get = [this](const v1::GetJobRequest&, v1::GetJobResponse* response) {
      *response->mutable_job() = job_;
      return grpc::Status::OK;
    };
  }

  Outcome Run(const FollowOptions& options = {}) {
    ::testing::internal::CaptureStdout();
    ::testing::internal::CaptureStderr();
    Client client(service_.address(), "simpoctl");
    Outcome outcome;
    service_.Settle();
    outcome.code = FollowJob(client, "first", options);
    service_.Settle();
    outcome.err = ::testing::internal::GetCapturedStderr();
    outcome.out = ::testing::internal::GetCapturedStdout();
    return outcome;
  }

  static void Send(Writer* writer, const v1::Job& job, std::vector<v1::JobEvent> events = {}) {
    v1::WatchJobResponse response;
    *response.mutable_job() = job;
    for (v1::JobEvent& event : events) *response.add_events() = std::move(event);
    writer->Write(response);
  }

  // The client's cancellation reaches the handler.
  static bool WaitUntilCancelled(grpc::ServerContext* context) {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(30);
    while (!context->IsCancelled() && std::chrono::steady_clock::now() < deadline) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    return context->IsCancelled();
  }

  v1::Job job_ = RunningJob();
  FakeService service_;
};

TEST_F(Follow, TheExitCodeTellsTheEnd) {
  for (const auto& [state, code] : {std::pair(v1::JOB_STATE_SUCCEEDED, 0), std::pair(v1::JOB_STATE_FAILED, 100),
                                    std::pair(v1::JOB_STATE_CANCELLED, 103)}) {
    service_.on_watch = [state = state](grpc::ServerContext*, const v1::WatchJobRequest&, Writer* writer) {
      Send(writer, RunningJob());
      Send(writer, EndedJob(state));
      return grpc::Status::OK;
    };
    const Outcome outcome = Run();
    EXPECT_EQ(*outcome.code, code);
    EXPECT_THAT(outcome.out, HasSubstr("Job ab12cd (first) "));
    EXPECT_THAT(outcome.err, HasSubstr("step 58/120"));
  }
}

TEST_F(Follow, WhatComesAfterTheLastStateIsShownToo) {
  service_.on_watch = [](grpc::ServerContext*, const v1::WatchJobRequest&, Writer* writer) {
    Send(writer, EndedJob(v1::JOB_STATE_SUCCEEDED));
    Send(writer, EndedJob(v1::JOB_STATE_SUCCEEDED), {Event(9, "exported", "late")});
    return grpc::Status::OK;
  };
  EXPECT_THAT(Run().err, HasSubstr("exported: late"));
}

TEST_F(Follow, GoesOnAfterTheLastEventWhenTheCoordinatorRestarts) {
  std::vector<int64_t> asked;
  service_.on_watch = [&](grpc::ServerContext*, const v1::WatchJobRequest& request, Writer* writer) {
    asked.push_back(request.after_sequence());
    if (asked.size() == 1) {
      Send(writer, RunningJob(), {Event(6, "running", "r"), Event(7, "checkpoint", "c")});
      return grpc::Status(grpc::StatusCode::UNAVAILABLE, "the coordinator is stopping");
    }
    if (asked.size() == 2) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "not yet");
    if (asked.size() == 3) {
      Send(writer, RunningJob());
      return grpc::Status::OK;  // an orderly end of the coordinator, not of the job
    }
    Send(writer, EndedJob(v1::JOB_STATE_SUCCEEDED), {Event(8, "succeeded", "s")});
    return grpc::Status::OK;
  };
  const Outcome outcome = Run();
  EXPECT_EQ(*outcome.code, 0);
  EXPECT_THAT(asked, ElementsAre(0, 7, 7, 7));
  // Told once per loss, however many tries it takes.
  size_t told = 0;
  for (size_t at = 0; (at = outcome.err.find("Lost the coordinator", at)) != std::string::npos; ++at) ++told;
  EXPECT_EQ(told, 2u);
  EXPECT_THAT(outcome.err, HasSubstr("Connected again."));
  EXPECT_EQ(outcome.err.find("checkpoint: c"), outcome.err.rfind("checkpoint: c"));
}

TEST_F(Follow, AnErrorThatIsNoLossEndsIt) {
  service_.on_watch = [](grpc::ServerContext*, const v1::WatchJobRequest&, Writer*) {
    return grpc::Status(grpc::StatusCode::NOT_FOUND, "there is no job 'first'");
  };
  EXPECT_EQ(ExitCodeOf(Run().code.status()), kExitNotFound);
}

TEST_F(Follow, WaitIsQuiet) {
  service_.on_watch = [](grpc::ServerContext*, const v1::WatchJobRequest&, Writer* writer) {
    Send(writer, RunningJob(), {Event(1, "running", "r")});
    Send(writer, EndedJob(v1::JOB_STATE_FAILED));
    return grpc::Status::OK;
  };
  const Outcome outcome = Run({.quiet = true, .timeout = {}});
  EXPECT_EQ(*outcome.code, 100);
  EXPECT_THAT(outcome.err, IsEmpty());
  EXPECT_THAT(outcome.out, HasSubstr("FAILED"));
}

TEST_F(Follow, WaitOfAnEndedJobIsAnsweredEvenWithoutTime) {
  job_ = EndedJob(v1::JOB_STATE_CANCELLED);
  EXPECT_EQ(*Run({.quiet = true, .timeout = std::chrono::seconds(0)}).code, 103);
}

TEST_F(Follow, TheTimeoutLeavesTheJobAlone) {
  service_.on_watch = [](grpc::ServerContext* context, const v1::WatchJobRequest&, Writer* writer) {
    Send(writer, RunningJob());
    EXPECT_TRUE(WaitUntilCancelled(context));
    return grpc::Status::CANCELLED;
  };
  const Outcome outcome = Run({.quiet = true, .timeout = std::chrono::seconds(1)});
  EXPECT_EQ(*outcome.code, kExitNotFinished);
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("Not finished within 1 s"), HasSubstr("simpoctl wait ab12cd")));
}

TEST_F(Follow, CtrlCDetaches) {
  service_.on_watch = [](grpc::ServerContext* context, const v1::WatchJobRequest&, Writer* writer) {
    Send(writer, RunningJob());
    std::raise(SIGINT);
    EXPECT_TRUE(WaitUntilCancelled(context));
    return grpc::Status::CANCELLED;
  };
  const Outcome outcome = Run();
  EXPECT_EQ(*outcome.code, kExitNotFinished);
  EXPECT_THAT(outcome.err, AllOf(HasSubstr("Detached; job ab12cd goes on"), HasSubstr("simpoctl watch ab12cd")));
  EXPECT_THAT(outcome.out, Not(HasSubstr("Job ab12cd")));
}

}  // namespace
}  // namespace simpo
