#ifndef SIMPO_COORDINATOR_SERVER_H_
#define SIMPO_COORDINATOR_SERVER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/server_options.h"

namespace simpo {

// A whole coordinator: builds and owns its parts, in the order in which they need each other.
//
//   SIMPO_ASSIGN_OR_RETURN(auto server, Server::Start(options, version, on_failure));
//   ... until a signal comes ...
//   server.reset();  // orderly: what was acknowledged is on disk, gangs go on
class Server {
 public:
  // `options` are complete (CompleteServerOptions). `on_failure` is called from another thread when the
  // database can no longer be written, or HTTP no longer be served, and says what and the remedy: destroy the server
  // then. Errors name place and remedy; nothing is
  // left behind by them.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServerOptions& options, const std::string& version,
                                                       std::function<void(const absl::Status&)> on_failure);
  virtual ~Server() = default;

  // HOST:PORT as programs of this machine reach them.
  virtual const std::string& grpc_address() const = 0;
  virtual const std::string& http_address() const = 0;
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_SERVER_H_
