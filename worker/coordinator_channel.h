#ifndef SIMPO_WORKER_COORDINATOR_CHANNEL_H_
#define SIMPO_WORKER_COORDINATOR_CHANNEL_H_

#include <grpcpp/channel.h>

#include <memory>

#include "absl/status/statusor.h"
#include "worker/coordinator_client.h"

namespace simpo {

// A new connection to the coordinator, with files read anew: it may have moved, and certificates may have been
// renewed. `*address` becomes HOST:PORT. Where address_file is there, it decides: HOST:PORT, then perhaps the
// authority of the coordinator's certificate and the name in it, a line each; without them there is no TLS.
// Otherwise it is options.address, with SIMPO_CA and its like. An error names the file that cannot be read.
absl::StatusOr<std::shared_ptr<grpc::Channel>> ConnectToCoordinator(const CoordinatorClient::Options& options,
                                                                    std::string* address);

}  // namespace simpo

#endif  // SIMPO_WORKER_COORDINATOR_CHANNEL_H_
