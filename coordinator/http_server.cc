#include "coordinator/http_server.h"

#include <httplib.h>
#include <prometheus/text_serializer.h>

#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <sstream>
#include <system_error>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

constexpr int kMaxThreads = 512;
constexpr int kTimeoutSeconds = 5;
constexpr int kKeepAliveSeconds = 2;  // an idle client holds one of the threads
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

std::unique_ptr<httplib::Server> MakeServer(ServedTls* tls) {
  if (tls == nullptr || !tls->files().on()) return std::make_unique<httplib::Server>();
  return std::make_unique<httplib::SSLServer>([tls](SSL_CTX& context) { return UseTls(*tls, &context); });
}

// A connection holds a thread for as long as its client takes to ask and to read. So that clients that are slow at it
// hold up nobody, there are as many threads as it takes, up to a number that a machine does not feel.
class ThreadPerConnection final : public httplib::TaskQueue {
 public:
  void enqueue(std::function<void()> connection) override {
    {
      const std::lock_guard lock(mutex_);
      waiting_.push_back(std::move(connection));
      if (running_ == kMaxThreads) return;
      ++running_;
    }
    try {
      std::thread([this] { Run(); }).detach();
    } catch (const std::system_error&) {
      Run();  // no thread can be had: the one that takes connections serves what waits, and takes others after that
    }
  }
  void shutdown() override {
    std::unique_lock lock(mutex_);
    ended_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  void Run() {
    std::unique_lock lock(mutex_);
    while (!waiting_.empty()) {
      const std::function<void()> connection = std::move(waiting_.front());
      waiting_.pop_front();
      lock.unlock();
      connection();
      lock.lock();
    }
    if (--running_ == 0) ended_.notify_all();
  }

  std::mutex mutex_;
  std::condition_variable ended_;
  std::deque<std::function<void()>> waiting_;  // guarded by mutex_
  int running_ = 0;                            // guarded by mutex_
};

class Server final : public HttpServer {
 public:
  explicit Server(Options options) : options_(std::move(options)), server_(MakeServer(options_.tls)) {
    server_->new_task_queue = [] { return new ThreadPerConnection; };
    server_->set_read_timeout(kTimeoutSeconds);
    server_->set_write_timeout(kTimeoutSeconds);
    server_->set_keep_alive_timeout(kKeepAliveSeconds);
    server_->set_payload_max_length(1024);
    // The library's default shares the port with whoever asks for it.
    server_->set_socket_options([](socket_t socket) {
      const int yes = 1;
      setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    });
    server_->Get("/metrics", [this](const httplib::Request& request, httplib::Response& response) {
      const absl::Status status = options_.admit
                                      ? options_.admit(request.get_header_value("Authorization"), request.remote_addr)
                                      : absl::OkStatus();
      if (!status.ok()) {
        response.status = absl::IsUnauthenticated(status) ? 401 : 403;
        if (response.status == 401) response.set_header("WWW-Authenticate", "Bearer");
        response.set_content(std::string(status.message()) + "\n", "text/plain; charset=utf-8");
        return;
      }
      response.set_content(prometheus::TextSerializer().Serialize(options_.source->Collect()), kMetricsType);
    });
    server_->Get("/healthz", [this](const httplib::Request&, httplib::Response& response) {
      const std::string problem = options_.problem();
      response.status = problem.empty() ? 200 : 503;
      response.set_content(problem.empty() ? "ok\n" : problem + "\n", "text/plain; charset=utf-8");
    });
    server_->Get("/", [this](const httplib::Request&, httplib::Response& response) {
      response.set_content(Page(options_.title), "text/html; charset=utf-8");
    });
  }
  ~Server() override {
    stopping_ = true;
    server_->stop();
    if (thread_.joinable()) thread_.join();
  }

  bool Bind() {
    if (options_.port == 0) {
      port_ = server_->bind_to_any_port(options_.host);
      return port_ > 0;
    }
    port_ = options_.port;
    return server_->bind_to_port(options_.host, options_.port);
  }
  void Listen() {
    thread_ = std::thread([this] {
      server_->listen_after_bind();
      // The library closes its listener for good after an error of accept.
      const int error = errno;
      ended_ = true;
      if (stopping_ || !options_.on_failure) return;
      options_.on_failure(absl::UnavailableError(
          absl::StrCat("cannot take connections of HTTP any more (", std::strerror(error), ")")));
    });
    // stop() has no effect on a server that is not running yet.
    while (!server_->is_running() && !ended_) std::this_thread::yield();
  }
  int port() const override { return port_; }

 private:
  const Options options_;
  std::unique_ptr<httplib::Server> server_;
  int port_ = 0;
  std::atomic<bool> stopping_ = false;
  std::atomic<bool> ended_ = false;
  std::thread thread_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(Options options) {
  const std::string address = absl::StrCat(options.host, ":", options.port);
  auto server = std::make_unique<Server>(std::move(options));
  if (!server->Bind()) {
    return absl::UnavailableError(absl::StrCat("cannot listen for HTTP on ", address,
                                               "; choose another address with --http (port 0: any free one)"));
  }
  server->Listen();
  return server;
}

}  // namespace simpo
