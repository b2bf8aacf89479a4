#ifndef SIMPO_COORDINATOR_LISTEN_ADDRESS_H_
#define SIMPO_COORDINATOR_LISTEN_ADDRESS_H_

#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace simpo {

// Where a server listens.
struct ListenAddress {
  std::string host;  // a numeric address, or a name; IPv6 without brackets
  int port = 0;      // 0: any free one

  std::string ToString() const;
  // Only programs of this machine can reach it.
  bool IsLoopback() const;
  // The address at which programs of this machine reach a server that listens here on `actual_port`.
  std::string Reachable(int actual_port) const;
};

// Of "HOST:PORT" or "[IPV6]:PORT". INVALID_ARGUMENT names the flag.
absl::StatusOr<ListenAddress> ParseListenAddress(const std::string& flag, const std::string& text);

// OK when a server can listen there now; otherwise UNAVAILABLE says what is in the way. `flag`: by which
// another address is chosen.
absl::Status CheckCanListen(const ListenAddress& address, const std::string& flag);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_LISTEN_ADDRESS_H_
