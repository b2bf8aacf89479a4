#include "coordinator/server.h"

#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include "coordinator/data_dir.h"
#include "simpo/v1/training_service.grpc.pb.h"
#include "testing.h"

namespace simpo {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

class ServerTest : public ::testing::Test {
 protected:
  ServerTest() {
    WriteText(dir_ / "false", "#!/bin/sh\nexit 1\n");
    std::filesystem::permissions(dir_ / "false", std::filesystem::perms::owner_all);
  }
  ServerOptions Options(const std::string& data = "data") const {
    ServerOptions options;
    options.data_dir = dir_ / data;
    options.listen = "127.0.0.1:0";
    options.http = "127.0.0.1:0";
    options.slots = 1;
    options.worker = dir_ / "false";
    options.mpirun = dir_ / "false";
    options.program = SIMPO_COORDINATOR_BINARY;
    return options;
  }
  absl::StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options) {
    return Server::Start(options, "1.2.3", [](const absl::Status& status) { ADD_FAILURE() << status; });
  }
  static std::unique_ptr<v1::TrainingService::Stub> Stub(const Server& server) {
    return v1::TrainingService::NewStub(grpc::CreateChannel(server.grpc_address(), grpc::InsecureChannelCredentials()));
  }
  // The bytes of grpc.health.v1.HealthCheckResponse for the whole server.
  static std::string CheckHealth(const std::string& address) {
    grpc::GenericStub stub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
    grpc::ClientContext context;
    grpc::CompletionQueue queue;
    const grpc::Slice empty;
    grpc::ByteBuffer request(&empty, 1), reply;
    grpc::Status status;
    auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
    call->StartCall();
    call->Finish(&reply, &status, nullptr);
    void* tag = nullptr;
    bool ok = false;
    EXPECT_TRUE(queue.Next(&tag, &ok));
    EXPECT_TRUE(status.ok()) << status.error_message();
    grpc::Slice slice;
    EXPECT_TRUE(reply.DumpToSingleSlice(&slice).ok());
    return {reinterpret_cast<const char*>(slice.begin()), slice.size()};
  }
  TempDir dir_;
};

// Half a restore.
TEST_F(ServerTest, AMissingMetricsFileBesideJobsIsSaid) {
  const auto log_of_a_start = [&] {
    ::testing::internal::CaptureStderr();
    EXPECT_TRUE(Start(Options()).ok());
    return ::testing::internal::GetCapturedStderr();
  };
  EXPECT_THAT(log_of_a_start(), Not(HasSubstr("no metrics.db beside it")));
  for (const char* file : {"metrics.db", "metrics.db-wal", "metrics.db-shm"}) {
    std::filesystem::remove(dir_ / "data" / file);
  }
  EXPECT_THAT(log_of_a_start(), HasSubstr("coordinator.db but no metrics.db beside it"));
  EXPECT_THAT(log_of_a_start(), Not(HasSubstr("no metrics.db beside it")));
}

// A port that somebody else listens on.
class TakenPort {
 public:
  TakenPort() : socket_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    EXPECT_EQ(bind(socket_, reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(listen(socket_, 1), 0);
    EXPECT_EQ(getsockname(socket_, reinterpret_cast<sockaddr*>(&address), &size), 0);
    port_ = ntohs(address.sin_port);
  }
  ~TakenPort() { close(socket_); }
  std::string address() const { return absl::StrCat("127.0.0.1:", port_); }

 private:
  int socket_;
  int port_ = 0;
};

TEST_F(ServerTest, ServesKeepsItsJobsAndAnswersHealthChecks) {
  std::string id;
  {
    const auto server = ValueOf(Start(Options()));
    grpc::ClientContext context;
    v1::SubmitJobResponse response;
    const grpc::Status status =
        Stub(*server)->SubmitJob(&context, SubmitRequest(JobYaml(1, "max_restarts: 0\n")), &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    id = response.job().id();
    httplib::Client http("http://" + server->http_address());
    EXPECT_THAT(http.Get("/metrics")->body, HasSubstr("job=\"" + id + "\""));
    EXPECT_EQ(CheckHealth(server->grpc_address()), std::string("\x08\x01")) << "SERVING";
  }
  const auto server = ValueOf(Start(Options()));
  EXPECT_TRUE(Eventually([&] {
    grpc::ClientContext context;
    v1::GetJobRequest request;
    request.set_job_id(id);
    v1::GetJobResponse response;
    const grpc::Status status = Stub(*server)->GetJob(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.job().state() == v1::JOB_STATE_FAILED;
  })) << "the worker ends with 1, and no restart is allowed";
}

TEST_F(ServerTest, ABackupOfARunningCoordinatorStartsElsewhere) {
  const auto server = ValueOf(Start(Options()));
  std::vector<std::string> ids;
  for (int i = 0; i < 3; ++i) {
    grpc::ClientContext context;
    v1::SubmitJobResponse response;
    const grpc::Status status =
        Stub(*server)->SubmitJob(&context, SubmitRequest(JobYaml(1, "max_restarts: 0\n")), &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    ids.push_back(response.job().id());
    if (i == 1) ASSERT_OK(BackUpDataDir(dir_ / "data", dir_ / "copy"));
  }
  const auto restored = ValueOf(Start(Options("copy")));
  for (const std::string& id : ids) {
    grpc::ClientContext context;
    v1::GetJobRequest request;
    request.set_job_id(id);
    v1::GetJobResponse response;
    const grpc::Status status = Stub(*restored)->GetJob(&context, request, &response);
    EXPECT_EQ(status.ok(), id != ids[2]) << "the last one came after the backup";
    EXPECT_EQ(response.job().config_yaml().empty(), !status.ok());
  }
}

TEST_F(ServerTest, TheDataDirectoryHasOneCoordinator) {
  const auto server = ValueOf(Start(Options()));
  const absl::Status status = Start(Options()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kAlreadyExists) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr((dir_ / "data").string()));
  EXPECT_TRUE(Start(Options("other")).ok());
}

TEST_F(ServerTest, APortInUseIsSaidAndNothingStays) {
  const TakenPort taken;
  ServerOptions options = Options();
  options.listen = taken.address();
  for (const char* flag : {"--listen", "--http"}) {
    const absl::Status status = Start(options).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(taken.address()));
    EXPECT_THAT(std::string(status.message()), HasSubstr(flag));
    options = Options();
    options.http = taken.address();
  }
  EXPECT_TRUE(Start(Options()).ok());
}

// As when the machine has no open file left for accept: the web server takes no connection after that.
TEST_F(ServerTest, AWebListenerThatEndsIsSaid) {
  std::mutex mutex;
  std::vector<std::string> failures;
  const auto server = ValueOf(Server::Start(Options(), "1.2.3", [&](const absl::Status& status) {
    const std::lock_guard lock(mutex);
    failures.emplace_back(status.message());
  }));
  int listener = -1;
  for (int fd = 0; fd < 1024 && listener < 0; ++fd) {
    sockaddr_in address = {};
    socklen_t size = sizeof(address);
    if (getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0 || address.sin_family != AF_INET) continue;
    if (absl::StrCat("127.0.0.1:", ntohs(address.sin_port)) == server->http_address()) listener = fd;
  }
  ASSERT_EQ(shutdown(listener, SHUT_RDWR), 0);
  const auto said = [&] {
    const std::lock_guard lock(mutex);
    return !failures.empty();
  };
  ASSERT_TRUE(Eventually(said));
  const std::lock_guard lock(mutex);
  EXPECT_THAT(failures, ::testing::ElementsAre(HasSubstr("running gangs go on, start the coordinator again")));
}

TEST_F(ServerTest, ADataDirectoryThatCannotBe) {
  WriteText(dir_ / "file", "");
  const absl::Status status = Start(Options("file/data")).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr((dir_ / "file/data").string()));
}

TEST_F(ServerTest, ADamagedDatabaseIsNamedAndKept) {
  WriteText(dir_ / "data" / "coordinator.db", std::string(8192, 'x'));
  const absl::Status status = Start(Options()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("coordinator.db"));
  EXPECT_EQ(ReadText(dir_ / "data" / "coordinator.db"), std::string(8192, 'x'));
}

}  // namespace
}  // namespace simpo
