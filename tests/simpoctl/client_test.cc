#include "simpoctl/client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <vector>

#include "common/tls_files.h"
#include "simpoctl/exit_codes.h"
#include "simpoctl/interrupt.h"
#include "tests/certificates.h"
#include "tests/simpoctl/fake_service.h"
#include "tests/temp_dir.h"

namespace simpo {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

TEST(Client, SubmitIsAskedAgainWithTheSameRequestId) {
  FakeService service;
  std::vector<std::string> seen;
  service.on_submit = [&](const v1::SubmitJobRequest& request, v1::SubmitJobResponse* response) {
    seen.push_back(request.request_id());
    if (seen.size() < 3) return grpc::Status(grpc::StatusCode::UNAVAILABLE, "restarting");
    response->mutable_job()->set_id("abc");
    return grpc::Status::OK;
  };
  Client client(service.address(), "simpoctl");
  v1::SubmitJobRequest request;
  request.set_request_id("only-one");
  const absl::StatusOr<v1::SubmitJobResponse> response = client.Submit(request);
  service.Settle();
  ASSERT_TRUE(response.ok()) << response.status();
  EXPECT_EQ(response->job().id(), "abc");
  EXPECT_THAT(seen, ElementsAre("only-one", "only-one", "only-one"));
}

TEST(Client, ARefusalIsNotAskedAgain) {
  FakeService service;
  int calls = 0;
  service.on_submit = [&](const v1::SubmitJobRequest&, v1::SubmitJobResponse*) {
    ++calls;
    return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "a.yaml:1: beta: wrong\na.yaml:2: seed: wrong");
  };
  const absl::Status status = Client(service.address(), "simpoctl").Submit({}).status();
  EXPECT_EQ(status.message(), "a.yaml:1: beta: wrong\na.yaml:2: seed: wrong");
  EXPECT_EQ(ExitCodeOf(status), kExitUsage);
  service.Settle();
  EXPECT_EQ(calls, 1);
}

TEST(Client, NobodyThereIsOneMessageWithTheRemedy) {
  std::string address;
  {
    const FakeService gone;
    address = gone.address();
  }
  const absl::Status status = Client(address, "simpoctl").GetJob("x").status();
  EXPECT_THAT(std::string(status.message()),
              AllOf(HasSubstr("cannot reach the coordinator at " + address + " (Connection refused)"),
                    HasSubstr("simpo-coordinator --data-dir"), HasSubstr("SIMPO_ADDRESS")));
  EXPECT_EQ(ExitCodeOf(status), kExitError);
}

TEST(Client, WhatTheCoordinatorItselfSaysIsNoLostConnection) {
  FakeService service;
  service.on_get = [](const v1::GetJobRequest&, v1::GetJobResponse*) {
    return grpc::Status(grpc::StatusCode::UNAVAILABLE, "the coordinator cannot check tokens: x", "details");
  };
  EXPECT_EQ(Client(service.address(), "simpoctl").GetJob("x").status().message(),
            "the coordinator at " + service.address() + " answered: the coordinator cannot check tokens: x");
}

TEST(Client, WordsOfAFailedConnectionHaveTheirRemedy) {
  const auto remedy = [](const char* words, const Client::Credentials& credentials = {}) {
    const Client client("far.example:1", "simpoctl", credentials);
    return std::string(client.ToStatus(grpc::Status(grpc::StatusCode::UNAVAILABLE, words)).message());
  };
  EXPECT_THAT(remedy("failed to connect: Connection refused"), HasSubstr("Start it"));
  for (const char* words : {"Trying to connect an http1.x server", "Socket closed", "lost",
                            "DNS resolution failed: x: Domain name not found"}) {
    EXPECT_THAT(remedy(words), Not(HasSubstr("Start it"))) << words;
  }
  EXPECT_THAT(remedy("Trying to connect an http1.x server"), AllOf(HasSubstr("web page"), HasSubstr("7077")));
  EXPECT_THAT(remedy("wrong version number"), AllOf(HasSubstr("--ca"), HasSubstr("7077")));
  EXPECT_THAT(remedy("Socket closed"), HasSubstr("--ca"));
  const Identity authority = MakeIdentity("authority", nullptr, "");
  Client::Credentials credentials{.texts = {.ca = authority.cert}};
  EXPECT_THAT(remedy("Socket closed", credentials), AllOf(HasSubstr("Look whether it runs"), Not(HasSubstr("--ca"))));
  credentials.texts.cert = authority.cert;
  credentials.texts.key = authority.key;
  EXPECT_THAT(remedy("Socket closed", credentials), HasSubstr("may not accept your certificate"));
}

TEST(TlsFiles, AFileThatDoesNotFitIsNamed) {
  const TempDir dir;
  const auto write = [&](const char* name, const std::string& text) {
    std::ofstream(dir / name) << text;
    return (dir / name).string();
  };
  const Identity authority = MakeIdentity("authority", nullptr, "");
  const Identity user = MakeIdentity("user", &authority, "");
  const Identity old = MakeIdentity("old", &authority, "", -7200, -3600);
  const std::string ca = write("ca.pem", "Text may stand before it.\n" + authority.cert);
  const std::string cert = write("user.pem", user.cert), key = write("user.key", user.key);
  const std::string other_key = write("other.key", authority.key);
  const auto problem = [](const TlsFiles& files) { return std::string(ReadTlsFiles(files).status().message()); };
  EXPECT_EQ(problem({.ca = ca, .cert = cert, .key = key}), "");
  EXPECT_EQ(problem({.ca = key}), "--ca (SIMPO_CA): " + key + " holds no certificate in PEM form");
  EXPECT_EQ(problem({.ca = ca, .cert = key, .key = key}),
            "--cert (SIMPO_CERT): " + key + " holds no certificate in PEM form");
  EXPECT_THAT(problem({.ca = ca, .cert = cert, .key = cert}), HasSubstr("--key (SIMPO_KEY): " + cert));
  EXPECT_EQ(problem({.ca = ca, .cert = cert, .key = other_key}),
            "--key (SIMPO_KEY): the key " + other_key + " is not that of " + cert);
  EXPECT_THAT(problem({.ca = ca, .cert = write("old.pem", old.cert), .key = write("old.key", old.key)}),
              HasSubstr("has expired"));
  EXPECT_THAT(problem({.ca = (dir / "none").string()}), HasSubstr("--ca (SIMPO_CA): "));
}

class ReconnectTest : public ::testing::Test {
 protected:
  const grpc::Status refused_{grpc::StatusCode::UNAVAILABLE, "failed to connect to all addresses: Connection refused"};
  const Client client_{"127.0.0.1:1", "simpoctl"};
  Interrupt interrupt_;
  std::string said_;
  Reconnect reconnect_{client_, interrupt_, [this](std::string_view text) { said_ += text; }};
};

TEST_F(ReconnectTest, WhoNeverWasThereIsNotWaitedFor) {
  EXPECT_EQ(reconnect_.Next(refused_).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(said_, "");
}

// A stream may have had nothing to say: the log of a job that has not begun.
TEST_F(ReconnectTest, AStreamThatBreaksBeforeItsFirstWordIsALoss) {
  EXPECT_TRUE(reconnect_.Next(grpc::Status(grpc::StatusCode::UNAVAILABLE, "Socket closed")).ok());
  EXPECT_TRUE(reconnect_.Next(refused_).ok());
  EXPECT_TRUE(reconnect_.Next(refused_).ok());
  EXPECT_THAT(said_, AllOf(StartsWith("Lost the coordinator"), Not(HasSubstr("Connected again"))));
}

TEST_F(ReconnectTest, OneThatEndsInOrderBeforeItsFirstWordToo) {
  EXPECT_TRUE(reconnect_.Next(grpc::Status::OK).ok());
  EXPECT_TRUE(reconnect_.Next(refused_).ok());
}

// A stream that ran until its own time was connected all along.
TEST_F(ReconnectTest, AStreamWithoutAWordUntilItsTimeIsOverIsNoLoss) {
  const grpc::Status late(grpc::StatusCode::DEADLINE_EXCEEDED, "Deadline Exceeded");
  EXPECT_TRUE(reconnect_.Next(late).ok());
  EXPECT_EQ(said_, "");
  EXPECT_TRUE(reconnect_.Next(refused_).ok());
  EXPECT_TRUE(reconnect_.Next(late).ok());
  EXPECT_THAT(said_, EndsWith("Connected again.\n"));
}

TEST(Client, AnOlderServerIsNamed) {
  FakeService service;
  service.on_get = [](const v1::GetJobRequest&, v1::GetJobResponse*) {
    return grpc::Status(grpc::StatusCode::UNIMPLEMENTED, "");
  };
  EXPECT_THAT(std::string(Client(service.address(), "simpoctl").GetJob("x").status().message()),
              HasSubstr("simpoctl version"));
}

TEST(CoordinatorAddress, FlagThenVariableThenDefault) {
  unsetenv("SIMPO_ADDRESS");
  EXPECT_EQ(*CoordinatorAddress(""), "127.0.0.1:7077");
  setenv("SIMPO_ADDRESS", "host:1", 1);
  EXPECT_EQ(*CoordinatorAddress(""), "host:1");
  EXPECT_EQ(*CoordinatorAddress("[::1]:2"), "[::1]:2");
  setenv("SIMPO_ADDRESS", "host", 1);
  EXPECT_THAT(std::string(CoordinatorAddress("").status().message()), HasSubstr("SIMPO_ADDRESS is 'host'"));
  unsetenv("SIMPO_ADDRESS");
  for (const char* wrong : {"http://127.0.0.1:7077", "host", ":1", "host:", "host:0", "host:65536", "host:x"}) {
    EXPECT_EQ(ExitCodeOf(CoordinatorAddress(wrong).status()), kExitUsage) << wrong;
  }
}

TEST(Token, FileThenVariable) {
  const std::string file = ::testing::TempDir() + "/simpoctl_token";
  std::ofstream(file) << "simpo_a_b\n";
  setenv("SIMPO_TOKEN", "simpo_c_d", 1);
  EXPECT_EQ(*TokenFor("127.0.0.1:1", file, false, false), "simpo_a_b");
  EXPECT_EQ(*TokenFor("127.0.0.1:1", "", false, false), "simpo_c_d");
  setenv("SIMPO_TOKEN", "two words", 1);
  EXPECT_EQ(ExitCodeOf(TokenFor("127.0.0.1:1", "", false, false).status()), kExitUsage);
  unsetenv("SIMPO_TOKEN");
  EXPECT_EQ(*TokenFor("far.example:1", "", false, false), "");
  EXPECT_THAT(std::string(TokenFor("127.0.0.1:1", "/no/such/file", false, false).status().message()),
              HasSubstr("/no/such/file"));
}

TEST(Token, NeverTravelsToAnotherMachineInTheClear) {
  setenv("SIMPO_TOKEN", "simpo_c_d", 1);
  const absl::Status status = TokenFor("far.example:1", "", /*tls=*/false, /*insecure=*/false).status();
  EXPECT_EQ(ExitCodeOf(status), kExitUsage);
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("--ca"), HasSubstr("--insecure")));
  EXPECT_TRUE(TokenFor("far.example:1", "", /*tls=*/true, false).ok());
  EXPECT_TRUE(TokenFor("far.example:1", "", false, /*insecure=*/true).ok());
  for (const char* here : {"localhost:1", "[::1]:1", "127.0.0.9:1"}) EXPECT_TRUE(TokenFor(here, "", false, false).ok());
  EXPECT_FALSE(TokenFor("127.evil.example:1", "", false, false).ok());
  unsetenv("SIMPO_TOKEN");
}

TEST(Token, IsInEveryCallAndEveryStream) {
  FakeService service;
  std::vector<std::string> seen;
  service.on_call = [&](const grpc::ServerContext& context) {
    const auto found = context.client_metadata().find("authorization");
    seen.push_back(found == context.client_metadata().end() ? ""
                                                            : std::string(found->second.data(), found->second.size()));
  };
  service.on_get = [](const v1::GetJobRequest&, v1::GetJobResponse*) { return grpc::Status::OK; };
  service.on_watch = [](grpc::ServerContext*, const v1::WatchJobRequest&, grpc::ServerWriter<v1::WatchJobResponse>*) {
    return grpc::Status::OK;
  };
  Client client(service.address(), "simpoctl", {.token = "simpo_a_b"});
  EXPECT_TRUE(client.GetJob("x").ok());
  grpc::ClientContext context;
  const auto stream = client.stub().WatchJob(&context, {});
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_TRUE(Client(service.address(), "simpoctl").GetJob("x").ok());
  service.Settle();
  EXPECT_THAT(seen, ElementsAre("Bearer simpo_a_b", "Bearer simpo_a_b", ""));
}

TEST(ExitCodes, OfErrorsAndStates) {
  EXPECT_EQ(ExitCodeOf(absl::OkStatus()), 0);
  EXPECT_EQ(ExitCodeOf(absl::NotFoundError("")), 102);
  EXPECT_EQ(ExitCodeOf(absl::PermissionDeniedError("")), 4);
  EXPECT_EQ(ExitCodeOf(absl::UnauthenticatedError("")), 4);
  EXPECT_EQ(ExitCodeOf(absl::UnavailableError("")), 1);
  EXPECT_EQ(ExitCodeOf(v1::JOB_STATE_SUCCEEDED), 0);
  EXPECT_EQ(ExitCodeOf(v1::JOB_STATE_FAILED), 100);
  EXPECT_EQ(ExitCodeOf(v1::JOB_STATE_RUNNING), 101);
  EXPECT_EQ(ExitCodeOf(v1::JOB_STATE_CANCELLED), 103);
  for (const char* code : {"  0  ", "  1  ", "  2  ", "  4  ", "100  ", "101  ", "102  ", "103  "}) {
    EXPECT_THAT(ExitCodesHelp(), HasSubstr(code));
  }
}

}  // namespace
}  // namespace simpo
