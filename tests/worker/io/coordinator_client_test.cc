// The ranks' client against a service of ours in this process: what is sent, what is replayed after an
// outage, and what ends it.
#include "worker/coordinator_client.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <condition_variable>
#include <fstream>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "simpo/v1/worker_service.grpc.pb.h"
#include "tests/certificates.h"
#include "tests/worker/io/test_files.h"
#include "worker/register_rank.h"

namespace simpo {
namespace {

using ::testing::ElementsAre;

// Keeps what it hears. Acknowledges steps at once, unless told not to.
class FakeCoordinator final : public v1::WorkerService::Service {
 public:
  explicit FakeCoordinator(int64_t stored_step = 0, const std::shared_ptr<grpc::ServerCredentials>& credentials =
                                                        grpc::InsecureServerCredentials())
      : stored_step_(stored_step) {
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", credentials, &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~FakeCoordinator() override { Stop(); }

  // As a crash does: streams break, the port is gone.
  void Stop() {
    if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
    server_.reset();
  }
  std::string address() const { return absl::StrCat("127.0.0.1:", port_); }
  void set_acknowledge(bool acknowledge) { acknowledge_ = acknowledge; }
  void set_command(v1::CommandKind kind) { command_ = kind; }

  grpc::Status Attach(grpc::ServerContext* context,
                      grpc::ServerReaderWriter<v1::AttachResponse, v1::AttachRequest>* stream) override {
    v1::AttachRequest request;
    if (!stream->Read(&request) || !request.has_hello()) return {grpc::StatusCode::INVALID_ARGUMENT, "no hello"};
    const auto secret = context->client_metadata().find("simpo-attempt-secret");
    {
      const std::lock_guard lock(mutex_);
      hellos_.push_back(request.hello());
      if (secret != context->client_metadata().end())
        secret_ = std::string(secret->second.data(), secret->second.size());
    }
    v1::AttachResponse response;
    response.mutable_welcome()->set_last_stored_step(stored_step_);
    response.mutable_welcome()->set_last_stored_eval_step(-1);
    response.mutable_welcome()->set_heartbeat_interval_ms(50);
    stream->Write(response);
    if (command_ != v1::COMMAND_KIND_UNSPECIFIED) {
      response.mutable_command()->set_kind(command_);
      stream->Write(response);
    }
    v1::StepAck ack;
    ack.set_eval_step(-1);
    while (stream->Read(&request)) {
      Keep(request);
      if (!request.has_step() || !acknowledge_) continue;
      const v1::MetricPoint& point = request.step().point();
      if (point.split() == "train") ack.set_step(point.step());
      if (point.split() == "eval") ack.set_eval_step(point.step());
      *response.mutable_ack() = ack;
      stream->Write(response);
    }
    return grpc::Status::OK;
  }

  // UNAVAILABLE as often as asked, then the id.
  grpc::Status Register(grpc::ServerContext* context, const v1::RegisterRequest* request,
                        v1::RegisterResponse* response) override {
    const std::lock_guard lock(mutex_);
    registers_.push_back(*request);
    const auto secret = context->client_metadata().find("simpo-attempt-secret");
    if (secret != context->client_metadata().end()) secret_ = std::string(secret->second.data(), secret->second.size());
    if (!register_status_.ok() && register_failures_-- > 0) return register_status_;
    response->set_nccl_id("the id");
    return grpc::Status::OK;
  }
  grpc::Status register_status_;
  int register_failures_ = 0;
  std::vector<v1::RegisterRequest> registers_;

  // Until `condition` holds of what was heard; false after 20 s.
  bool Wait(const std::function<bool()>& condition) {
    std::unique_lock lock(mutex_);
    return heard_.wait_for(lock, std::chrono::seconds(20), condition);
  }
  // Guarded by Wait's condition, or after Stop.
  std::vector<v1::Hello> hellos_;
  std::vector<v1::Heartbeat> heartbeats_;
  std::vector<v1::MetricPoint> points_;
  std::vector<v1::WorkerEvent> events_;
  std::vector<std::string> order_;  // "train 3", "finished", ...
  std::string secret_;

 private:
  void Keep(const v1::AttachRequest& request) {
    const std::lock_guard lock(mutex_);
    if (request.has_heartbeat()) heartbeats_.push_back(request.heartbeat());
    if (request.has_event()) {
      events_.push_back(request.event());
      order_.push_back(request.event().type());
    }
    if (request.has_step()) {
      points_.push_back(request.step().point());
      order_.push_back(absl::StrCat(points_.back().split(), " ", points_.back().step()));
    }
    heard_.notify_all();
  }

  const int64_t stored_step_;
  bool acknowledge_ = true;
  v1::CommandKind command_ = v1::COMMAND_KIND_UNSPECIFIED;
  int port_ = 0;
  std::mutex mutex_;
  std::condition_variable heard_;
  std::unique_ptr<grpc::Server> server_;
};

class CoordinatorClientTest : public ::testing::Test {
 protected:
  CoordinatorClient::Options Options(const FakeCoordinator& coordinator) {
    return {.address = coordinator.address(),
            .address_file = dir_.path() / "address",
            .job_id = "job-1",
            .attempt = 2,
            .secret = "s3cret",
            .rank = 0,
            .world_size = 4,
            .metrics_path = dir_.path() / "metrics.jsonl",
            .eval_metrics_path = dir_.path() / "eval_metrics.jsonl"};
  }
  // As the trainer does: the line first, then the word of it.
  void Train(CoordinatorClient& client, int64_t step) {
    std::ofstream(dir_.path() / "metrics.jsonl", std::ios::app)
        << "{\"step\":" << step << ",\"loss\":0.1,\"grad_norm\":\"NaN\"}" << std::endl;
    client.ReportStep("train", step, {{"loss", 0.1}, {"step_seconds", 0.5}});
  }
  void Publish(const std::string& address) { std::ofstream(dir_.path() / "address") << address << '\n'; }

  TempDir dir_;
};

CoordinatorClient::Options RankOptions(const std::string& address) {
  return {.address = address, .job_id = "job-1", .attempt = 3, .secret = "s", .rank = 1, .world_size = 4};
}

TEST(RegisterRankTest, SaysWhoItIsAndTakesTheId) {
  FakeCoordinator coordinator;
  const auto id = RegisterRank(RankOptions(coordinator.address()), "mine", std::chrono::seconds(30));
  ASSERT_TRUE(id.ok()) << id.status();
  EXPECT_EQ(*id, "the id");
  ASSERT_EQ(coordinator.registers_.size(), 1u);
  const v1::RegisterRequest& request = coordinator.registers_[0];
  EXPECT_EQ(request.hello().job_id(), "job-1");
  EXPECT_EQ(request.hello().attempt(), 3);
  EXPECT_EQ(request.hello().rank(), 1);
  EXPECT_EQ(request.hello().world_size(), 4);
  EXPECT_EQ(request.hello().pid(), getpid());
  EXPECT_EQ(request.nccl_id(), "mine");
  EXPECT_GT(request.timeout_ms(), 25'000);
  EXPECT_EQ(coordinator.secret_, "s");
}

TEST(RegisterRankTest, AnOutageIsTriedAgainAndARefusalIsNot) {
  FakeCoordinator coordinator;
  coordinator.register_status_ = {grpc::StatusCode::UNAVAILABLE, "away"};
  coordinator.register_failures_ = 2;
  EXPECT_TRUE(RegisterRank(RankOptions(coordinator.address()), "", std::chrono::seconds(30)).ok());
  EXPECT_EQ(coordinator.registers_.size(), 3u);
  coordinator.register_status_ = {grpc::StatusCode::FAILED_PRECONDITION, "two ranks 1"};
  coordinator.register_failures_ = 1;
  const auto id = RegisterRank(RankOptions(coordinator.address()), "", std::chrono::seconds(30));
  EXPECT_EQ(id.status(), absl::FailedPreconditionError("two ranks 1"));
  EXPECT_EQ(coordinator.registers_.size(), 4u);
}

TEST(RegisterRankTest, WhenTheTimeIsUpItSaysWhatTheCoordinatorSaid) {
  FakeCoordinator coordinator;
  coordinator.register_status_ = {grpc::StatusCode::UNAVAILABLE, "ranks 2, 3 of 4 did not come"};
  coordinator.register_failures_ = 1000;
  const auto id = RegisterRank(RankOptions(coordinator.address()), "", std::chrono::milliseconds(100));
  EXPECT_EQ(id.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(id.status().message(), ::testing::HasSubstr("ranks 2, 3 of 4 did not come"));
  EXPECT_THAT(id.status().message(), ::testing::HasSubstr(coordinator.address()));
}

TEST_F(CoordinatorClientTest, SaysWhoItIsAndSendsEveryStepOnce) {
  FakeCoordinator coordinator;
  const auto client = CoordinatorClient::Start(Options(coordinator));
  client->SetPhase("train", 0, 3);
  for (int64_t step : {1, 2, 3}) Train(*client, step);
  client->ReportEvent("checkpoint", "checkpoint after step 3", 3);
  client->Finish(0, "", /*timeout_ms=*/20'000);
  coordinator.Stop();
  ASSERT_EQ(coordinator.hellos_.size(), 1u);
  EXPECT_EQ(coordinator.hellos_[0].job_id(), "job-1");
  EXPECT_EQ(coordinator.hellos_[0].attempt(), 2);
  EXPECT_EQ(coordinator.hellos_[0].world_size(), 4);
  EXPECT_EQ(coordinator.secret_, "s3cret");
  // Points before events, `finished` last.
  EXPECT_THAT(coordinator.order_, ElementsAre("train 1", "train 2", "train 3", "checkpoint", "finished"));
  EXPECT_EQ(coordinator.points_[2].values().at("loss"), 0.1);
  EXPECT_TRUE(std::isnan(coordinator.points_[2].values().at("grad_norm")));
  EXPECT_EQ(coordinator.points_[2].attempt(), 2);
}

std::shared_ptr<grpc::ServerCredentials> CredentialsOf(const Identity& identity) {
  grpc::SslServerCredentialsOptions options;
  options.pem_key_cert_pairs = {{identity.key, identity.cert}};
  return grpc::SslServerCredentials(options);
}

// The file says by which authority, and by which name, a coordinator with TLS is known.
TEST_F(CoordinatorClientTest, ReportsOverTlsToWhomTheAddressFileNames) {
  const Identity authority = MakeIdentity("authority", nullptr, ""), stranger = MakeIdentity("stranger", nullptr, "");
  FakeCoordinator coordinator(0, CredentialsOf(MakeIdentity("coordinator", &authority, "DNS:train.example")));
  std::ofstream(dir_.path() / "ca.pem") << authority.cert;
  std::ofstream(dir_.path() / "stranger.pem") << stranger.cert;
  const std::string ca = (dir_.path() / "ca.pem").string();
  // Nothing is said to one who is not known, or not by that name, or without TLS.
  for (const std::string& text :
       {absl::StrCat(coordinator.address(), "\n", (dir_.path() / "stranger.pem").string(), "\ntrain.example"),
        absl::StrCat(coordinator.address(), "\n", ca, "\nother.example"),
        absl::StrCat(coordinator.address(), "\n", (dir_.path() / "nowhere").string(), "\n"), coordinator.address()}) {
    Publish(text);
    const auto id = RegisterRank(Options(coordinator), "", std::chrono::milliseconds(1));
    EXPECT_FALSE(id.ok()) << text;
  }
  EXPECT_TRUE(coordinator.registers_.empty());
  const auto client = CoordinatorClient::Start(Options(coordinator));
  // The file is read again at the next try.
  Publish(absl::StrCat(coordinator.address(), "\n", ca, "\ntrain.example"));
  EXPECT_TRUE(RegisterRank(Options(coordinator), "", std::chrono::seconds(30)).ok());
  Train(*client, 1);
  client->Finish(0, "", /*timeout_ms=*/20'000);
  coordinator.Stop();
  EXPECT_THAT(coordinator.order_, ElementsAre("train 1", "finished"));
}

TEST_F(CoordinatorClientTest, WithoutAnAddressFileTheEnvironmentNamesTheAuthority) {
  const Identity authority = MakeIdentity("authority", nullptr, "");
  FakeCoordinator coordinator(0, CredentialsOf(MakeIdentity("coordinator", &authority, "IP:127.0.0.1")));
  std::ofstream(dir_.path() / "ca.pem") << authority.cert;
  CoordinatorClient::Options options = Options(coordinator);
  options.address_file.clear();
  EXPECT_FALSE(RegisterRank(options, "", std::chrono::milliseconds(1)).ok());
  setenv("SIMPO_CA", (dir_.path() / "ca.pem").c_str(), 1);
  EXPECT_TRUE(RegisterRank(options, "", std::chrono::seconds(30)).ok());
  unsetenv("SIMPO_CA");
}

TEST_F(CoordinatorClientTest, HeartbeatsCarryThePhase) {
  FakeCoordinator coordinator;
  const auto client = CoordinatorClient::Start(Options(coordinator));
  client->SetPhase("eval", 7, 9);
  EXPECT_TRUE(coordinator.Wait([&] {
    return coordinator.heartbeats_.size() >= 3 && coordinator.heartbeats_.back().phase() == "eval" &&
           coordinator.heartbeats_.back().step() == 7 && coordinator.heartbeats_.back().steps_planned() == 9;
  }));
}

TEST_F(CoordinatorClientTest, ANewCoordinatorAtAnotherAddressHearsWhatTheFirstDidNotStore) {
  auto first = std::make_unique<FakeCoordinator>();
  const auto client = CoordinatorClient::Start(Options(*first));
  for (int64_t step : {1, 2, 3}) Train(*client, step);
  ASSERT_TRUE(first->Wait([&] { return first->points_.size() == 3; }));
  first->Stop();
  for (int64_t step : {4, 5}) Train(*client, step);  // nobody listens

  FakeCoordinator second(/*stored_step=*/2);  // what it found on disk
  Publish(second.address());
  client->Finish(0, "", /*timeout_ms=*/20'000);
  second.Stop();
  EXPECT_THAT(second.order_, ElementsAre("train 3", "train 4", "train 5", "finished"));
}

// Whose points those in the file are, `resumed` tells; so a coordinator that was away must hear it first.
TEST_F(CoordinatorClientTest, WhereAnAttemptBeganIsSaidBeforeItsPoints) {
  FakeCoordinator gone;
  gone.Stop();
  std::ofstream(dir_.path() / "metrics.jsonl") << R"({"step":1,"loss":0.3})" << '\n'
                                               << R"({"step":2,"loss":0.2})" << '\n';
  const auto client = CoordinatorClient::Start(Options(gone));
  client->ReportEvent("checkpoint", "skipped a damaged one", 0);
  client->ReportEvent("resumed", "resumed after step 2", 2);
  Train(*client, 3);
  client->ReportEvent("checkpoint", "wrote step 3", 3);

  FakeCoordinator coordinator;
  Publish(coordinator.address());
  client->Finish(0, "", /*timeout_ms=*/20'000);
  coordinator.Stop();
  EXPECT_THAT(coordinator.order_,
              ElementsAre("resumed", "train 1", "train 2", "train 3", "checkpoint", "checkpoint", "finished"));
}

// Steps and events are stored in two files: a coordinator that is killed may have kept step 2 and not the event that
// came before it.
TEST_F(CoordinatorClientTest, ANewCoordinatorHearsEveryEventThatTheFirstDidNotConfirm) {
  FakeCoordinator first;
  first.set_acknowledge(false);
  const auto client = CoordinatorClient::Start(Options(first));
  Train(*client, 1);
  ASSERT_TRUE(first.Wait([&] { return first.points_.size() == 1; }));
  client->ReportEvent("checkpoint", "checkpoint after step 1", 1);
  ASSERT_TRUE(first.Wait([&] { return first.events_.size() == 1; }));
  Train(*client, 2);
  ASSERT_TRUE(first.Wait([&] { return first.points_.size() == 2; }));
  first.Stop();

  FakeCoordinator second(/*stored_step=*/2);
  Publish(second.address());
  client->Finish(0, "", /*timeout_ms=*/20'000);
  second.Stop();
  EXPECT_THAT(second.order_, ElementsAre("checkpoint", "finished"));
}

TEST_F(CoordinatorClientTest, ALineThatWasCutOffIsSentOnceItIsWhole) {
  FakeCoordinator coordinator;
  const auto client = CoordinatorClient::Start(Options(coordinator));
  Train(*client, 1);
  std::ofstream file(dir_.path() / "metrics.jsonl", std::ios::app);
  file << "{\"step\":2,\"lo" << std::flush;
  client->SetPhase("train", 1, 2);
  ASSERT_TRUE(coordinator.Wait([&] { return coordinator.points_.size() == 1; }));
  file << "ss\":0.25}" << std::endl;
  client->ReportStep("train", 2, {{"loss", 0.25}});
  ASSERT_TRUE(coordinator.Wait([&] { return coordinator.points_.size() == 2; }));
  client->Finish(0, "", /*timeout_ms=*/20'000);
  coordinator.Stop();
  EXPECT_EQ(coordinator.points_[1].values().at("loss"), 0.25);
}

TEST_F(CoordinatorClientTest, CommandsComeBackInOrder) {
  FakeCoordinator coordinator;
  coordinator.set_command(v1::COMMAND_KIND_STOP);
  const auto client = CoordinatorClient::Start(Options(coordinator));
  ASSERT_TRUE(coordinator.Wait([&] { return !coordinator.heartbeats_.empty(); }));
  std::optional<CoordinatorClient::Command> command;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (!command && std::chrono::steady_clock::now() < deadline) command = client->TakeCommand();
  EXPECT_EQ(command, CoordinatorClient::Command::kStop);
  EXPECT_EQ(client->TakeCommand(), std::nullopt);
}

TEST_F(CoordinatorClientTest, AnErrorIsSaidWithItsExitCode) {
  FakeCoordinator coordinator;
  const auto client = CoordinatorClient::Start(Options(coordinator));
  client->Finish(3, "train.jsonl:7: the row has no chosen", /*timeout_ms=*/20'000);
  coordinator.Stop();
  ASSERT_EQ(coordinator.events_.size(), 1u);
  EXPECT_EQ(coordinator.events_[0].type(), "error");
  EXPECT_EQ(coordinator.events_[0].exit_code(), 3);
  EXPECT_EQ(coordinator.events_[0].message(), "train.jsonl:7: the row has no chosen");
}

TEST_F(CoordinatorClientTest, WithoutACoordinatorItNeitherBlocksNorFails) {
  FakeCoordinator gone;
  const auto options = Options(gone);
  gone.Stop();
  const auto begin = std::chrono::steady_clock::now();
  const auto client = CoordinatorClient::Start(options);
  Train(*client, 1);
  client->Finish(0, "", /*timeout_ms=*/200);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20));
}

TEST_F(CoordinatorClientTest, FinishWaitsForTheAcknowledgementAndNoLongerThanItsLimit) {
  FakeCoordinator coordinator;
  coordinator.set_acknowledge(false);
  const auto client = CoordinatorClient::Start(Options(coordinator));
  Train(*client, 1);
  const auto begin = std::chrono::steady_clock::now();
  client->Finish(0, "", /*timeout_ms=*/500);
  EXPECT_GE(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(500));
}

}  // namespace
}  // namespace simpo
