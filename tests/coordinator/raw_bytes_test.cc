// Bytes that no client of ours would send, on the ports themselves: random ones, and good requests with mistakes. The
// server goes on, answers good calls between them, and keeps nothing of the bad ones.
#include <arpa/inet.h>
#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <httplib.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <random>

#include "coordinator/server.h"
#include "simpo/v1/training_service.grpc.pb.h"
#include "testing.h"

namespace simpo {
namespace {

using ::testing::HasSubstr;

constexpr char kPreface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
enum FrameType { kData = 0, kHeaders = 1, kSettings = 4 };
constexpr int kEndStream = 1, kEndHeaders = 4;

std::string Frame(int type, int flags, uint32_t stream, const std::string& payload) {
  const size_t length = payload.size();
  std::string frame;
  for (const int shift : {16, 8, 0}) frame += static_cast<char>(length >> shift & 0xff);
  frame += static_cast<char>(type);
  frame += static_cast<char>(flags);
  for (const int shift : {24, 16, 8, 0}) frame += static_cast<char>(stream >> shift & 0xff);
  return frame + payload;
}

// A header as HPACK's literal that is kept in no table.
std::string Header(const std::string& name, const std::string& value) {
  return std::string(1, '\0') + static_cast<char>(name.size()) + name + static_cast<char>(value.size()) + value;
}

// GetServerInfo without a token, as HTTP/2 has it.
std::string GoodCall() {
  const std::string headers = Header(":method", "POST") + Header(":scheme", "http") +
                              Header(":path", "/simpo.v1.TrainingService/GetServerInfo") + Header(":authority", "x") +
                              Header("content-type", "application/grpc") + Header("te", "trailers");
  return kPreface + Frame(kSettings, 0, 0, "") + Frame(kHeaders, kEndHeaders, 1, headers) +
         Frame(kData, kEndStream, 1, std::string(5, '\0'));
}

class RawBytesTest : public ::testing::Test {
 protected:
  RawBytesTest() {
    WriteText(dir_ / "false", "#!/bin/sh\nexit 1\n");
    std::filesystem::permissions(dir_ / "false", std::filesystem::perms::owner_all);
    ServerOptions options;
    options.data_dir = dir_ / "data";
    options.listen = options.http = "127.0.0.1:0";
    options.slots = 1;
    options.worker = options.mpirun = dir_ / "false";
    options.program = SIMPO_COORDINATOR_BINARY;
    server_ = ValueOf(Server::Start(options, "1.2.3", [](const absl::Status& status) { ADD_FAILURE() << status; }));
  }

  size_t Below(size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random_); }
  std::string Bytes(size_t count) {
    std::string bytes(count, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random_());
    return bytes;
  }
  std::string Mutated(std::string text) {
    for (size_t i = 0, changes = 1 + Below(4); i < changes && !text.empty(); ++i) {
      const size_t at = Below(text.size());
      switch (Below(5)) {
        case 0:
          text[at] = static_cast<char>(random_());
          break;
        case 1:
          text.insert(at, Bytes(1 + Below(40)));
          break;
        case 2:
          text.erase(at, 1 + Below(12));
          break;
        case 3:
          text.insert(at, text.substr(Below(text.size()), 1 + Below(300)));
          break;
        default:
          text.resize(at);
      }
    }
    return text;
  }

  // What comes back within `wait`, if anything is waited for.
  static std::string Exchange(const std::string& address, const std::string& bytes, std::chrono::milliseconds wait) {
    const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in to = {};
    to.sin_family = AF_INET;
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    to.sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(address.rfind(':') + 1))));
    if (connect(fd, reinterpret_cast<sockaddr*>(&to), sizeof(to)) != 0) {
      ADD_FAILURE() << "cannot connect to " << address << ": " << strerror(errno);
    } else {
      send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);  // it may have been closed already
    }
    std::string answer;
    if (wait.count() > 0) {
      const timeval limit{.tv_sec = wait.count() / 1000, .tv_usec = wait.count() % 1000 * 1000};
      setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
      char buffer[4096];
      for (ssize_t count = 0; (count = recv(fd, buffer, sizeof(buffer), 0)) > 0;) {
        answer.append(buffer, static_cast<size_t>(count));
        if (answer.find("1.2.3") != std::string::npos) break;
      }
    }
    close(fd);
    return answer;
  }

  void ExpectGoodCallsWork() {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    v1::GetServerInfoResponse response;
    const auto channel = grpc::CreateChannel(server_->grpc_address(), grpc::InsecureChannelCredentials());
    const grpc::Status status = v1::TrainingService::NewStub(channel)->GetServerInfo(&context, {}, &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    EXPECT_EQ(response.version(), "1.2.3");
    httplib::Client http("http://" + server_->http_address());
    const auto page = http.Get("/metrics");
    ASSERT_TRUE(page) << "no answer over HTTP";
    EXPECT_EQ(page->status, 200);
  }

  static int OpenFiles() {
    int count = 0;
    for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) ++count;
    return count;
  }

  // Makes and sends `make`'s bytes, many times.
  void Bombard(const std::string& address, int rounds, const std::function<std::string()>& make) {
    ExpectGoodCallsWork();
    const int files = OpenFiles();
    for (int i = 0; i < rounds; ++i) {
      Exchange(address, make(), std::chrono::milliseconds(i % 50 == 0 ? 20 : 0));
      if (i % 500 == 499) ExpectGoodCallsWork();
      if (HasFatalFailure()) return;
    }
    EXPECT_TRUE(Eventually([&] { return OpenFiles() <= files + 8; })) << OpenFiles() << " open files, before " << files;
    ExpectGoodCallsWork();
  }

  TempDir dir_;
  std::unique_ptr<Server> server_;
  std::mt19937_64 random_{20240611};
};

TEST_F(RawBytesTest, OnThePortOfGrpc) {
  // What the mistakes are made in is a call.
  ASSERT_THAT(Exchange(server_->grpc_address(), GoodCall(), std::chrono::seconds(10)), HasSubstr("1.2.3"));
  Bombard(server_->grpc_address(), 2000, [&]() -> std::string {
    switch (Below(4)) {
      case 0:
        return Bytes(Below(600));
      case 1: {  // frames of any kind, some of them longer or shorter than they say
        std::string frames = kPreface;
        for (size_t count = 1 + Below(8); count > 0; --count) {
          frames += Frame(static_cast<int>(Below(12)), static_cast<int>(Below(256)), static_cast<uint32_t>(Below(6)),
                          Bytes(Below(100)));
        }
        return Below(2) == 0 ? frames : Mutated(frames);
      }
      default:
        return Mutated(GoodCall());
    }
  });
}

TEST_F(RawBytesTest, OnThePortOfHttp) {
  const std::string good = "GET /metrics HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer x\r\nConnection: close\r\n\r\n";
  ASSERT_THAT(Exchange(server_->http_address(), good, std::chrono::seconds(10)), HasSubstr("1.2.3"));
  Bombard(server_->http_address(), 1500, [&]() -> std::string {
    static constexpr const char* kOdd[] = {
        "GET /metrics HTTP/1.1\r\nContent-Length: 18446744073709551616\r\n\r\nx",
        "GET /metrics HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        "POST /healthz HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nx",
        "POST / HTTP/1.1\r\nContent-Type: multipart/form-data; boundary=\r\nContent-Length: 4\r\n\r\n--\r\n",
        "GET /%00%ff/../../etc/passwd HTTP/1.1\r\nRange: bytes=0-,-1,5-2\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "\r\n\r\n\r\n"};
    switch (Below(5)) {
      case 0:
        return Bytes(Below(600));
      case 1:
        return kOdd[Below(std::size(kOdd))];
      case 2:
        return absl::StrCat("GET / HTTP/1.1\r\nX: ", std::string(Below(100'000), 'x'), "\r\n\r\n");
      default:
        return Mutated(good);
    }
  });
}

}  // namespace
}  // namespace simpo
