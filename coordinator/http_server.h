#ifndef SIMPO_COORDINATOR_HTTP_SERVER_H_
#define SIMPO_COORDINATOR_HTTP_SERVER_H_

#include <prometheus/collectable.h>

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/tls.h"

namespace simpo {

// Read-only pages: /metrics for Prometheus, /healthz, and / with links. Serves on threads of its own.
class HttpServer {
 public:
  struct Options {
    std::string host;
    int port = 0;                           // 0: any free one
    std::string title;                      // of the page /
    const prometheus::Collectable* source;  // of /metrics; outlives the server
    std::function<std::string()> problem;   // for /healthz; empty: all is well
    ServedTls* tls = nullptr;               // outlives the server; null or off: plain HTTP
    // Whether a caller with this Authorization header, from this address, may see /metrics. Empty: anybody.
    std::function<absl::Status(const std::string& authorization, const std::string& peer)> admit;
    // Called at most once, from another thread, when no connection can be taken any more. It returns soon.
    std::function<void(const absl::Status&)> on_failure;
  };
  // UNAVAILABLE names the address and why it cannot be had.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(Options options);
  virtual ~HttpServer() = default;
  virtual int port() const = 0;
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_HTTP_SERVER_H_
