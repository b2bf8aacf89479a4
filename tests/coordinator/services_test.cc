// The RPCs as clients meet them: real gRPC in this process, a real controller, gangs of cardboard.
#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <atomic>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/str_split.h"
#include "cardboard_service.h"
#include "simpo/v1/error_details.pb.h"
#include "simpo/v1/training_service.grpc.pb.h"
#include "simpo/v1/worker_service.grpc.pb.h"

namespace simpo {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class ServicesTest : public ::testing::Test {
 protected:
  static CardboardService::Setup FourSlots() {
    CardboardService::Setup setup;
    setup.dispatcher.slots_total = 4;
    setup.dispatcher.queue.label_quotas = {{"team=small", 1}};
    setup.streams_per_user = 2;
    return setup;
  }
  explicit ServicesTest(CardboardService::Setup setup = FourSlots()) : service_(Counting(std::move(setup))) {}

  grpc::Status Submit(const v1::SubmitJobRequest& request, v1::SubmitJobResponse* response) {
    grpc::ClientContext context;
    return stub_->SubmitJob(&context, request, response);
  }
  v1::Job MustSubmit(const std::string& yaml, const std::string& name = "") {
    v1::SubmitJobRequest request = SubmitRequest(yaml);
    request.set_name(name);
    v1::SubmitJobResponse response;
    const grpc::Status status = Submit(request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.job();
  }
  std::string State(const std::string& id) { return JobStateName(views_.FindById(id)->job.state()); }
  bool Reaches(const std::string& id, const std::string& state) {
    return Eventually([&] { return State(id) == state; });
  }
  // "USER METHOD OUTCOME" of each line of an audit log.
  std::vector<std::string> AuditLines(const std::string& file) {
    std::vector<std::string> lines;
    for (absl::string_view line : absl::StrSplit(ReadText(dir_ / file), '\n', absl::SkipEmpty())) {
      const auto json = nlohmann::json::parse(line);
      lines.push_back(absl::StrCat(json["user"].get<std::string>(), " ", json["method"].get<std::string>(), " ",
                                   json["outcome"].get<std::string>()));
      EXPECT_NE(json["peer"], "");
    }
    return lines;
  }

  // A rank's end of an Attach stream.
  struct RankClient {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReaderWriter<v1::AttachRequest, v1::AttachResponse>> stream;
    void Say(const v1::AttachRequest& request) { EXPECT_TRUE(stream->Write(request)); }
    grpc::Status Drain() {
      v1::AttachResponse response;
      while (stream->Read(&response)) {
      }
      return stream->Finish();
    }
  };
  std::unique_ptr<RankClient> Attach(const std::string& id, const std::string& secret, int rank = 0, int world = 1) {
    auto client = std::make_unique<RankClient>();
    client->context.AddMetadata("simpo-attempt-secret", secret);
    client->stream = v1::WorkerService::NewStub(channel_)->Attach(&client->context);
    v1::AttachRequest request;
    request.mutable_hello()->set_job_id(id);
    request.mutable_hello()->set_attempt(1);
    request.mutable_hello()->set_rank(rank);
    request.mutable_hello()->set_world_size(world);
    client->stream->Write(request);
    return client;
  }
  std::unique_ptr<RankClient> AttachRightly(const std::string& id) {
    EXPECT_TRUE(Eventually([&] { return !views_.FindById(id)->secret.empty(); }));
    auto client = Attach(id, "secret-of-" + id + "/1");
    v1::AttachResponse response;
    EXPECT_TRUE(client->stream->Read(&response));
    EXPECT_TRUE(response.has_welcome());
    return client;
  }

  std::atomic<int> failures_ = 0;
  CardboardService service_;
  TempDir& dir_ = service_.dir;
  Stores& stores_ = service_.stores;
  FakeLauncher& launcher_ = service_.launcher;
  JobViews& views_ = service_.views;
  Controller& controller_ = *service_.controller;
  const std::shared_ptr<grpc::Channel> channel_ = service_.channel;
  v1::TrainingService::Stub* const stub_ = service_.stub.get();

 private:
  CardboardService::Setup Counting(CardboardService::Setup setup) {
    setup.on_failure = [this](const absl::Status&) { ++failures_; };
    return setup;
  }
};

// One rank's call of Register, on a thread.
class ServicesRegisterTest : public ServicesTest {
 protected:
  struct Result {
    grpc::Status status;
    std::string nccl_id;
  };
  std::string JobThatRuns() {
    const std::string id = MustSubmit(JobYaml()).id();
    EXPECT_TRUE(Eventually([&] { return !views_.FindById(id)->secret.empty(); }));
    return id;
  }
  Result Register(const std::string& id, int rank, int world_size, int pid, int timeout_ms = 60'000,
                  const std::string& secret = "", grpc::ClientContext* of_caller = nullptr) {
    grpc::ClientContext own;
    grpc::ClientContext& context = of_caller != nullptr ? *of_caller : own;
    context.AddMetadata("simpo-attempt-secret", secret.empty() ? "secret-of-" + id + "/1" : secret);
    v1::RegisterRequest request;
    v1::Hello& hello = *request.mutable_hello();
    hello.set_job_id(id);
    hello.set_attempt(1);
    hello.set_rank(rank);
    hello.set_world_size(world_size);
    hello.set_pid(pid);
    if (rank == 0) request.set_nccl_id(std::string("id\0id", 5));
    request.set_timeout_ms(timeout_ms);
    v1::RegisterResponse response;
    Result result;
    result.status = v1::WorkerService::NewStub(channel_)->Register(&context, request, &response);
    result.nccl_id = response.nccl_id();
    return result;
  }
};

TEST_F(ServicesRegisterTest, EveryRankGetsTheIdOfRank0) {
  const std::string id = JobThatRuns();
  std::vector<Result> results(4);
  std::vector<std::thread> ranks;
  for (int rank : {3, 1, 0, 2}) {
    ranks.emplace_back([&, rank] { results[rank] = Register(id, rank, 4, 100 + rank); });
  }
  for (std::thread& rank : ranks) rank.join();
  for (const Result& result : results) {
    EXPECT_TRUE(result.status.ok()) << result.status.error_message();
    EXPECT_EQ(result.nccl_id, std::string("id\0id", 5));
  }
}

TEST_F(ServicesRegisterTest, WhoIsMissingIsNamedWhenTheTimeIsUp) {
  const Result result = Register(JobThatRuns(), 1, 3, 7, /*timeout_ms=*/100);
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(result.status.error_message(), HasSubstr("ranks 0, 2 of 3"));
}

TEST_F(ServicesRegisterTest, StrangersAndRanksThatCannotBeAreRefused) {
  const std::string id = JobThatRuns();
  EXPECT_EQ(Register(id, 0, 1, 7, 1000, "wrong").status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(Register("no-such-job", 0, 1, 7, 1000).status.error_code(), grpc::StatusCode::UNAUTHENTICATED);
  for (const auto& [rank, world] : {std::pair(2, 2), std::pair(-1, 2), std::pair(0, 0), std::pair(0, 2'000'000)}) {
    EXPECT_EQ(Register(id, rank, world, 7, 1000).status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  }
}

TEST_F(ServicesRegisterTest, ARankThatLostItsCallComesAgain) {
  const std::string id = JobThatRuns();
  grpc::ClientContext lost;
  std::thread first(
      [&] { EXPECT_EQ(Register(id, 1, 2, 7, 60'000, "", &lost).status.error_code(), grpc::StatusCode::CANCELLED); });
  lost.TryCancel();
  first.join();
  Result again, zero;
  std::thread one([&] { again = Register(id, 1, 2, 7); });
  zero = Register(id, 0, 2, 6);
  one.join();
  EXPECT_TRUE(again.status.ok() && zero.status.ok());
}

// The server ends although ranks wait.
TEST_F(ServicesRegisterTest, AShutdownEndsTheCallsThatWait) {
  const std::string id = JobThatRuns();
  grpc::Status status;
  std::thread waits([&] { status = Register(id, 0, 3, 7).status; });
  // Another rank sees that it waits.
  EXPECT_TRUE(Eventually([&] {
    const std::string missing = Register(id, 1, 3, 8, /*timeout_ms=*/20).status.error_message();
    return missing.find("rank 2 of 3") != std::string::npos;
  }));
  service_.server->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(50));
  waits.join();
  EXPECT_FALSE(status.ok());
}

TEST_F(ServicesTest, OnlyTheAttemptsOwnSecretLetsARankIn) {
  const std::string id = MustSubmit(JobYaml()).id();
  const std::string other = MustSubmit(JobYaml()).id();
  ASSERT_TRUE(
      Eventually([&] { return !views_.FindById(id)->secret.empty() && !views_.FindById(other)->secret.empty(); }));
  for (const std::string& secret : {std::string(), std::string("wrong"), "secret-of-" + other + "/1",
                                    "secret-of-" + id + "/2", "secret-of-" + id}) {
    const grpc::Status status = Attach(id, secret)->Drain();
    EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAUTHENTICATED) << secret;
  }
  EXPECT_EQ(Attach("nosuchjob", "x")->Drain().error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(State(id), "LAUNCHING");
  AttachRightly(id);
  EXPECT_TRUE(Reaches(id, "RUNNING"));
}

TEST_F(ServicesTest, TheFirstMessageMustBeHello) {
  RankClient client;
  client.stream = v1::WorkerService::NewStub(channel_)->Attach(&client.context);
  client.stream->Write(HeartbeatMessage("train"));
  EXPECT_EQ(client.Drain().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ServicesTest, ARankReportsIsAcknowledgedAndLeaves) {
  const std::string id = MustSubmit(JobYaml()).id();
  auto rank = AttachRightly(id);
  constexpr int kSteps = 2000;  // more than the stream lets wait
  std::thread writer([&] {
    for (int step = 1; step <= kSteps; ++step) rank->Say(StepMessage(step));
    rank->Say(EventMessage("finished", ""));
  });
  v1::AttachResponse response;
  int64_t acknowledged = 0;
  while (acknowledged < kSteps && rank->stream->Read(&response)) acknowledged = response.ack().step();
  writer.join();
  EXPECT_EQ(acknowledged, kSteps);
  rank->stream->WritesDone();
  const grpc::Status status = rank->Drain();
  EXPECT_TRUE(status.ok()) << status.error_message();
  launcher_.End(id, 1, 0);
  EXPECT_TRUE(Reaches(id, "SUCCEEDED"));
  const auto points = ValueOf(stores_.metrics->ListPoints(views_.FindById(id)->sequence, "train", 0, 2 * kSteps));
  EXPECT_EQ(points.size(), static_cast<size_t>(kSteps));
  EXPECT_LT(controller_.stats().commit_seconds.count, kSteps) << "points must be committed in groups";
}

TEST_F(ServicesTest, ACancelReachesTheRank) {
  const std::string id = MustSubmit(JobYaml()).id();
  auto rank = AttachRightly(id);
  rank->Say(StepMessage(1));
  ASSERT_TRUE(Eventually([&] { return views_.FindById(id)->job.progress().step() == 1; }));
  grpc::ClientContext context;
  v1::CancelJobRequest request;
  request.set_job_id(id);
  v1::CancelJobResponse response;
  ASSERT_TRUE(stub_->CancelJob(&context, request, &response).ok());
  EXPECT_EQ(response.job().state(), v1::JOB_STATE_CANCELLING);
  v1::AttachResponse message;
  bool told = false;
  while (!told && rank->stream->Read(&message)) told = message.command().kind() == v1::COMMAND_KIND_STOP;
  EXPECT_TRUE(told);
  launcher_.End(id, 1, 143);
  EXPECT_TRUE(Reaches(id, "CANCELLED"));
}

TEST_F(ServicesTest, ARefusedJobSaysEverythingInWordsAndInDetails) {
  v1::SubmitJobResponse response;
  const grpc::Status status = Submit(SubmitRequest(JobYaml(9, "betta: 1\nlearning_rate: fast\n")), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  for (const char* part : {"test.yaml:5: betta", "test.yaml:6: learning_rate", "need 9 slots"}) {
    EXPECT_THAT(status.error_message(), HasSubstr(part));
  }
  v1::RpcStatus details;
  ASSERT_TRUE(details.ParseFromString(status.error_details()));
  EXPECT_EQ(details.code(), grpc::StatusCode::INVALID_ARGUMENT);
  v1::BadRequest bad_request;
  v1::ErrorInfo info;
  for (const google::protobuf::Any& any : details.details()) {
    if (any.type_url() == "type.googleapis.com/google.rpc.BadRequest") bad_request.ParseFromString(any.value());
    if (any.type_url() == "type.googleapis.com/google.rpc.ErrorInfo") info.ParseFromString(any.value());
  }
  EXPECT_EQ(info.domain(), "simpo");
  EXPECT_EQ(info.reason(), "BAD_JOB");
  ASSERT_EQ(bad_request.field_violations_size(), 3);
  EXPECT_EQ(bad_request.field_violations(0).field(), "betta");
  EXPECT_TRUE(views_.All().empty());
}

TEST_F(ServicesTest, WhatOnlyTheCoordinatorSeesHasItsLineToo) {
  v1::SubmitJobRequest request = SubmitRequest(JobYaml(
      1, absl::StrCat("resume_from_checkpoint: /no/such/folder\noutput_dir: ", (dir_ / "used").string(), "\n")));
  WriteText(dir_ / "used" / "metrics.jsonl", "{}\n");
  v1::SubmitJobResponse response;
  std::string message = Submit(request, &response).error_message();
  EXPECT_THAT(message, HasSubstr("test.yaml:5: resume_from_checkpoint: '/no/such/folder' does not exist"));
  EXPECT_THAT(message, HasSubstr("test.yaml:6: output_dir: "));
  EXPECT_THAT(Submit(SubmitRequest(JobYaml(999)), &response).error_message(),
              HasSubstr("test.yaml:4: resources: 999 ranks of 1 slots need 999 slots"));
  request.add_overrides("resume_from_checkpoint=/no/such/other");  // no line of the file's
  EXPECT_THAT(Submit(request, &response).error_message(),
              HasSubstr("test.yaml: resume_from_checkpoint: '/no/such/other' does not exist"));
}

TEST_F(ServicesTest, HundredsOfMistakesStillFitInAReply) {
  std::string yaml = JobYaml();
  for (int i = 0; i < 300; ++i) absl::StrAppend(&yaml, "unknown_key_number_", i, ": 1\n");
  v1::SubmitJobResponse response;
  const grpc::Status status = Submit(SubmitRequest(yaml), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("unknown_key_number_0"));
  EXPECT_THAT(status.error_message(), HasSubstr("and more"));
  EXPECT_LT(status.error_message().size() + status.error_details().size() * 4 / 3, 8000u);
}

TEST_F(ServicesTest, ValidateOnlyStoresNothing) {
  v1::SubmitJobRequest request = SubmitRequest(JobYaml(2));
  request.set_validate_only(true);
  v1::SubmitJobResponse response;
  ASSERT_TRUE(Submit(request, &response).ok());
  EXPECT_EQ(response.job().id(), "");
  EXPECT_EQ(response.job().ranks(), 2);
  EXPECT_THAT(response.job().config_yaml(), HasSubstr("beta: 2"));
  EXPECT_FALSE(response.notes().empty());
  EXPECT_TRUE(views_.All().empty());
}

TEST_F(ServicesTest, ValidateOnlyKnowsTheQuotasAndTheJobsThatRun) {
  const std::string folder = absl::StrCat("output_dir: ", (dir_ / "mine").string(), "\n");
  v1::SubmitJobResponse response;
  ASSERT_TRUE(Submit(SubmitRequest(JobYaml(1, folder)), &response).ok());
  v1::SubmitJobRequest request = SubmitRequest(JobYaml(2, folder + "labels: {team: small}\n"));
  for (const bool validate_only : {true, false}) {
    request.set_validate_only(validate_only);
    const grpc::Status status = Submit(request, &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_THAT(status.error_message(), HasSubstr("is being written by job"));
    EXPECT_THAT(status.error_message(), HasSubstr("team=small")) << "all at once";
  }
}

TEST_F(ServicesTest, ManyClientsWithOneRequestIdMakeOneJob) {
  std::vector<std::thread> clients;
  std::array<std::string, 16> ids;
  for (size_t i = 0; i < ids.size(); ++i) {
    clients.emplace_back([&, i] {
      v1::SubmitJobResponse response;
      if (Submit(SubmitRequest(JobYaml(), "same"), &response).ok()) ids[i] = response.job().id();
    });
  }
  for (std::thread& client : clients) client.join();
  for (const std::string& id : ids) EXPECT_EQ(id, ids[0]);
  EXPECT_FALSE(ids[0].empty());
  EXPECT_EQ(views_.All().size(), 1u);
  v1::SubmitJobResponse response;
  const grpc::Status status = Submit(SubmitRequest(JobYaml(2), "same"), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ALREADY_EXISTS);
}

TEST_F(ServicesTest, JobsAreFoundByIdNameAndPrefix) {
  const v1::Job one = MustSubmit(JobYaml(), "alpha");
  MustSubmit(JobYaml(), "twin");
  MustSubmit(JobYaml(), "twin");
  const auto get = [&](const std::string& reference) {
    grpc::ClientContext context;
    v1::GetJobRequest request;
    request.set_job_id(reference);
    v1::GetJobResponse response;
    const grpc::Status status = stub_->GetJob(&context, request, &response);
    return status.ok() ? response.job().id() : absl::StrCat("error ", status.error_code());
  };
  EXPECT_EQ(get(one.id()), one.id());
  EXPECT_EQ(get(one.id().substr(0, 8)), one.id());
  EXPECT_EQ(get("alpha"), one.id());
  EXPECT_EQ(get("twin"), absl::StrCat("error ", grpc::StatusCode::FAILED_PRECONDITION));
  EXPECT_EQ(get("nobody"), absl::StrCat("error ", grpc::StatusCode::NOT_FOUND));
  EXPECT_EQ(get(""), absl::StrCat("error ", grpc::StatusCode::INVALID_ARGUMENT));
}

TEST_F(ServicesTest, ListsNewestFirstInPagesWithFilters) {
  std::vector<std::string> ids;
  for (int i = 0; i < 5; ++i) ids.push_back(MustSubmit(JobYaml(4, i == 3 ? "labels: {team: blue}\n" : "")).id());
  const auto list = [&](v1::ListJobsRequest request, std::string* next) {
    grpc::ClientContext context;
    v1::ListJobsResponse response;
    const grpc::Status status = stub_->ListJobs(&context, request, &response);
    std::vector<std::string> found;
    if (!status.ok()) found.push_back(status.error_message());
    for (const v1::Job& job : response.jobs()) {
      EXPECT_EQ(job.config_yaml(), "");
      found.push_back(job.id());
    }
    if (next != nullptr) *next = response.next_page_token();
    return found;
  };
  v1::ListJobsRequest request;
  request.set_page_size(2);
  std::string next;
  EXPECT_THAT(list(request, &next), ElementsAre(ids[4], ids[3]));
  request.set_page_token(next);
  EXPECT_THAT(list(request, &next), ElementsAre(ids[2], ids[1]));
  request.set_page_token(next);
  EXPECT_THAT(list(request, &next), ElementsAre(ids[0]));
  EXPECT_EQ(next, "");

  v1::ListJobsRequest filter;
  (*filter.mutable_labels())["team"] = "blue";
  EXPECT_THAT(list(filter, nullptr), ElementsAre(ids[3]));
  v1::ListJobsRequest states;
  states.add_states(v1::JOB_STATE_LAUNCHING);
  EXPECT_THAT(list(states, nullptr), ElementsAre(ids[0]));
  for (const char* token : {"rubbish", "0", "-3", "4x", "1.5", "99999999999999999999"}) {
    request.set_page_token(token);
    EXPECT_THAT(list(request, nullptr), ElementsAre(HasSubstr("page_token"))) << token;
  }
  for (int size : {5000, -1}) {
    v1::ListJobsRequest wrong;
    wrong.set_page_size(size);
    EXPECT_THAT(list(wrong, nullptr), ElementsAre(HasSubstr("page_size"))) << size;
  }

  // Jobs that come between two pages shift nothing.
  v1::ListJobsRequest paged;
  paged.set_page_size(3);
  EXPECT_THAT(list(paged, &next), ElementsAre(ids[4], ids[3], ids[2]));
  MustSubmit(JobYaml(4));
  paged.set_page_token(next);
  EXPECT_THAT(list(paged, &next), ElementsAre(ids[1], ids[0]));
}

TEST_F(ServicesTest, WatchShowsEveryEventAndPointAndEnds) {
  const std::string id = MustSubmit(JobYaml()).id();
  auto rank = AttachRightly(id);
  v1::WatchJobRequest request;
  request.set_job_id(id);
  grpc::ClientContext context;
  auto watch = stub_->WatchJob(&context, request);
  v1::WatchJobResponse response;
  ASSERT_TRUE(watch->Read(&response));
  EXPECT_EQ(response.job().config_yaml(), "");
  std::vector<int64_t> events, points;
  const auto collect = [&] {
    for (const v1::JobEvent& event : response.events()) events.push_back(event.sequence());
    for (const v1::MetricPoint& point : response.points()) points.push_back(point.step());
  };
  collect();
  constexpr int kSteps = 1200;  // more than one response holds
  for (int step = 1; step <= kSteps; ++step) rank->Say(StepMessage(step));
  rank->Say(EventMessage("finished", ""));
  ASSERT_TRUE(Eventually([&] { return views_.FindById(id)->job.progress().step() == kSteps; }));
  launcher_.End(id, 1, 0);
  while (watch->Read(&response)) collect();
  EXPECT_TRUE(watch->Finish().ok());
  EXPECT_EQ(response.job().state(), v1::JOB_STATE_SUCCEEDED);
  EXPECT_THAT(events, ElementsAre(1, 2, 3, 4));
  ASSERT_EQ(points.size(), static_cast<size_t>(kSteps));
  EXPECT_EQ(points.back(), kSteps);

  // From a cursor: only what came after it.
  request.set_after_sequence(3);
  grpc::ClientContext again_context;
  auto again = stub_->WatchJob(&again_context, request);
  events.clear();
  while (again->Read(&response)) collect();
  EXPECT_TRUE(again->Finish().ok());
  EXPECT_THAT(events, ElementsAre(4));

  request.set_job_id("nobody");
  grpc::ClientContext missing_context;
  EXPECT_EQ(stub_->WatchJob(&missing_context, request)->Finish().error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(ServicesTest, LogsAreFollowedOverAttempts) {
  const std::string id = MustSubmit(JobYaml()).id();
  const std::filesystem::path logs = std::filesystem::path(views_.FindById(id)->job.output_dir()) / "logs";
  WriteText(logs / "attempt-1" / "rank-0.log", "one\ntwo\nthr");
  v1::StreamLogsRequest request;
  request.set_job_id(id);
  request.set_follow(true);
  grpc::ClientContext context;
  auto stream = stub_->StreamLogs(&context, request);
  v1::StreamLogsResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.data(), "one\ntwo\n");
  const std::string cursor = response.cursor();
  WriteText(logs / "attempt-2" / "rank-0.log", "four\n");
  launcher_.End(id, 1, 75);
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.data(), "thr");
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.attempt(), 2);
  EXPECT_EQ(response.data(), "four\n");
  launcher_.End(id, 2, 0);
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_TRUE(stream->Finish().ok());

  const auto read = [&](v1::StreamLogsRequest logs_request) {
    logs_request.set_job_id(id);
    grpc::ClientContext logs_context;
    auto logs_stream = stub_->StreamLogs(&logs_context, logs_request);
    std::string text;
    while (logs_stream->Read(&response)) text += response.data();
    const grpc::Status status = logs_stream->Finish();
    return status.ok() ? text : absl::StrCat("error: ", status.error_message());
  };
  v1::StreamLogsRequest again;
  again.set_follow(true);
  again.set_cursor(cursor);
  EXPECT_EQ(read(again), "thrfour\n");
  v1::StreamLogsRequest tail;
  tail.set_attempt(1);
  tail.set_tail_lines(2);
  EXPECT_EQ(read(tail), "two\nthr");
  v1::StreamLogsRequest wrong;
  wrong.set_rank(5);
  EXPECT_THAT(read(wrong), HasSubstr("no rank 5"));
  wrong.set_rank(-1);
  EXPECT_THAT(read(wrong), HasSubstr("has no log"));
  wrong.set_rank(0);
  wrong.set_attempt(9);
  EXPECT_THAT(read(wrong), HasSubstr("no attempt 9"));
  wrong.set_attempt(0);
  wrong.set_cursor("1:x");
  EXPECT_THAT(read(wrong), HasSubstr("no cursor"));
}

TEST_F(ServicesTest, AClientThatGoesAwayLeavesNothingBehind) {
  const std::string id = MustSubmit(JobYaml()).id();
  for (int i = 0; i < 20; ++i) {
    v1::WatchJobRequest request;
    request.set_job_id(id);
    grpc::ClientContext context;
    auto watch = stub_->WatchJob(&context, request);
    v1::WatchJobResponse response;
    ASSERT_TRUE(watch->Read(&response));
    context.TryCancel();
    EXPECT_EQ(watch->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  auto rank = AttachRightly(id);
  rank->context.TryCancel();
  rank->Drain();
  auto next = AttachRightly(id);
  next->Say(StepMessage(1));
  EXPECT_TRUE(Eventually([&] { return views_.FindById(id)->job.progress().step() == 1; }));
}

TEST_F(ServicesTest, MetricsInPages) {
  const std::string id = MustSubmit(JobYaml()).id();
  auto rank = AttachRightly(id);
  for (int step = 1; step <= 5; ++step) rank->Say(StepMessage(step, 1.0 / step));
  rank->Say(StepMessage(0, 0.5, "eval"));
  ASSERT_TRUE(Eventually([&] { return !views_.FindById(id)->job.progress().eval_metrics().empty(); }));
  const auto list = [&](const std::string& split, int64_t after, int size, bool* more) {
    grpc::ClientContext context;
    v1::ListMetricsRequest request;
    request.set_job_id(id);
    request.set_split(split);
    request.set_after_step(after);
    request.set_page_size(size);
    v1::ListMetricsResponse response;
    const grpc::Status status = stub_->ListMetrics(&context, request, &response);
    *more = response.more();
    std::string text = status.error_message();
    for (const v1::MetricPoint& point : response.points()) absl::StrAppend(&text, point.step(), " ");
    return text;
  };
  bool more = false;
  EXPECT_EQ(list("", 0, 3, &more), "1 2 3 ");
  EXPECT_TRUE(more);
  EXPECT_EQ(list("train", 3, 3, &more), "4 5 ");
  EXPECT_FALSE(more);
  EXPECT_EQ(list("eval", -1, 3, &more), "0 ");
  EXPECT_THAT(list("test", 0, 3, &more), HasSubstr("split"));
  EXPECT_THAT(list("train", 0, 10'001, &more), HasSubstr("page_size"));
  EXPECT_THAT(list("train", 0, -1, &more), HasSubstr("page_size"));
}

TEST_F(ServicesTest, MetricsSayWhenTheyWereThinned) {
  const std::string id = MustSubmit(JobYaml()).id();
  auto rank = AttachRightly(id);
  for (int step = 1; step <= 1500; ++step) rank->Say(StepMessage(step));
  ASSERT_TRUE(Eventually([&] { return views_.FindById(id)->job.progress().step() == 1500; }));
  const auto list = [&] {
    grpc::ClientContext context;
    v1::ListMetricsRequest request;
    request.set_job_id(id);
    request.set_page_size(2);
    v1::ListMetricsResponse response;
    EXPECT_TRUE(stub_->ListMetrics(&context, request, &response).ok());
    return response;
  };
  EXPECT_EQ(list().kept_every(), 0);
  EXPECT_EQ(list().points(1).step(), 2);
  stores_.metrics->Thin(views_.FindById(id)->sequence, 1'700'000'000'000);
  ASSERT_TRUE(Eventually([&] { return stores_.metrics->chores_waiting() == 0; }));
  EXPECT_EQ(list().kept_every(), 2);
  EXPECT_EQ(list().thinned_time().seconds(), 1'700'000'000);
  EXPECT_EQ(list().points(1).step(), 3);
}

TEST_F(ServicesTest, ServerInfo) {
  MustSubmit(JobYaml(3));
  grpc::ClientContext context;
  v1::GetServerInfoResponse response;
  ASSERT_TRUE(stub_->GetServerInfo(&context, v1::GetServerInfoRequest(), &response).ok());
  EXPECT_EQ(response.version(), "1.2.3");
  EXPECT_EQ(response.slots_total(), 4);
  EXPECT_EQ(response.slots_free(), 1);
}

TEST_F(ServicesTest, PriorityAndNodes) {
  const std::string id = MustSubmit(JobYaml(3)).id();
  v1::SetPriorityRequest request;
  request.set_job_id(id.substr(0, 6));
  request.set_priority(-7);
  v1::SetPriorityResponse response;
  const auto set = [&] {
    grpc::ClientContext context;
    return stub_->SetPriority(&context, request, &response);
  };
  ASSERT_TRUE(set().ok());
  EXPECT_EQ(response.job().id(), id);
  EXPECT_EQ(response.job().priority(), -7);
  request.set_job_id("nobody");
  EXPECT_EQ(set().error_code(), grpc::StatusCode::NOT_FOUND);
  grpc::ClientContext context;
  v1::ListNodesResponse nodes;
  ASSERT_TRUE(stub_->ListNodes(&context, v1::ListNodesRequest(), &nodes).ok());
  ASSERT_EQ(nodes.nodes_size(), 1);
  EXPECT_EQ(nodes.nodes(0).slots(), 4);
  EXPECT_EQ(nodes.nodes(0).slots_taken(), 3);
  EXPECT_EQ(nodes.nodes(0).jobs(0).job_id(), id);
}

TEST_F(ServicesTest, AStoppedControllerRefuses) {
  controller_.Stop();
  v1::SubmitJobResponse response;
  const grpc::Status status = Submit(SubmitRequest(JobYaml()), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(ServicesTest, ADatabaseThatCannotBeWrittenStopsTheController) {
  MustSubmit(JobYaml());
  // The file is full from now on, as a disk can be.
  ASSERT_TRUE(Eventually([&] { return stores_.database->writer().Execute("PRAGMA max_page_count=1").ok(); }));
  grpc::Status status;
  std::string big(500'000, '#');
  ASSERT_TRUE(Eventually([&] {
    v1::SubmitJobResponse response;
    status =
        Submit(SubmitRequest(JobYaml(1, absl::StrCat("name: ", std::string(100, 'n'), "\n", big, "\n"))), &response);
    return !status.ok();
  }));
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr("database"));
  EXPECT_TRUE(Eventually([&] { return failures_ == 1; }));
}

// Calls a method by its bytes alone, without any credentials.
grpc::Status CallBare(const std::shared_ptr<grpc::Channel>& channel, const std::string& path) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  grpc::CompletionQueue queue;
  // In every request an empty first field: of Attach it is a hello.
  const grpc::Slice bytes(std::string("\x0a\x00", 2));
  grpc::ByteBuffer request(&bytes, 1), reply;
  grpc::Status status;
  auto call = stub.PrepareUnaryCall(&context, path, request, &queue);
  call->StartCall();
  call->Finish(&reply, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  EXPECT_TRUE(queue.Next(&tag, &ok));
  return status;
}

class ServicesWithTokensTest : public ServicesTest {
 protected:
  ServicesWithTokensTest() {
    for (const auto& [role, user] : {std::pair(Role::kRead, "rita"), std::pair(Role::kSubmit, "sam"),
                                     std::pair(Role::kSubmit, "sue"), std::pair(Role::kAdmin, "ada")}) {
      const NewToken made = ValueOf(MakeToken(role, user, 1, time(nullptr)));
      EXPECT_TRUE(AddToken(dir_ / "tokens.json", made.token).ok());
      tokens_[user] = made.text;
    }
  }
  void ActAs(grpc::ClientContext* context, const std::string& user) {
    context->AddMetadata("authorization", "Bearer " + tokens_.at(user));
  }
  grpc::Status SubmitAs(const std::string& user, const v1::SubmitJobRequest& request, v1::SubmitJobResponse* response) {
    grpc::ClientContext context;
    ActAs(&context, user);
    return stub_->SubmitJob(&context, request, response);
  }
  grpc::Status CancelAs(const std::string& user, const std::string& id) {
    grpc::ClientContext context;
    ActAs(&context, user);
    v1::CancelJobRequest request;
    request.set_job_id(id);
    v1::CancelJobResponse response;
    return stub_->CancelJob(&context, request, &response);
  }
  std::map<std::string, std::string> tokens_;
};

// Whoever adds a method gives it a row in the table of guard.cc, and asks the guard.
TEST_F(ServicesWithTokensTest, NoMethodIsForgotten) {
  int methods = 0;
  for (const char* name : {v1::TrainingService::service_full_name(), v1::WorkerService::service_full_name()}) {
    const auto* service = google::protobuf::DescriptorPool::generated_pool()->FindServiceByName(name);
    ASSERT_NE(service, nullptr) << name;
    for (int i = 0; i < service->method_count(); ++i, ++methods) {
      const std::string method = absl::StrCat(service->name(), "/", service->method(i)->name());
      EXPECT_NE(FindRule(method), nullptr) << method << " has no row in coordinator/guard.cc";
      const grpc::Status status = CallBare(channel_, absl::StrCat("/", name, "/", service->method(i)->name()));
      EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAUTHENTICATED) << method << ": " << status.error_message();
      EXPECT_FALSE(status.error_details().empty()) << method << " has no ErrorInfo";
    }
  }
  EXPECT_GE(methods, 10);
}

TEST_F(ServicesWithTokensTest, AJobIsItsTokensUsers) {
  v1::SubmitJobRequest request = SubmitRequest(JobYaml(), "request-1");
  request.set_user("ada");
  v1::SubmitJobResponse response;
  EXPECT_EQ(SubmitAs("rita", request, &response).error_code(), grpc::StatusCode::PERMISSION_DENIED);
  ASSERT_TRUE(SubmitAs("sam", request, &response).ok());
  EXPECT_EQ(response.job().user(), "sam");
  const std::string id = response.job().id();
  // The same request of the same user is the same job; of another one it is not.
  ASSERT_TRUE(SubmitAs("sam", request, &response).ok());
  EXPECT_TRUE(response.already_existed());
  EXPECT_EQ(SubmitAs("sue", request, &response).error_code(), grpc::StatusCode::ALREADY_EXISTS);

  EXPECT_EQ(CancelAs("rita", id).error_code(), grpc::StatusCode::PERMISSION_DENIED);
  const grpc::Status others = CancelAs("sue", id);
  EXPECT_EQ(others.error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_THAT(others.error_message(), HasSubstr("sam"));
  EXPECT_NE(State(id), "CANCELLING");
  EXPECT_TRUE(CancelAs("sam", id).ok());
  ASSERT_TRUE(SubmitAs("sam", SubmitRequest(JobYaml()), &response).ok());
  EXPECT_TRUE(CancelAs("ada", response.job().id()).ok());

  // Every change and every refusal has its line.
  EXPECT_THAT(AuditLines("audit.jsonl"), ElementsAre("sam SubmitJob OK", "sam SubmitJob OK", "sam CancelJob OK",
                                                     "sam SubmitJob OK", "ada CancelJob OK"));
  EXPECT_THAT(AuditLines("audit-refused.jsonl"),
              ElementsAre("rita SubmitJob PERMISSION_DENIED", "sue SubmitJob ALREADY_EXISTS",
                          "rita CancelJob PERMISSION_DENIED", "sue CancelJob PERMISSION_DENIED"));
}

TEST_F(ServicesWithTokensTest, AnotherUsersFolderIsNotWrittenTo) {
  const std::string folder = dir_ / "outputs/of-sam";
  v1::SubmitJobResponse response;
  const auto request = [&](const std::string& output) {
    return SubmitRequest(JobYaml(1, absl::StrCat("overwrite_output_dir: true\noutput_dir: ", output, "\n")));
  };
  ASSERT_TRUE(SubmitAs("sam", request(folder), &response).ok());
  launcher_.End(response.job().id(), 1, 2);
  ASSERT_TRUE(Reaches(response.job().id(), "FAILED"));
  std::filesystem::create_directories(folder);
  std::filesystem::create_symlink(folder, dir_ / "outputs/link");
  const std::string outputs = dir_ / "outputs";
  for (const std::string& output :
       {folder, folder + "/final", folder + "/", folder + "/../of-sam", outputs + "/./of-sam",
        outputs + "/nothing/../of-sam/", outputs + "/link", outputs + "/link/final"}) {
    const grpc::Status status = SubmitAs("sue", request(output), &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << output;
    EXPECT_THAT(status.error_message(), HasSubstr("belongs to job")) << output;
  }
  for (const std::string& output : {std::string("/etc/x"), folder + "/../../x"}) {
    EXPECT_THAT(SubmitAs("sue", request(output), &response).error_message(), HasSubstr("allowed_roots")) << output;
  }
  EXPECT_TRUE(SubmitAs("sue", request(folder + "-not"), &response).ok());
  EXPECT_TRUE(SubmitAs("sam", request(folder), &response).ok());
}

TEST_F(ServicesWithTokensTest, AUserHasSoManyStreamsAndNoMore) {
  v1::SubmitJobResponse response;
  ASSERT_TRUE(SubmitAs("sam", SubmitRequest(JobYaml()), &response).ok());
  struct Watch {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReader<v1::WatchJobResponse>> reader;
  };
  const auto open = [&] {
    auto watch = std::make_unique<Watch>();
    ActAs(&watch->context, "rita");
    v1::WatchJobRequest request;
    request.set_job_id(response.job().id());
    watch->reader = stub_->WatchJob(&watch->context, request);
    return watch;
  };
  v1::WatchJobResponse message;
  auto first = open(), second = open();
  ASSERT_TRUE(first->reader->Read(&message) && second->reader->Read(&message));
  auto third = open();
  EXPECT_FALSE(third->reader->Read(&message));
  EXPECT_EQ(third->reader->Finish().error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  first->context.TryCancel();
  while (first->reader->Read(&message)) {
  }
  first->reader->Finish();
  EXPECT_TRUE(Eventually([&] {
    auto again = open();
    const bool opened = again->reader->Read(&message);
    again->context.TryCancel();
    again->reader->Finish();
    return opened;
  })) << "a stream that is over gives its place back";
  second->context.TryCancel();
  second->reader->Finish();
}

class ImpatientServicesTest : public ServicesTest {
 protected:
  // SIMPO_TIMES: as many times slower is all under a sanitizer.
  static constexpr std::chrono::milliseconds kPatience{300 * SIMPO_TIMES};
  ImpatientServicesTest() : ServicesTest(Impatient()) {}

 private:
  static CardboardService::Setup Impatient() {
    CardboardService::Setup setup = FourSlots();
    setup.patience = kPatience;
    return setup;
  }
};

TEST_F(ImpatientServicesTest, AStreamThatSaysNothingIsEnded) {
  RankClient client;
  client.stream = v1::WorkerService::NewStub(channel_)->Attach(&client.context);
  EXPECT_EQ(client.Drain().error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  // One that has said it stays.
  auto rank = AttachRightly(MustSubmit(JobYaml()).id());
  std::this_thread::sleep_for(kPatience * 3 / 2);
  EXPECT_TRUE(rank->stream->Write(HeartbeatMessage("train")));
  rank->stream->WritesDone();
  EXPECT_TRUE(rank->Drain().ok());
}

class StalledServicesTest : public ServicesTest {
 protected:
  StalledServicesTest() : ServicesTest(Stalled()) {}

 private:
  static CardboardService::Setup Stalled() {
    CardboardService::Setup setup = FourSlots();
    setup.longest_call = std::chrono::milliseconds(200);
    setup.starts = false;
    return setup;
  }
};

// As when the disk hangs: the caller is told, and what comes of it later is the job that the same request finds.
TEST_F(StalledServicesTest, ACallThatCannotBeStoredEnds) {
  v1::SubmitJobResponse response;
  const grpc::Status status = Submit(SubmitRequest(JobYaml(), "request-1"), &response);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_THAT(status.error_message(), HasSubstr("request_id"));
  v1::SubmitJobRequest look = SubmitRequest(JobYaml());
  look.set_validate_only(true);
  const grpc::Status of_look = Submit(look, &response);
  EXPECT_EQ(of_look.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_THAT(of_look.error_message(), HasSubstr("ask again"));
  v1::DrainNodeRequest drain;
  drain.set_node("local");
  drain.set_keep_running(true);
  v1::DrainNodeResponse drained;
  grpc::ClientContext context;
  EXPECT_EQ(stub_->DrainNode(&context, drain, &drained).error_code(), grpc::StatusCode::DEADLINE_EXCEEDED);
  controller_.Start(launcher_);
  ASSERT_TRUE(Eventually([&] { return views_.All().size() == 1; }));
  // What was changed is in the audit log, however late.
  EXPECT_TRUE(Eventually([&] { return AuditLines("audit.jsonl").size() == 2; }));
  EXPECT_THAT(AuditLines("audit.jsonl"), ElementsAre(" SubmitJob OK", " DrainNode OK"));
  EXPECT_THAT(ReadText(dir_ / "audit.jsonl"), HasSubstr(views_.All()[0]->job.id()));
  ASSERT_TRUE(Submit(SubmitRequest(JobYaml(), "request-1"), &response).ok());
  EXPECT_TRUE(response.already_existed());
}

TEST_F(ServicesTest, EveryBadFieldOfARequestIsToldAtOnce) {
  const std::string id = MustSubmit(JobYaml()).id();
  const auto fields = [](const grpc::Status& status) {
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << status.error_message();
    v1::RpcStatus details;
    EXPECT_TRUE(details.ParseFromString(status.error_details()));
    std::string names;
    for (const google::protobuf::Any& any : details.details()) {
      v1::BadRequest bad_request;
      if (any.type_url() == "type.googleapis.com/google.rpc.BadRequest") bad_request.ParseFromString(any.value());
      for (const auto& violation : bad_request.field_violations()) absl::StrAppend(&names, violation.field(), " ");
    }
    return names;
  };
  {
    grpc::ClientContext context;
    v1::ListJobsRequest request;
    request.set_page_size(-1);
    request.set_page_token("x");
    v1::ListJobsResponse response;
    EXPECT_EQ(fields(stub_->ListJobs(&context, request, &response)), "page_size page_token ");
  }
  {
    grpc::ClientContext context;
    v1::ListMetricsRequest request;
    request.set_job_id(id);
    request.set_page_size(1 << 20);
    request.set_split("test");
    v1::ListMetricsResponse response;
    EXPECT_EQ(fields(stub_->ListMetrics(&context, request, &response)), "page_size split ");
  }
  grpc::ClientContext context;
  v1::StreamLogsRequest request;
  request.set_job_id(id);
  request.set_attempt(7);
  request.set_rank(9);
  request.set_tail_lines(-1);
  request.set_cursor("x");
  EXPECT_EQ(fields(stub_->StreamLogs(&context, request)->Finish()), "attempt rank tail_lines cursor ");
}

TEST_F(ImpatientServicesTest, AClientThatNeverReadsLosesItsStream) {
  const std::string id = MustSubmit(JobYaml()).id();
  grpc::ClientContext context;
  v1::WatchJobRequest request;
  request.set_job_id(id);
  const auto reader = stub_->WatchJob(&context, request);
  auto rank = AttachRightly(id);
  // More than lies in buffers on the way.
  for (int step = 1; step <= 20; ++step) {
    rank->Say(StepMessage(step));
    std::this_thread::sleep_for(kPatience / 6);
  }
  v1::WatchJobResponse message;
  int64_t last = 0;
  while (reader->Read(&message)) last = message.job().progress().step();
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_LT(last, 20);
}

}  // namespace
}  // namespace simpo
