// A whole coordinator as a stranger meets it. docs/security.md names these tests.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>

#include "common/status_macros.h"
#include "coordinator/server.h"
#include "coordinator/tls.h"
#include "coordinator/tokens.h"
#include "simpo/v1/training_service.grpc.pb.h"
#include "testing.h"
#include "tests/certificates.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::AnyOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr char kHere[] = "DNS:localhost,IP:127.0.0.1";

class SecurityTest : public ::testing::Test {
 protected:
  SecurityTest() {
    Script("false", "exit 1");
    WriteText(dir_ / "ca.pem", authority_.cert);
    Show(MakeIdentity("coordinator", &authority_, kHere));
  }
  void Script(const char* name, const std::string& body) {
    WriteText(dir_ / name, "#!/bin/sh\n" + body + "\n");
    fs::permissions(dir_ / name, fs::perms::owner_all);
  }
  // Puts a certificate where the server finds it, as a renewal does.
  void Show(const Identity& identity) {
    WriteText(dir_ / "new.pem", identity.cert);
    WriteText(dir_ / "new.key", identity.key);
    fs::rename(dir_ / "new.key", dir_ / "server.key");
    fs::rename(dir_ / "new.pem", dir_ / "server.pem");
  }
  ServerOptions Options() const {
    ServerOptions options;
    options.data_dir = dir_ / "data";
    options.listen = options.http = "127.0.0.1:0";
    options.slots = 2;
    options.worker = options.mpirun = dir_ / "false";
    options.program = SIMPO_COORDINATOR_BINARY;
    return options;
  }
  ServerOptions TlsOptions() const {
    ServerOptions options = Options();
    options.tls_cert = dir_ / "server.pem";
    options.tls_key = dir_ / "server.key";
    options.tls_ca = dir_ / "ca.pem";
    return options;
  }
  static std::unique_ptr<Server> Start(const ServerOptions& options) {
    return ValueOf(Server::Start(options, "1.2.3", [](const absl::Status& status) { ADD_FAILURE() << status; }));
  }
  std::string NewTokenOf(Role role, const std::string& user) {
    const NewToken made = ValueOf(MakeToken(role, user, 1, time(nullptr)));
    fs::create_directories(dir_ / "data");
    EXPECT_TRUE(AddToken(dir_ / "data/tokens.json", made.token).ok());
    return made.text;
  }
  // A channel of its own: nothing of an earlier connection is used again.
  static std::shared_ptr<grpc::Channel> Channel(const std::string& address, const Identity* authority,
                                                const Identity* own = nullptr, const std::string& name = "") {
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    if (!name.empty()) arguments.SetSslTargetNameOverride(name);
    auto credentials = authority == nullptr ? grpc::InsecureChannelCredentials()
                                            : grpc::SslCredentials({.pem_root_certs = authority->cert,
                                                                    .pem_private_key = own == nullptr ? "" : own->key,
                                                                    .pem_cert_chain = own == nullptr ? "" : own->cert});
    return grpc::CreateCustomChannel(address, credentials, arguments);
  }
  static grpc::Status List(const std::shared_ptr<grpc::Channel>& channel, const std::string& token = "",
                           v1::ListJobsResponse* response = nullptr) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    if (!token.empty()) context.AddMetadata("authorization", "Bearer " + token);
    v1::ListJobsResponse ignored;
    return v1::TrainingService::NewStub(channel)->ListJobs(&context, {}, response == nullptr ? &ignored : response);
  }

  TempDir dir_;
  const Identity authority_ = MakeIdentity("test authority", nullptr, "");
  const Identity stranger_ = MakeIdentity("another authority", nullptr, "");
};

TEST_F(SecurityTest, TlsIsSpokenAndNothingElse) {
  const auto server = Start(TlsOptions());
  EXPECT_TRUE(List(Channel(server->grpc_address(), &authority_)).ok());
  EXPECT_FALSE(List(Channel(server->grpc_address(), nullptr)).ok()) << "in the clear";
  EXPECT_FALSE(List(Channel(server->grpc_address(), &stranger_)).ok()) << "a server of a foreign authority";
  EXPECT_FALSE(List(Channel(server->grpc_address(), &authority_, nullptr, "other.host")).ok());
}

TEST_F(SecurityTest, ClientCertificates) {
  ServerOptions options = TlsOptions();
  options.tls_client_ca = dir_ / "ca.pem";
  const auto server = Start(options);
  const std::string& address = server->grpc_address();
  const Identity carl = MakeIdentity("carl", &authority_, "");
  EXPECT_TRUE(List(Channel(address, &authority_, &carl)).ok());

  const grpc::Status none = List(Channel(address, &authority_));
  EXPECT_EQ(none.error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_THAT(none.error_message(), HasSubstr("--cert"));
  const Identity foreign = MakeIdentity("carl", &stranger_, "");
  EXPECT_FALSE(List(Channel(address, &authority_, &foreign)).ok());
  const Identity expired = MakeIdentity("carl", &authority_, "", -7200, -3600);
  EXPECT_FALSE(List(Channel(address, &authority_, &expired)).ok());
  const Identity early = MakeIdentity("carl", &authority_, "", 3600, 7200);
  EXPECT_FALSE(List(Channel(address, &authority_, &early)).ok());

  // Jobs carry the certificate's name, whatever the request says.
  grpc::ClientContext context;
  v1::SubmitJobResponse response;
  const grpc::Status status = v1::TrainingService::NewStub(Channel(address, &authority_, &carl))
                                  ->SubmitJob(&context, SubmitRequest(JobYaml()), &response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(response.job().user(), "carl");
}

TEST_F(SecurityTest, ARenewedCertificateNeedsNoRestart) {
  ServerOptions options = TlsOptions();
  options.tls_ca.clear();  // the ranks trust the certificate itself
  const auto server = Start(options);
  EXPECT_TRUE(List(Channel(server->grpc_address(), &authority_)).ok());
  Show(MakeIdentity("coordinator", &stranger_, kHere));
  EXPECT_TRUE(Eventually([&] { return List(Channel(server->grpc_address(), &stranger_)).ok(); }));
  EXPECT_FALSE(List(Channel(server->grpc_address(), &authority_)).ok());
}

// The answer of /healthz: its status and text.
std::string HealthPage(const Server& server) {
  const auto page = httplib::Client("http://" + server.http_address()).Get("/healthz");
  return page ? absl::StrCat(page->status, " ", page->body) : "none";
}

TEST_F(SecurityTest, ARenewalThatDoesNotFitIsLoggedAndNotUsed) {
  const auto server = Start(TlsOptions());
  const Identity good = MakeIdentity("coordinator", &authority_, kHere);
  const Identity foreign = MakeIdentity("coordinator", &stranger_, kHere);
  const Identity expired = MakeIdentity("coordinator", &authority_, kHere, -7200, -3600);
  const Identity wrong_key = {.cert = good.cert, .key = stranger_.key, .x509 = {}, .pkey = {}};
  const Identity garbage = {.cert = "garbage", .key = good.key, .x509 = {}, .pkey = {}};
  for (const auto& [shown, line] :
       {std::pair(wrong_key, "is not that of"), std::pair(garbage, "holds no certificate"),
        std::pair(foreign, "does not vouch for"), std::pair(expired, "has expired; renew it")}) {
    Show(shown);
    std::string log;
    EXPECT_TRUE(Eventually([&] {
      testing::internal::CaptureStderr();
      EXPECT_TRUE(List(Channel(server->grpc_address(), &authority_)).ok()) << line;
      log += testing::internal::GetCapturedStderr();
      return !log.empty();
    })) << line;
    EXPECT_THAT(log, AllOf(HasSubstr(line), HasSubstr((dir_ / "server.").string()), HasSubstr("earlier certificate")));
  }
  EXPECT_EQ(HealthPage(*server), "200 ok\n") << "the earlier one still holds";
  testing::internal::CaptureStderr();
  Show(good);
  EXPECT_TRUE(List(Channel(server->grpc_address(), &authority_)).ok());
  EXPECT_EQ(testing::internal::GetCapturedStderr(), "");
}

TEST_F(SecurityTest, ACertificateThatRunsOutIsTold) {
  Show(MakeIdentity("coordinator", &authority_, kHere, -3600, 2));
  const auto server = Start(TlsOptions());
  EXPECT_TRUE(Eventually([&] { return HealthPage(*server) != "200 ok\n"; }));
  EXPECT_THAT(HealthPage(*server), AllOf(HasSubstr("503 "), HasSubstr("server.pem"), HasSubstr("has expired")));
  Show(MakeIdentity("coordinator", &authority_, kHere));
  EXPECT_EQ(HealthPage(*server), "200 ok\n");
}

TEST_F(SecurityTest, BadTlsFilesAreNamedBeforeAnythingStarts) {
  const auto problem = [](const TlsConfig& tls) { return std::string(CheckTls(tls).message()); };
  const std::string cert = dir_ / "server.pem", key = dir_ / "server.key", ca = dir_ / "ca.pem";
  EXPECT_EQ(problem({}), "");
  EXPECT_EQ(problem({cert, key, ca}), "");
  EXPECT_THAT(problem({cert, "", ""}), HasSubstr("--tls-key"));
  EXPECT_THAT(problem({"", "", ca}), HasSubstr("--tls-cert"));
  EXPECT_THAT(problem({dir_ / "nowhere", key, ""}), HasSubstr("nowhere"));
  EXPECT_THAT(problem({key, key, ""}), HasSubstr("holds no certificate"));
  EXPECT_THAT(problem({cert, cert, ""}), HasSubstr("holds no private key"));
  EXPECT_THAT(problem({cert, key, key}), HasSubstr("--tls-client-ca"));
  WriteText(dir_ / "other.key", stranger_.key);
  EXPECT_THAT(problem({cert, dir_ / "other.key", ""}), HasSubstr("is not that of"));
  EXPECT_EQ(problem({cert, key, "", ca}), "");
  EXPECT_EQ(problem({cert, key, "", cert}), "");
  EXPECT_THAT(problem({cert, key, "", key}), HasSubstr("--tls-ca: "));
  WriteText(dir_ / "other.pem", stranger_.cert);
  EXPECT_THAT(problem({cert, key, "", dir_ / "other.pem"}), AllOf(HasSubstr("--tls-ca: "), HasSubstr("other.pem")));
  WriteText(dir_ / "both.pem", stranger_.cert + authority_.cert);
  EXPECT_EQ(problem({cert, key, "", dir_ / "both.pem"}), "") << "any of several";
  Show(MakeIdentity("coordinator", &authority_, kHere, -7200, -3600));
  EXPECT_THAT(problem({cert, key, ""}), HasSubstr("expired"));
  Show(MakeIdentity("coordinator", &authority_, kHere, 3600, 7200));
  EXPECT_THAT(problem({cert, key, ""}), HasSubstr("not valid yet"));
}

TEST_F(SecurityTest, RanksCheckTheNameThatTheCertificateHolds) {
  const std::string cert = dir_ / "server.pem";
  EXPECT_EQ(ValueOf(NameToCheck(cert, "127.0.0.1")), "");
  EXPECT_EQ(ValueOf(NameToCheck(cert, "localhost")), "");
  EXPECT_EQ(ValueOf(NameToCheck(cert, "10.1.2.3")), "localhost");
  Show(MakeIdentity("coordinator", &authority_, "DNS:train.example,DNS:b.example"));
  EXPECT_EQ(ValueOf(NameToCheck(cert, "127.0.0.1")), "train.example");
  Show(MakeIdentity("coordinator", &authority_, "IP:10.0.0.1"));
  EXPECT_THAT(std::string(NameToCheck(cert, "127.0.0.1").status().message()), HasSubstr("DNS"));
}

// The flags as main.cc takes them.
absl::Status Complete(const std::vector<std::string>& flags, const std::string& config, const fs::path& config_file,
                      ServerOptions* options) {
  CLI::App app;
  AddServerFlags(app, options);
  std::vector<std::string> reversed(flags.rbegin(), flags.rend());
  app.parse(reversed);
  if (!config.empty()) {
    WriteText(config_file, config);
    SIMPO_RETURN_IF_ERROR(ReadServerConfig(app, config_file, options));
  }
  return CompleteServerOptions(options);
}

TEST_F(SecurityTest, AnOpenAddressNeedsTlsAndCredentials) {
  const std::string data = dir_ / "data", worker = dir_ / "false";
  const std::string cert = dir_ / "server.pem", key = dir_ / "server.key", ca = dir_ / "ca.pem";
  const auto check = [&](std::vector<std::string> flags, const std::string& config = "") {
    const std::vector<std::string> always = {"--data-dir", data, "--worker", worker, "--mpirun", worker};
    flags.insert(flags.end(), always.begin(), always.end());
    ServerOptions options;
    return Complete(flags, config, dir_ / "config.yaml", &options);
  };
  const std::vector<std::string> open = {"--listen", "0.0.0.0:0"};
  const auto with = [](std::vector<std::string> a, const std::vector<std::string>& b) {
    a.insert(a.end(), b.begin(), b.end());
    return a;
  };
  const std::vector<std::string> tls = {"--tls-cert", cert, "--tls-key", key};
  EXPECT_TRUE(check({}).ok());
  for (const auto& flags : {open, with(open, tls), {"--http", "0.0.0.0:0"}}) {
    const absl::Status status = check(flags);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr("--insecure"));
  }
  EXPECT_THAT(std::string(check(with(open, tls)).message()), Not(HasSubstr("encryption")));
  EXPECT_TRUE(check(with(open, {"--insecure"})).ok());
  EXPECT_TRUE(check(with(with(open, tls), {"--tls-client-ca", ca})).ok());
  EXPECT_TRUE(check(open, absl::StrCat("tls: {cert: ", cert, ", key: ", key, ", client_ca: ", ca, "}\n")).ok());
  EXPECT_THAT(std::string(check(open, "tls: {cart: x}\n").message()),
              HasSubstr("config.yaml:1: unknown key 'tls_cart'"));
  NewTokenOf(Role::kRead, "rita");
  EXPECT_TRUE(check(with(open, tls)).ok());
  EXPECT_FALSE(check(open).ok()) << "a token in the clear is everybody's";
  EXPECT_THAT(std::string(check({"--allowed-roots", dir_ / "nowhere"}).message()), HasSubstr("nowhere"));
  EXPECT_TRUE(check({}, absl::StrCat("allowed_roots: [", data, "]\n")).ok());
}

TEST_F(SecurityTest, TokensCountAtOnceAndOverARestart) {
  auto server = Start(Options());
  const auto channel = Channel(server->grpc_address(), nullptr);
  EXPECT_TRUE(List(channel).ok()) << "nobody is asked for a token until there is one";
  const std::string token = NewTokenOf(Role::kRead, "rita");
  EXPECT_EQ(List(channel).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_TRUE(List(channel, token).ok());
  EXPECT_EQ(List(channel, "simpo_x").error_code(), grpc::StatusCode::UNAUTHENTICATED);
  server.reset();
  testing::internal::CaptureStderr();
  server = Start(Options());
  EXPECT_THAT(testing::internal::GetCapturedStderr(), HasSubstr("set allowed_roots"));
  EXPECT_EQ(List(Channel(server->grpc_address(), nullptr)).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_TRUE(List(Channel(server->grpc_address(), nullptr), token).ok());
}

TEST_F(SecurityTest, ATokenFileThatCannotBeUsedIsToldAtTheStart) {
  NewTokenOf(Role::kRead, "rita");
  const fs::path file = dir_ / "data/tokens.json";
  const auto start = [&] { return Server::Start(Options(), "1.2.3", [](const absl::Status&) {}); };
  fs::permissions(file, fs::perms::owner_all | fs::perms::others_read);
  EXPECT_THAT(std::string(start().status().message()), AllOf(HasSubstr(file.string()), HasSubstr("chmod 600")));
  fs::permissions(file, fs::perms::owner_read | fs::perms::owner_write);
  EXPECT_TRUE(start().ok());
  WriteText(file, "[{");
  EXPECT_THAT(std::string(start().status().message()), AllOf(HasSubstr(file.string()), HasSubstr("from a backup")));
  fs::remove(file);
  EXPECT_TRUE(start().ok()) << "gangs are looked after, and calls refused, until the file is back";
}

// The program, as administrators type its commands.
class ProgramTest : public ::testing::Test {
 protected:
  // Both outputs, and the exit code before them.
  std::string Run(const std::string& arguments) {
    const std::string command =
        absl::StrCat("exec > '", (dir_ / "output").string(), "' 2>&1; '", SIMPO_COORDINATOR_BINARY, "' ", arguments);
    const int status = std::system(command.c_str());
    return absl::StrCat(WEXITSTATUS(status), " ", ReadText(dir_ / "output"));
  }
  std::string Create(const std::string& user) {
    return Run(absl::StrCat("token create --role read --user ", user, " --data-dir ", data_));
  }
  TempDir dir_;
  const std::string data_ = dir_ / "data";
};

TEST_F(ProgramTest, SayWhatTheyDid) {
  EXPECT_THAT(Run("token list --data-dir " + data_), AllOf(HasSubstr("1 "), HasSubstr("there is no data folder")));
  EXPECT_FALSE(fs::exists(data_));
  EXPECT_THAT(Create("rita"), AllOf(HasSubstr("0 "), HasSubstr("Making a new data folder: " + data_),
                                    HasSubstr("It is the first one"), HasSubstr("allowed_roots")));
  EXPECT_THAT(Create("sam"), AllOf(HasSubstr("0 "), Not(HasSubstr("first")), Not(HasSubstr("Making"))));
  const std::string id = nlohmann::json::parse(ReadText(dir_ / "data/tokens.json"))[0]["id"];
  EXPECT_EQ(Run(absl::StrCat("token revoke ", id, " --data-dir ", data_)),
            absl::StrCat("0 token ", id, " of rita is revoked\n"));
  EXPECT_TRUE(TokenStore(dir_ / "data/tokens.json").Required());
  fs::remove(dir_ / "data/tokens.json");
  EXPECT_THAT(Run("token list --data-dir " + data_), AllOf(HasSubstr("1 "), HasSubstr("every call is refused")));
}

TEST_F(ProgramTest, RootWritesAsTheFoldersOwner) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root";
  constexpr uid_t kSomebody = 12345;
  fs::create_directory(data_);
  fs::permissions(dir_.path(), fs::perms::others_exec, fs::perm_options::add);
  ASSERT_EQ(chown(data_.c_str(), kSomebody, kSomebody), 0);
  setenv("LSAN_OPTIONS", "detect_leaks=0", 1);  // a process that has left its account cannot look through itself
  EXPECT_THAT(Create("rita"), HasSubstr("0 "));
  unsetenv("LSAN_OPTIONS");
  for (const char* name : {"tokens.json", "tokens.json.lock"}) {
    struct stat info = {};
    ASSERT_EQ(stat((dir_ / "data" / name).c_str(), &info), 0);
    EXPECT_EQ(info.st_uid, kSomebody) << name;
    EXPECT_EQ(info.st_gid, kSomebody) << name;
  }
}

TEST_F(ProgramTest, TheReadyLineTellsWhetherThePortIsOpen) {
  const auto start = [&](const std::string& address) {
    return absl::StrCat("--worker /bin/true --mpirun /bin/true --http 127.0.0.1:0 --data-dir ", data_, " --listen ",
                        address);
  };
  // SIGTERM after it is ready ends it in order.
  const auto ready = [&](const std::string& arguments) {
    return Run(absl::StrCat(arguments, " & i=0; while ! grep -q ready: '", (dir_ / "output").string(),
                            "' && [ $i -lt 200 ]; do sleep 0.1; i=$((i+1)); done; kill $!; wait $!"));
  };
  const std::string open = ready(start("0.0.0.0:0 --insecure"));
  EXPECT_THAT(open, ContainsRegex("ready: grpc 127.0.0.1:[0-9]+, http .* slots; open to other machines at "
                                  "0.0.0.0:[0-9]+ \\(without TLS, insecure\\)"));
  const std::string closed = ready(start("127.0.0.1:0"));
  EXPECT_THAT(closed, HasSubstr("ready: grpc 127.0.0.1:"));
  EXPECT_THAT(closed, Not(HasSubstr("open to")));
}

TEST_F(ProgramTest, ABackupTakesTheFolderFromTheConfigFile) {
  WriteText(dir_ / "c.yaml", "data_dir: " + data_ + "\n");
  fs::create_directory(data_);
  { const auto database = ValueOf(Database::Open(dir_ / "data" / kJobsFile)); }
  EXPECT_EQ(Run(absl::StrCat("backup --config ", (dir_ / "c.yaml").string(), " --to ", (dir_ / "copy").string())),
            absl::StrCat("0 ", data_, ": backed up to ", (dir_ / "copy").string(), "\n"));
  EXPECT_TRUE(fs::exists(dir_ / "copy" / kJobsFile));
  EXPECT_THAT(Run("backup --to " + (dir_ / "other").string()), AllOf(HasSubstr("2 "), HasSubstr("--data-dir")));
}

// The bytes of grpc.health.v1.HealthCheckResponse: "\x08\x01" is SERVING, "\x08\x02" NOT_SERVING.
std::string HealthOf(const std::shared_ptr<grpc::Channel>& channel, const std::string& service) {
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  const std::string bytes =
      service.empty() ? "" : absl::StrCat("\x0a", std::string(1, static_cast<char>(service.size())), service);
  const grpc::Slice slice(bytes);
  grpc::ByteBuffer request(&slice, 1), reply;
  grpc::Status status;
  auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
  call->StartCall();
  call->Finish(&reply, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  EXPECT_TRUE(queue.Next(&tag, &ok));
  if (!status.ok()) return status.error_message();
  grpc::Slice answer;
  EXPECT_TRUE(reply.DumpToSingleSlice(&answer).ok());
  return {reinterpret_cast<const char*>(answer.begin()), answer.size()};
}

TEST_F(SecurityTest, HealthIsToldOfEachServiceWithoutAToken) {
  NewTokenOf(Role::kRead, "rita");
  const auto server = Start(Options());
  const auto channel = Channel(server->grpc_address(), nullptr);
  for (const char* service : {"", "simpo.v1.TrainingService", "simpo.v1.WorkerService"}) {
    EXPECT_EQ(HealthOf(channel, service), "\x08\x01") << service;
  }
  EXPECT_THAT(HealthOf(channel, "simpo.v1.Other"), Not(HasSubstr("\x08")));
}

// A health checker that watches hears that the coordinator goes, before it has gone.
TEST_F(SecurityTest, AStoppingCoordinatorSaysSo) {
  auto server = Start(Options());
  const auto channel = Channel(server->grpc_address(), nullptr);
  grpc::GenericStub stub(channel);
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  void* tag = nullptr;
  bool ok = false;
  const auto wait = [&] { return queue.Next(&tag, &ok) && ok; };
  auto call = stub.PrepareCall(&context, "/grpc.health.v1.Health/Watch", &queue);
  call->StartCall(nullptr);
  ASSERT_TRUE(wait());
  const grpc::Slice empty;
  call->Write(grpc::ByteBuffer(&empty, 1), nullptr);
  ASSERT_TRUE(wait());
  const auto read = [&]() -> std::string {
    grpc::ByteBuffer reply;
    call->Read(&reply, nullptr);
    if (!wait()) return "over";
    grpc::Slice answer;
    EXPECT_TRUE(reply.DumpToSingleSlice(&answer).ok());
    return {reinterpret_cast<const char*>(answer.begin()), answer.size()};
  };
  EXPECT_EQ(read(), "\x08\x01");
  std::thread stops([&] { server.reset(); });
  EXPECT_EQ(read(), "\x08\x02") << "NOT_SERVING";
  context.TryCancel();
  stops.join();
}

TEST_F(SecurityTest, OversizedRequestsAreRefusedAndTheServerGoesOn) {
  const auto server = Start(Options());
  const auto channel = Channel(server->grpc_address(), nullptr);
  const auto stub = v1::TrainingService::NewStub(channel);
  {
    grpc::ClientContext context;
    v1::SubmitJobResponse response;
    const grpc::Status status = stub->SubmitJob(&context, SubmitRequest(std::string(3 << 20, '#')), &response);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << status.error_message();
  }
  {
    grpc::ClientContext context;
    context.AddMetadata("x-much", std::string(64 << 10, 'x'));
    v1::ListJobsResponse response;
    EXPECT_FALSE(stub->ListJobs(&context, {}, &response).ok());
  }
  EXPECT_TRUE(List(Channel(server->grpc_address(), nullptr)).ok());
}

// A connection that says nothing.
class SilentSocket {
 public:
  explicit SilentSocket(const std::string& address) : fd_(socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in to = {};
    to.sin_family = AF_INET;
    to.sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(address.rfind(':') + 1))));
    inet_pton(AF_INET, "127.0.0.1", &to.sin_addr);
    EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof(to)), 0);
  }
  ~SilentSocket() { close(fd_); }
  void Say(const std::string& text) { EXPECT_GT(send(fd_, text.data(), text.size(), MSG_NOSIGNAL), 0); }
  // Whether the other end hangs up in time, whatever it says before.
  bool IsHungUpOn(int timeout_ms) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
    while (std::chrono::steady_clock::now() < end) {
      pollfd poll_fd = {.fd = fd_, .events = POLLIN};
      if (poll(&poll_fd, 1, 100) <= 0) continue;
      char buffer[4096];
      if (recv(fd_, buffer, sizeof(buffer), 0) <= 0) return true;
    }
    return false;
  }

 private:
  const int fd_;
};

TEST_F(SecurityTest, SlowClientsAreHungUpOnAndHoldUpNobody) {
  const auto server = Start(TlsOptions());
  std::vector<std::unique_ptr<SilentSocket>> silent;
  for (int i = 0; i < 50; ++i) silent.push_back(std::make_unique<SilentSocket>(server->grpc_address()));
  SilentSocket half(server->grpc_address());
  half.Say("\x16\x03\x01");  // the beginning of a handshake
  SilentSocket http(server->http_address());
  http.Say("GET /metr");
  EXPECT_TRUE(List(Channel(server->grpc_address(), &authority_)).ok()) << "while they hang on";
  httplib::Client well("http://" + server->http_address());
  EXPECT_EQ(well.Get("/healthz")->status, 200);
  EXPECT_TRUE(http.IsHungUpOn(15'000));
  EXPECT_TRUE(half.IsHungUpOn(15'000));
  for (const auto& socket : silent) EXPECT_TRUE(socket->IsHungUpOn(15'000));
}

TEST_F(SecurityTest, TheMetricsPageOnAnOpenAddress) {
  const std::string token = NewTokenOf(Role::kRead, "rita");
  ServerOptions options = TlsOptions();
  options.http = "0.0.0.0:0";
  options.tls_ca.clear();
  const auto server = Start(options);
  const int port = std::stoi(server->http_address().substr(server->http_address().rfind(':') + 1));
  httplib::SSLClient https("127.0.0.1", port);
  https.set_ca_cert_path((dir_ / "ca.pem").c_str());
  https.enable_server_certificate_verification(true);
  EXPECT_EQ(https.Get("/healthz")->status, 200);
  EXPECT_EQ(https.Get("/metrics")->status, 401);
  EXPECT_EQ(https.Get("/metrics", {{"Authorization", "Bearer nonsense"}})->status, 401);
  const auto page = https.Get("/metrics", {{"Authorization", "Bearer " + token}});
  ASSERT_EQ(page->status, 200);
  EXPECT_THAT(page->body, HasSubstr("simpo_coordinator_"));
  EXPECT_FALSE(httplib::Client("127.0.0.1", port).Get("/metrics")) << "in the clear";
  // A renewed certificate is shown at once.
  Show(MakeIdentity("coordinator", &stranger_, kHere));
  httplib::SSLClient again("127.0.0.1", port);
  again.set_ca_cert_path((dir_ / "ca.pem").c_str());
  again.enable_server_certificate_verification(true);
  EXPECT_FALSE(again.Get("/healthz"));
}

// Everything that a job's programs and the coordinator leave behind, but the secret's own file.
TEST_F(SecurityTest, AnAttemptsSecretIsOnNoCommandLineAndInNoLog) {
  const std::string look = absl::StrCat(
      "(echo \"$0 $@\"; env; for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; "
      "done) >> ",
      (dir_ / "seen").string(), " 2>/dev/null");
  Script("worker", look + "\necho from the worker\nexit 0");
  Script("mpirun", look + "\necho from mpirun\nexit 1");
  ServerOptions options = TlsOptions();
  options.worker = dir_ / "worker";
  options.mpirun = dir_ / "mpirun";
  options.restart_pause_s = options.restart_pause_max_s = 1000;  // until then its files stay
  const std::string token = NewTokenOf(Role::kSubmit, "sam");
  const auto server = Start(options);
  const auto stub = v1::TrainingService::NewStub(Channel(server->grpc_address(), &authority_));
  v1::SubmitJobResponse submitted;
  {
    grpc::ClientContext context;
    context.AddMetadata("authorization", "Bearer " + token);
    const grpc::Status status = stub->SubmitJob(&context, SubmitRequest(JobYaml(1)), &submitted);
    ASSERT_TRUE(status.ok()) << status.error_message();
  }
  EXPECT_EQ(submitted.job().user(), "sam") << "the request says alice";
  v1::GetJobResponse got;
  ASSERT_TRUE(Eventually([&] {
    grpc::ClientContext context;
    context.AddMetadata("authorization", "Bearer " + token);
    v1::GetJobRequest request;
    request.set_job_id(submitted.job().id());
    EXPECT_TRUE(stub->GetJob(&context, request, &got).ok());
    return got.job().state() == v1::JOB_STATE_RESTARTING;
  }));
  const fs::path secret_file = dir_ / "data/attempts" / submitted.job().id() / "1/secret";
  const std::string secret = ReadText(secret_file).substr(0, 64);
  ASSERT_EQ(secret.size(), 64u);
  EXPECT_EQ(fs::status(secret_file).permissions(), fs::perms::owner_read | fs::perms::owner_write);
  EXPECT_THAT(got.DebugString(), Not(HasSubstr(secret)));
  const std::string seen = ReadText(dir_ / "seen");
  EXPECT_THAT(seen, HasSubstr("--coordinator-file")) << "mpirun was looked at";
  EXPECT_THAT(seen, HasSubstr("SIMPO_ATTEMPT_SECRET_FILE=" + secret_file.string()));
  int files = 0;
  for (const auto& entry : fs::recursive_directory_iterator(dir_.path())) {
    if (!entry.is_regular_file() || entry.path() == secret_file) continue;
    ++files;
    const std::string text = ReadText(entry.path());
    EXPECT_EQ(text.find(secret), std::string::npos) << entry.path();
    EXPECT_EQ(text.find(token.substr(token.rfind('_') + 1)), std::string::npos) << entry.path();
  }
  EXPECT_GT(files, 8);
  // What ranks need to reach a coordinator with TLS stands in the file that they read.
  EXPECT_EQ(ReadText(secret_file.parent_path() / "coordinator_address"),
            absl::StrCat(server->grpc_address(), "\n", options.tls_ca, "\n\n"));
  // And the audit log tells who submitted.
  const auto line = nlohmann::json::parse(ReadText(dir_ / "data/audit.jsonl"));
  EXPECT_EQ(line["user"], "sam");
  EXPECT_EQ(line["method"], "SubmitJob");
  EXPECT_EQ(line["job"], submitted.job().id());
  EXPECT_EQ(line["outcome"], "OK");
}

// Folders that become links after their jobs were submitted.
TEST_F(SecurityTest, AnOutputFolderIsLookedAtAgainBeforeEachAttempt) {
  fs::create_directories(dir_ / "allowed/real");
  fs::create_directories(dir_ / "allowed/of-bob/out");
  fs::create_directories(dir_ / "outside");
  fs::create_symlink(dir_ / "allowed/real", dir_ / "allowed/link");
  ServerOptions options = Options();
  options.allowed_roots = {dir_ / "allowed"};
  // The first job holds the slots until the links have been turned.
  Script("worker", "while [ ! -e " + (dir_ / "go").string() + " ]; do sleep 0.05; done; exit 3");
  options.worker = dir_ / "worker";
  const auto server = Start(options);
  const auto stub = v1::TrainingService::NewStub(Channel(server->grpc_address(), nullptr));
  const auto submit = [&](const char* user, const char* folder) {
    grpc::ClientContext context;
    v1::SubmitJobResponse response;
    v1::SubmitJobRequest request =
        SubmitRequest(JobYaml(2, absl::StrCat("output_dir: ", (dir_ / folder).string(), "\n")));
    request.set_user(user);
    const grpc::Status status = stub->SubmitJob(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.job().id();
  };
  submit("bob", "allowed/of-bob/out");
  const std::string leaves = submit("alice", "allowed/link/out");
  const std::string intrudes = submit("alice", "allowed/mine");
  const std::string prunes = submit("alice", "allowed/prunes");
  fs::remove(dir_ / "allowed/real");
  fs::create_symlink(dir_ / "outside", dir_ / "allowed/real");
  fs::create_symlink(dir_ / "allowed/of-bob", dir_ / "allowed/mine");
  fs::create_directories(dir_ / "allowed/prunes");
  fs::create_symlink(dir_ / "allowed/of-bob", dir_ / "allowed/prunes/checkpoints");
  WriteText(dir_ / "go", "");
  for (const auto& [id, reason] : {std::pair(leaves, "allowed_roots"), std::pair(intrudes, "leads to a folder of job"),
                                   std::pair(prunes, "leads out of the output folder")}) {
    v1::GetJobResponse got;
    ASSERT_TRUE(Eventually([&] {
      grpc::ClientContext context;
      v1::GetJobRequest request;
      request.set_job_id(id);
      EXPECT_TRUE(stub->GetJob(&context, request, &got).ok());
      return got.job().state() == v1::JOB_STATE_FAILED;
    }));
    EXPECT_THAT(got.job().reason(), HasSubstr(reason));
    EXPECT_EQ(got.job().restarts(), 0);
  }
  EXPECT_TRUE(fs::is_empty(dir_ / "outside"));
}

}  // namespace
}  // namespace simpo
