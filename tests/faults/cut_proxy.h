// A TCP proxy before a gRPC server that cuts connections at chosen places of chosen calls.
#ifndef SIMPO_TESTS_FAULTS_CUT_PROXY_H_
#define SIMPO_TESTS_FAULTS_CUT_PROXY_H_

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace simpo {

// Where the connection of a call is cut. Bytes are passed on up to that place and not one more.
enum class CutAt {
  kNowhere,
  kRequest,    // the server hears nothing of the call
  kDelivered,  // the server has the whole request; the client gets no byte of the answer
  kAnswer,     // the client gets a part of a message of the answer
  kEnd,        // the client gets the whole answer but not how it ended
};

// Knows as much of HTTP/2 as that needs: frames, and which stream a path belongs to (gRPC's own client sends the path
// of a connection's first call of a method as it is). Thread-safe.
class CutProxy {
 public:
  explicit CutProxy(int server_port) : server_port_(server_port) {
    listener_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address = Loopback(0);
    socklen_t size = sizeof(address);
    EXPECT_EQ(bind(listener_, reinterpret_cast<sockaddr*>(&address), size), 0);
    EXPECT_EQ(listen(listener_, 64), 0);
    EXPECT_EQ(getsockname(listener_, reinterpret_cast<sockaddr*>(&address), &size), 0);
    port_ = ntohs(address.sin_port);
    acceptor_ = std::thread([this] { Accept(); });
  }
  CutProxy(const CutProxy&) = delete;
  CutProxy& operator=(const CutProxy&) = delete;
  ~CutProxy() {
    stop_ = true;
    acceptor_.join();
    for (std::thread& thread : connections_) thread.join();
    close(listener_);
  }

  std::string address() const { return absl::StrCat("127.0.0.1:", port_); }

  // The next `times` calls of "/package.Service/Method" are cut. `message`: at which message of the answer, from 0.
  void Arm(const std::string& path, CutAt at, int times = 1, int message = 0) {
    const std::lock_guard lock(mutex_);
    armed_ = {.path = path, .at = at, .times = times, .message = message};
    cuts_ = 0;
  }
  // Since Arm.
  int cuts() const {
    const std::lock_guard lock(mutex_);
    return cuts_;
  }
  // Cuts the n-th frame (from 0) from now on that comes from the client, or from the server, in half.
  void CutFrame(bool of_client, int n) {
    const std::lock_guard lock(mutex_);
    frame_cut_ = {.of_client = of_client, .left = n, .armed = true};
    cuts_ = 0;
  }

 private:
  enum FrameType : uint8_t { kData = 0, kHeaders = 1 };
  struct Armed {
    std::string path;
    CutAt at = CutAt::kNowhere;
    int times = 0;
    int message = 0;
  };
  struct FrameCut {
    bool of_client = false;
    int left = 0;
    bool armed = false;
  };
  struct Call {
    CutAt at = CutAt::kNowhere;
    int messages_left = 0;
  };
  // One client, and its connection to the server.
  struct Connection {
    int client = -1, server = -1;
    std::string from_client, from_server;  // not passed on yet
    bool preface = true;                   // is yet to come
    std::map<uint32_t, Call> calls;        // by stream, those that are to be cut
  };

  static sockaddr_in Loopback(int port) {
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    address.sin_port = htons(static_cast<uint16_t>(port));
    return address;
  }

  void Accept() {
    while (!stop_) {
      pollfd ready = {.fd = listener_, .events = POLLIN, .revents = 0};
      if (poll(&ready, 1, 20) <= 0) continue;
      const int client = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (client < 0) continue;
      connections_.emplace_back([this, client] { Serve(client); });
    }
  }

  void Serve(int client) {
    Connection connection;
    connection.client = client;
    connection.server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    const sockaddr_in address = Loopback(server_port_);
    bool open = connect(connection.server, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
    const int yes = 1;
    for (int fd : {client, connection.server}) setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
    while (open && !stop_) {
      pollfd ready[2] = {{.fd = client, .events = POLLIN, .revents = 0},
                         {.fd = connection.server, .events = POLLIN, .revents = 0}};
      if (poll(ready, 2, 20) <= 0) continue;
      if (ready[0].revents != 0) open = Receive(client, &connection.from_client) && PassClientFrames(connection);
      if (open && ready[1].revents != 0) {
        open = Receive(connection.server, &connection.from_server) && PassServerFrames(connection);
      }
    }
    close(client);
    close(connection.server);
  }

  static bool Receive(int fd, std::string* buffer) {
    char bytes[65536];
    const ssize_t got = recv(fd, bytes, sizeof(bytes), 0);
    if (got <= 0) return false;
    buffer->append(bytes, static_cast<size_t>(got));
    return true;
  }

  static bool Send(int fd, std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = send(fd, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(sent));
    }
    return true;
  }

  // The length of the frame that the buffer begins with, or 0 while it is not whole.
  static size_t WholeFrame(const std::string& buffer) {
    constexpr size_t kHead = 9;
    if (buffer.size() < kHead) return 0;
    const auto byte = [&](size_t i) { return static_cast<size_t>(static_cast<unsigned char>(buffer[i])); };
    const size_t length = kHead + (byte(0) << 16 | byte(1) << 8 | byte(2));
    return buffer.size() < length ? 0 : length;
  }
  static uint32_t StreamOf(const std::string& frame) {
    uint32_t stream = 0;
    for (size_t i = 5; i < 9; ++i) stream = stream << 8 | static_cast<unsigned char>(frame[i]);
    return stream & 0x7fffffff;
  }

  void Count() {
    const std::lock_guard lock(mutex_);
    ++cuts_;
  }

  // Whether this frame is the one of CutFrame.
  bool IsFrameToCut(bool of_client) {
    const std::lock_guard lock(mutex_);
    if (!frame_cut_.armed || frame_cut_.of_client != of_client || frame_cut_.left-- > 0) return false;
    frame_cut_.armed = false;
    ++cuts_;
    return true;
  }

  // False: the connection is to be cut.
  bool PassClientFrames(Connection& connection) {
    constexpr size_t kPreface = 24;
    std::string& buffer = connection.from_client;
    if (connection.preface) {
      if (buffer.size() < kPreface) return true;
      if (!Send(connection.server, std::string_view(buffer).substr(0, kPreface))) return false;
      buffer.erase(0, kPreface);
      connection.preface = false;
    }
    while (const size_t length = WholeFrame(buffer)) {
      const std::string frame = buffer.substr(0, length);
      buffer.erase(0, length);
      if (frame[3] == kHeaders) {
        const std::lock_guard lock(mutex_);
        if (armed_.times > 0 && armed_.at != CutAt::kNowhere && frame.find(armed_.path) != std::string::npos) {
          --armed_.times;
          if (armed_.at == CutAt::kRequest) {
            ++cuts_;
            return false;
          }
          connection.calls[StreamOf(frame)] = {.at = armed_.at, .messages_left = armed_.message};
        }
      }
      if (IsFrameToCut(/*of_client=*/true)) {
        Send(connection.server, std::string_view(frame).substr(0, length / 2));
        return false;
      }
      if (!Send(connection.server, frame)) return false;
    }
    return true;
  }

  bool PassServerFrames(Connection& connection) {
    std::string& buffer = connection.from_server;
    while (const size_t length = WholeFrame(buffer)) {
      const std::string frame = buffer.substr(0, length);
      buffer.erase(0, length);
      const auto found = connection.calls.find(StreamOf(frame));
      if (found != connection.calls.end() && IsPlace(frame, &found->second)) {
        if (found->second.at == CutAt::kAnswer) Send(connection.client, std::string_view(frame).substr(0, length / 2));
        Count();
        return false;
      }
      if (IsFrameToCut(/*of_client=*/false)) {
        Send(connection.client, std::string_view(frame).substr(0, length / 2));
        return false;
      }
      if (!Send(connection.client, frame)) return false;
    }
    return true;
  }

  // Whether the call is to be cut at this frame of its answer.
  static bool IsPlace(const std::string& frame, Call* call) {
    constexpr char kEndStream = 1;
    const bool last = (frame[4] & kEndStream) != 0;
    switch (call->at) {
      case CutAt::kDelivered:
        return frame[3] == kHeaders;
      case CutAt::kAnswer:
        return last || (frame[3] == kData && call->messages_left-- == 0);
      default:
        return last;
    }
  }

  const int server_port_;
  int listener_ = -1;
  int port_ = 0;
  std::atomic<bool> stop_ = false;
  std::thread acceptor_;
  std::vector<std::thread> connections_;  // of acceptor_, until it has ended
  mutable std::mutex mutex_;
  Armed armed_;         // guarded by mutex_
  FrameCut frame_cut_;  // guarded by mutex_
  int cuts_ = 0;        // guarded by mutex_
};

}  // namespace simpo

#endif  // SIMPO_TESTS_FAULTS_CUT_PROXY_H_
