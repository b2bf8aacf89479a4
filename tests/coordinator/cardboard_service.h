// The coordinator as its clients meet it: both services over real gRPC, with a real controller and real stores in a
// folder of their own, and gangs of cardboard.
#ifndef SIMPO_TESTS_COORDINATOR_CARDBOARD_SERVICE_H_
#define SIMPO_TESTS_COORDINATOR_CARDBOARD_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "coordinator/controller.h"
#include "coordinator/stream_pump.h"
#include "coordinator/training_service.h"
#include "coordinator/worker_service.h"
#include "tests/coordinator/testing.h"

namespace simpo {

struct CardboardService {
  struct Setup {
    Dispatcher::Options dispatcher = {.slots_total = 64, .restart = {.first_pause = std::chrono::milliseconds(10)}};
    int streams_per_user = 100;
    std::chrono::milliseconds patience = std::chrono::minutes(1);      // with clients that do not read
    std::chrono::milliseconds longest_call = std::chrono::minutes(1);  // of a user
    bool starts = true;                                                // the controller, with `launcher`
    std::function<void(const absl::Status&)> on_failure = [](const absl::Status& status) { ADD_FAILURE() << status; };
  };
  CardboardService() : CardboardService(Setup()) {}
  explicit CardboardService(Setup setup) : pump(setup.patience), streams_per_user(setup.streams_per_user) {
    stores = Stores::Open(dir / "test.db");
    facts = {.version = "1.2.3",
             .data_dir = dir.path().string(),
             .hostname = "here",
             .slots_total = setup.dispatcher.slots_total};
    setup.dispatcher.outputs_dir = dir / "outputs";
    setup.dispatcher.roots = roots;
    dispatcher.emplace(setup.dispatcher, *stores.database, *stores.jobs, *stores.metrics, views);
    controller.emplace(*dispatcher, setup.on_failure);
    views.SetListener([this] { pump.Wake(); });
    EXPECT_TRUE(dispatcher->Load(Moment::Now()).ok());
    training.emplace(TrainingService::Parts{.controller = *controller,
                                            .views = views,
                                            .jobs = *stores.jobs,
                                            .metrics = *stores.metrics,
                                            .pump = pump,
                                            .rpc_stats = rpc_stats,
                                            .facts = facts,
                                            .guard = guard,
                                            .roots = roots,
                                            .longest_call = setup.longest_call});
    workers.emplace(*controller, views, std::min(setup.patience, std::chrono::milliseconds(10'000)));
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&*training);
    builder.RegisterService(&*workers);
    server = builder.BuildAndStart();
    channel = server->InProcessChannel(grpc::ChannelArguments());
    stub = v1::TrainingService::NewStub(channel);
    stores.metrics->SetListener([this] { controller->Wake(); });
    if (setup.starts) controller->Start(launcher);
  }
  ~CardboardService() { Stop(); }

  // Once; the destructor does it too.
  void Stop() {
    if (!server) return;
    pump.Stop();
    server->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(2));
    controller->Stop();
    server.reset();
  }

  // The id of a new job whose gang has started.
  std::string NewJob(int ranks = 1) {
    v1::SubmitJobRequest request = SubmitRequest(JobYaml(ranks));
    v1::SubmitJobResponse response;
    grpc::ClientContext context;
    const grpc::Status status = stub->SubmitJob(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    const std::string id = response.job().id();
    EXPECT_TRUE(Eventually([&] { return !views.FindById(id)->secret.empty(); }));
    return id;
  }
  v1::Job Job(const std::string& id) const { return views.FindById(id)->job; }
  bool Reaches(const std::string& id, v1::JobState state) const {
    return Eventually([&] { return Job(id).state() == state; });
  }
  std::vector<v1::JobEvent> Events(const std::string& id) const {
    return *stores.jobs->EventsAfter(views.FindById(id)->sequence, 0, 10'000);
  }
  int CountEvents(const std::string& id, const std::string& type) const {
    int count = 0;
    for (const v1::JobEvent& event : Events(id)) count += event.type() == type;
    return count;
  }

  TempDir dir;
  Stores stores;
  ServerFacts facts;
  FakeLauncher launcher;
  JobViews views;
  RpcStats rpc_stats;
  StreamPump pump;
  const int streams_per_user;
  AuditLog audit{dir / "audit.jsonl"};
  AuditLog refusals{dir / "audit-refused.jsonl"};
  Guard guard{{.token_file = dir / "tokens.json",
               .streams_per_user = streams_per_user,
               .audit = &audit,
               .refusals = &refusals}};
  const AllowedRoots roots{dir / "outputs", {}, [this] { return guard.asks(); }};
  std::optional<Dispatcher> dispatcher;
  std::optional<Controller> controller;
  std::optional<TrainingService> training;
  std::optional<WorkerService> workers;
  std::unique_ptr<grpc::Server> server;
  std::shared_ptr<grpc::Channel> channel;  // within this process
  std::unique_ptr<v1::TrainingService::Stub> stub;
  int port = 0;  // of 127.0.0.1, for those who come from outside
};

// One end of a rank, which says what the test wants said.
struct CardboardRank {
  CardboardRank(CardboardService& service, const std::string& id, int rank = 0, int world = 1) {
    context.AddMetadata("simpo-attempt-secret", absl::StrCat("secret-of-", id, "/1"));
    stream = v1::WorkerService::NewStub(service.channel)->Attach(&context);
    v1::AttachRequest request;
    request.mutable_hello()->set_job_id(id);
    request.mutable_hello()->set_attempt(1);
    request.mutable_hello()->set_rank(rank);
    request.mutable_hello()->set_world_size(world);
    EXPECT_TRUE(stream->Write(request));
    v1::AttachResponse response;
    EXPECT_TRUE(stream->Read(&response) && response.has_welcome());
  }
  ~CardboardRank() {
    context.TryCancel();
    v1::AttachResponse response;
    while (stream->Read(&response)) {
    }
    stream->Finish();
  }
  void Say(const v1::AttachRequest& request) { EXPECT_TRUE(stream->Write(request)); }

  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientReaderWriter<v1::AttachRequest, v1::AttachResponse>> stream;
};

}  // namespace simpo

#endif  // SIMPO_TESTS_COORDINATOR_CARDBOARD_SERVICE_H_
