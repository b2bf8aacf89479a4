#include "coordinator/http_server.h"

#include <fcntl.h>
#include <netdb.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <prometheus/text_serializer.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <list>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

using Clock = std::chrono::steady_clock;

// A page takes a thread for as long as it is made, and no longer: who asks or reads slowly costs a place among
// `kMaxConnections` for a bounded time, and the newest gets the place of whoever has had one the longest.
constexpr size_t kThreads = 4;
constexpr size_t kMaxConnections = 64;  // of a thread
constexpr size_t kMaxPages = 4;         // of /metrics on their way, of a thread: they can be large
constexpr std::chrono::seconds kRequestTime{5};
constexpr std::chrono::seconds kResponseTime{30};
constexpr size_t kMaxRequestBytes = 16 << 10;
constexpr char kTextType[] = "text/plain; charset=utf-8";
constexpr char kMetricsType[] = "text/plain; version=0.0.4; charset=utf-8";

constexpr char kPage[] = R"(<!doctype html>
<html lang="en"><meta charset="utf-8"><title>%</title>
<h1>%</h1>
<ul>
<li><a href="/metrics">/metrics</a>: every job's values for Prometheus (scrape it with honor_labels: true)
<li><a href="/healthz">/healthz</a>: whether the coordinator is well
</ul>
<p>Jobs are listed by <code>simpoctl list</code> and followed by <code>simpoctl watch JOB</code>.
</html>
)";

std::string Page(const std::string& title) {
  std::string page;
  for (const char* c = kPage; *c != '\0'; ++c) *c == '%' ? page.append(title) : page.append(1, *c);
  return page;
}

struct Free {
  void operator()(SSL_CTX* context) const { SSL_CTX_free(context); }
  void operator()(SSL* ssl) const { SSL_free(ssl); }
};

// A file descriptor that is closed with its owner.
class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

struct Connection {
  Connection(int socket, std::string from) : fd(socket), peer(std::move(from)) {}

  Descriptor fd;
  const std::string peer;          // address
  std::unique_ptr<SSL, Free> ssl;  // with TLS
  bool secured = false;            // the handshake is over
  std::string in;
  std::string out;  // empty until the request is there
  size_t sent = 0;
  bool large = false;  // `out` is /metrics
  short waits_for = POLLIN;
  Clock::time_point deadline = Clock::now() + kRequestTime;
};

struct Response {
  int status = 200;
  std::string body;
  std::string type = kTextType;
  std::string more;  // header lines
};

// The value of a header, "" without it. `head` is the request down to its empty line.
std::string Header(std::string_view head, std::string_view name) {
  for (size_t at = head.find("\r\n"); at != std::string_view::npos; at = head.find("\r\n", at)) {
    at += 2;
    const std::string_view line = head.substr(at, head.find("\r\n", at) - at);
    const size_t colon = line.find(':');
    if (colon == name.size() && absl::EqualsIgnoreCase({line.data(), colon}, {name.data(), name.size()})) {
      std::string value(line.substr(colon + 1));
      absl::StripAsciiWhitespace(&value);
      return value;
    }
  }
  return "";
}

// A socket that listens, or why there is none.
absl::StatusOr<int> Listen(const std::string& host, int port) {
  const auto error = [&](const std::string& why) {
    return absl::UnavailableError(absl::StrCat("cannot listen for HTTP on ", host, ":", port, " (", why,
                                               "); choose another address with --http (port 0: any free one)"));
  };
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* found = nullptr;
  if (const int code = getaddrinfo(host.c_str(), absl::StrCat(port).c_str(), &hints, &found); code != 0) {
    return error(gai_strerror(code));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> addresses(found, &freeaddrinfo);
  const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  const int yes = 1;
  // Not SO_REUSEPORT, which would share the port with whoever asks for it.
  if (fd >= 0) setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  if (fd >= 0 && bind(fd, found->ai_addr, found->ai_addrlen) == 0 && listen(fd, SOMAXCONN) == 0) return fd;
  const std::string why = strerror(errno);
  if (fd >= 0) close(fd);
  return error(why);
}

int PortOf(int socket) {
  sockaddr_storage address = {};
  socklen_t size = sizeof(address);
  std::array<char, NI_MAXSERV> port = {};
  getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size);
  getnameinfo(reinterpret_cast<sockaddr*>(&address), size, nullptr, 0, port.data(), port.size(), NI_NUMERICSERV);
  return std::atoi(port.data());
}

class Server final : public HttpServer {
 public:
  Server(Options options, int listener)
      : options_(std::move(options)),
        listener_(listener),
        stop_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
        port_(PortOf(listener)) {
    // Who hangs up while it is written to is no reason to end the program.
    signal(SIGPIPE, SIG_IGN);
    if (options_.tls.on()) {
      context_.reset(SSL_CTX_new(TLS_server_method()));
      UseTls(options_.tls, context_.get());
      SSL_CTX_set_mode(context_.get(), SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    }
    for (size_t i = 0; i < kThreads; ++i) threads_.emplace_back([this] { Serve(); });
  }
  ~Server() override {
    const uint64_t one = 1;
    while (write(stop_.get(), &one, sizeof(one)) < 0 && errno == EINTR) {
    }
    for (std::thread& thread : threads_) thread.join();
  }
  int port() const override { return port_; }

 private:
  using Connections = std::list<Connection>;  // the oldest first

  // One thread's work: it alone knows its connections.
  void Serve() {
    Connections connections;
    while (true) {
      std::vector<pollfd> polled = {{.fd = stop_.get(), .events = POLLIN, .revents = 0},
                                    {.fd = listener_.get(), .events = POLLIN, .revents = 0}};
      auto next = Clock::now() + std::chrono::hours(1);
      for (const Connection& connection : connections) {
        polled.push_back({.fd = connection.fd.get(), .events = connection.waits_for, .revents = 0});
        next = std::min(next, connection.deadline);
      }
      const auto wait = std::chrono::ceil<std::chrono::milliseconds>(next - Clock::now());
      poll(polled.data(), polled.size(), static_cast<int>(std::max<int64_t>(0, wait.count())));
      if (polled[0].revents != 0) return;
      const auto now = Clock::now();
      size_t i = 2;
      for (auto connection = connections.begin(); connection != connections.end(); ++i) {
        const bool ready = polled[i].revents != 0;
        const bool over = now >= connection->deadline || (ready && !Advance(*connection, connections));
        connection = over ? connections.erase(connection) : std::next(connection);
      }
      if (polled[1].revents != 0) Accept(connections);
    }
  }

  void Accept(Connections& connections) {
    sockaddr_storage address = {};
    socklen_t size = sizeof(address);
    // Another thread may have been quicker.
    const int fd = accept4(listener_.get(), reinterpret_cast<sockaddr*>(&address), &size, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) return;
    if (connections.size() >= kMaxConnections) connections.pop_front();
    std::array<char, NI_MAXHOST> peer = {};
    getnameinfo(reinterpret_cast<sockaddr*>(&address), size, peer.data(), peer.size(), nullptr, 0, NI_NUMERICHOST);
    Connection& connection = connections.emplace_back(fd, peer.data());
    if (!context_) return;
    connection.ssl.reset(SSL_new(context_.get()));
    SSL_set_fd(connection.ssl.get(), fd);
    SSL_set_accept_state(connection.ssl.get());
  }

  // Goes on as far as the socket lets it. False: the connection is over.
  bool Advance(Connection& connection, Connections& connections) {
    ERR_clear_error();  // what another connection has left would count as this one's
    if (connection.ssl && !connection.secured) {
      const int done = SSL_accept(connection.ssl.get());
      if (done != 1) return Waits(connection, done);
      connection.secured = true;
      connection.waits_for = POLLIN;
    }
    if (connection.out.empty()) {
      char bytes[4096];
      const ssize_t got = connection.ssl ? SSL_read(connection.ssl.get(), bytes, sizeof(bytes))
                                         : recv(connection.fd.get(), bytes, sizeof(bytes), 0);
      if (got <= 0) return Waits(connection, got);
      connection.in.append(bytes, static_cast<size_t>(got));
      const size_t end = connection.in.find("\r\n\r\n");
      if (end == std::string::npos && connection.in.size() <= kMaxRequestBytes) {
        // What TLS has unpacked already, poll does not tell of.
        return connection.ssl && SSL_pending(connection.ssl.get()) > 0 ? Advance(connection, connections) : true;
      }
      const bool too_large = end == std::string::npos || end > kMaxRequestBytes;
      Answer(connection, too_large ? "" : connection.in.substr(0, end + 2));
      if (connection.large) MakeRoomForPage(connection, connections);
    }
    while (connection.sent < connection.out.size()) {
      const char* from = connection.out.data() + connection.sent;
      const size_t left = std::min<size_t>(connection.out.size() - connection.sent, 1 << 20);
      const ssize_t wrote = connection.ssl ? SSL_write(connection.ssl.get(), from, static_cast<int>(left))
                                           : send(connection.fd.get(), from, left, MSG_NOSIGNAL);
      if (wrote <= 0) return Waits(connection, wrote);
      connection.sent += static_cast<size_t>(wrote);
    }
    if (connection.ssl) SSL_shutdown(connection.ssl.get());
    return false;
  }

  // After a call that did nothing: whether it may be tried again, once the socket is ready for what it wants.
  static bool Waits(Connection& connection, ssize_t result) {
    if (!connection.ssl) {
      connection.waits_for = connection.out.empty() ? POLLIN : POLLOUT;
      return result < 0 && (errno == EAGAIN || errno == EINTR);
    }
    const int why = SSL_get_error(connection.ssl.get(), static_cast<int>(result));
    connection.waits_for = why == SSL_ERROR_WANT_WRITE ? POLLOUT : POLLIN;
    return why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE;
  }

  static void MakeRoomForPage(const Connection& newest, Connections& connections) {
    const auto is_page = [](const Connection& connection) { return connection.large; };
    const auto pages = static_cast<size_t>(std::count_if(connections.begin(), connections.end(), is_page));
    const auto oldest = std::find_if(connections.begin(), connections.end(), is_page);
    // Its turn comes in this round or the next: it is past its time.
    if (pages > kMaxPages && &*oldest != &newest) oldest->deadline = {};
  }

  // `head` is empty when the request has no end.
  void Answer(Connection& connection, const std::string& head) const {
    const size_t method_end = head.find(' ');
    const size_t target_end = method_end == std::string::npos ? method_end : head.find_first_of(" \r", method_end + 1);
    const std::string method = head.substr(0, method_end);
    Response response;
    if (head.empty()) {
      response = {.status = 431, .body = "the request is too large\n"};
    } else if (target_end == std::string::npos) {
      response = {.status = 400, .body = "this is no HTTP request\n"};
    } else if (method != "GET" && method != "HEAD") {
      response = {.status = 405, .body = "only GET is known here\n", .more = "Allow: GET, HEAD\r\n"};
    } else {
      std::string path = head.substr(method_end + 1, target_end - method_end - 1);
      path.resize(std::min(path.find('?'), path.size()));
      connection.large = path == "/metrics";
      response = Page(path, Header(head, "Authorization"), connection.peer);
    }
    connection.out = absl::StrCat("HTTP/1.1 ", response.status, " ", response.status == 200 ? "OK" : "Error",
                                  "\r\nContent-Type: ", response.type, "\r\nContent-Length: ", response.body.size(),
                                  "\r\nConnection: close\r\n", response.more, "\r\n");
    if (method != "HEAD") absl::StrAppend(&connection.out, response.body);
    connection.deadline = Clock::now() + kResponseTime;
  }

  Response Page(const std::string& path, const std::string& authorization, const std::string& peer) const {
    if (path == "/") return {.body = simpo::Page(options_.title), .type = "text/html; charset=utf-8"};
    if (path == "/healthz") {
      const std::string problem = options_.problem();
      if (problem.empty()) return {.body = "ok\n"};
      return {.status = 503, .body = problem + "\n"};
    }
    if (path != "/metrics") return {.status = 404, .body = "there is no such page; / lists those there are\n"};
    const absl::Status status = options_.admit ? options_.admit(authorization, peer) : absl::OkStatus();
    if (!status.ok()) {
      const bool unknown = absl::IsUnauthenticated(status);
      return {.status = unknown ? 401 : 403,
              .body = std::string(status.message()) + "\n",
              .more = unknown ? "WWW-Authenticate: Bearer\r\n" : ""};
    }
    return {.body = prometheus::TextSerializer().Serialize(options_.source->Collect()), .type = kMetricsType};
  }

  const Options options_;
  std::unique_ptr<SSL_CTX, Free> context_;  // with TLS
  const Descriptor listener_;
  const Descriptor stop_;
  const int port_;
  std::vector<std::thread> threads_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(Options options) {
  const absl::StatusOr<int> listener = Listen(options.host, options.port);
  if (!listener.ok()) return listener.status();
  return std::make_unique<Server>(std::move(options), *listener);
}

}  // namespace simpo
