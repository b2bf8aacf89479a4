// What a rank's client and the coordinator make of a connection that breaks at any place of any call of WorkerService:
// every step and event is stored once, every command arrives, and ranks meet.
#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <gtest/gtest.h>

#include <future>
#include <set>
#include <thread>

#include "cut_proxy.h"
#include "tests/coordinator/cardboard_service.h"
#include "worker/coordinator_client.h"
#include "worker/register_rank.h"

namespace simpo {
namespace {

using std::chrono::milliseconds;

constexpr int kSteps = 12;
constexpr char kRegister[] = "/simpo.v1.WorkerService/Register";

class WorkerCallsTest : public ::testing::Test {
 protected:
  CoordinatorClient::Options Options(const std::string& job_id, int rank = 0, int world_size = 1) {
    return {.address = proxy_.address(),
            .job_id = job_id,
            .attempt = 1,
            .secret = absl::StrCat("secret-of-", job_id, "/1"),
            .rank = rank,
            .world_size = world_size,
            .metrics_path = service_.dir / (job_id + ".metrics.jsonl"),
            .eval_metrics_path = service_.dir / (job_id + ".eval_metrics.jsonl")};
  }

  // One run as a trainer reports it.
  void Run(const std::string& id) {
    const CoordinatorClient::Options options = Options(id);
    const auto client = CoordinatorClient::Start(options);
    std::ofstream train(options.metrics_path), eval(options.eval_metrics_path);
    client->SetPhase("train", 0, kSteps);
    for (int step = 1; step <= kSteps; ++step) {
      train << "{\"step\": " << step << ", \"loss\": 0.5}\n" << std::flush;
      client->ReportStep("train", step, {});
      if (step % 4 == 0) {
        eval << "{\"step\": " << step << ", \"eval_loss\": 0.25}\n" << std::flush;
        client->ReportStep("eval", step, {});
        client->ReportEvent("checkpoint", absl::StrCat("checkpoint of step ", step), step);
      }
      client->SetPhase(step % 2 == 0 ? "train" : "eval", step, kSteps);
      std::this_thread::sleep_for(milliseconds(2));
    }
    const auto begin = std::chrono::steady_clock::now();
    client->Finish(0, "done", /*timeout_ms=*/20'000);
    EXPECT_LT(std::chrono::steady_clock::now() - begin, milliseconds(15'000)) << "Finish gave up";
  }

  void ExpectEverythingOnce(const std::string& id) {
    int64_t cursor = 0;
    std::map<std::string, std::vector<int64_t>> steps;
    for (const v1::MetricPoint& point :
         ValueOf(service_.stores.metrics->PointsSince(service_.views.FindById(id)->sequence, &cursor, 1000))) {
      steps[point.split()].push_back(point.step());
      EXPECT_EQ(point.attempt(), 1);
    }
    std::vector<int64_t> all;
    for (int step = 1; step <= kSteps; ++step) all.push_back(step);
    EXPECT_EQ(steps["train"], all);
    EXPECT_EQ(steps["eval"], (std::vector<int64_t>{4, 8, 12}));
    std::vector<std::string> checkpoints;
    for (const v1::JobEvent& event : service_.Events(id)) {
      if (event.type() == "checkpoint") checkpoints.push_back(event.message());
    }
    EXPECT_EQ(checkpoints,
              (std::vector<std::string>{"checkpoint of step 4", "checkpoint of step 8", "checkpoint of step 12"}));
    EXPECT_EQ(service_.CountEvents(id, "launched"), 1);
    service_.launcher.End(id, 1, 0);
    EXPECT_TRUE(service_.Reaches(id, v1::JOB_STATE_SUCCEEDED));
    EXPECT_EQ(service_.Job(id).restarts(), 0);
  }

  // The first frame, the second and so on until a run has no more of them.
  void CutAtEveryFrame(bool of_client) {
    int places = 0;
    for (int frame = 0;; ++frame) {
      SCOPED_TRACE(absl::StrCat("frame ", frame, of_client ? " of the rank" : " of the coordinator"));
      const std::string id = service_.NewJob();
      proxy_.CutFrame(of_client, frame);
      Run(id);
      ExpectEverythingOnce(id);
      if (proxy_.cuts() == 0 || HasFailure()) break;
      ++places;
    }
    EXPECT_GT(places, 10);
    RecordProperty("places", places);
  }

  CardboardService service_;
  CutProxy proxy_{service_.port};
};

TEST_F(WorkerCallsTest, AttachCutAtEveryFrameOfTheRank) { CutAtEveryFrame(/*of_client=*/true); }

TEST_F(WorkerCallsTest, AttachCutAtEveryFrameOfTheCoordinator) { CutAtEveryFrame(/*of_client=*/false); }

TEST_F(WorkerCallsTest, ACommandArrivesHoweverOftenTheStreamBreaks) {
  for (const CutAt at : {CutAt::kRequest, CutAt::kDelivered, CutAt::kAnswer}) {
    for (int message = 0; message < (at == CutAt::kAnswer ? 3 : 1); ++message) {
      SCOPED_TRACE(absl::StrCat("place ", static_cast<int>(at), ", message ", message));
      const std::string id = service_.NewJob();
      const CoordinatorClient::Options options = Options(id);
      proxy_.Arm("/simpo.v1.WorkerService/Attach", at, /*times=*/2, message);
      const auto client = CoordinatorClient::Start(options);
      std::ofstream(options.metrics_path) << "{\"step\": 1, \"loss\": 0.5}\n";
      client->ReportStep("train", 1, {});
      // The coordinator may not have heard of the step yet: then it ends the gang by a signal.
      ASSERT_TRUE(Eventually([&] { return service_.Job(id).progress().step() == 1; }));
      grpc::ClientContext context;
      v1::CancelJobRequest request;
      v1::CancelJobResponse response;
      request.set_job_id(id);
      ASSERT_TRUE(service_.stub->CancelJob(&context, request, &response).ok());
      EXPECT_TRUE(Eventually([&] { return client->TakeCommand() == CoordinatorClient::Command::kStop; }));
      client->Finish(143, "stopped", 20'000);
      service_.launcher.End(id, 1, 143);
      EXPECT_TRUE(service_.Reaches(id, v1::JOB_STATE_CANCELLED));
    }
  }
}

TEST_F(WorkerCallsTest, RegisterIsCalledAgain) {
  for (const CutAt at : {CutAt::kRequest, CutAt::kDelivered, CutAt::kAnswer, CutAt::kEnd}) {
    for (const int times : {1, 3}) {
      SCOPED_TRACE(absl::StrCat("place ", static_cast<int>(at), ", ", times, " times"));
      const std::string id = service_.NewJob(/*ranks=*/2);
      proxy_.Arm(kRegister, at, times);
      const auto meet = [&](int rank) {
        return std::async(std::launch::async, [this, id, rank] {
          return RegisterRank(Options(id, rank, 2), rank == 0 ? "the id" : "", milliseconds(20'000));
        });
      };
      auto first = meet(0), second = meet(1);
      EXPECT_EQ(ValueOf(first.get()), "the id");
      EXPECT_EQ(ValueOf(second.get()), "the id");
      EXPECT_EQ(proxy_.cuts(), times);
      service_.launcher.End(id, 1, 0);
      EXPECT_TRUE(service_.Reaches(id, v1::JOB_STATE_SUCCEEDED));
    }
  }
}

// What it is sent is bounded; then it is dropped, and comes again as any rank does. Others are served meanwhile.
TEST_F(WorkerCallsTest, ARankThatNeverReadsIsDropped) {
  const std::string id = service_.NewJob(), other = service_.NewJob();
  grpc::ChannelArguments arguments;
  arguments.SetInt("grpc.http2.lookahead_bytes", 1);  // little room on the way
  arguments.SetInt("grpc.http2.bdp_probe", 0);
  grpc::ClientContext context;
  context.AddMetadata("simpo-attempt-secret", absl::StrCat("secret-of-", id, "/1"));
  const auto stream =
      v1::WorkerService::NewStub(grpc::CreateCustomChannel(absl::StrCat("127.0.0.1:", service_.port),
                                                           grpc::InsecureChannelCredentials(), arguments))
          ->Attach(&context);
  v1::AttachRequest request;
  request.mutable_hello()->set_job_id(id);
  request.mutable_hello()->set_attempt(1);
  request.mutable_hello()->set_world_size(1);
  ASSERT_TRUE(stream->Write(request));
  std::atomic<bool> dropped = false;
  std::thread talker([&] {
    for (int step = 1; !dropped && stream->Write(StepMessage(step)); ++step) {
    }
    dropped = true;
  });
  // Another rank's report is stored while that one talks.
  Run(other);
  ExpectEverythingOnce(other);
  EXPECT_TRUE(Eventually([&] { return dropped.load(); }, std::chrono::minutes(2)));
  dropped = true;
  talker.join();
  context.TryCancel();
  stream->Finish();
  service_.launcher.End(id, 1, 0);
  EXPECT_TRUE(service_.Reaches(id, v1::JOB_STATE_SUCCEEDED));
}

TEST_F(WorkerCallsTest, NoMethodIsForgotten) {
  const google::protobuf::ServiceDescriptor* service = v1::RegisterRequest::descriptor()->file()->service(0);
  std::set<std::string> methods;
  for (int i = 0; i < service->method_count(); ++i) methods.insert(service->method(i)->name());
  EXPECT_EQ(methods, (std::set<std::string>{"Attach", "Register"})) << "a new method needs a case here";
}

}  // namespace
}  // namespace simpo
