#include "coordinator/listen_address.h"

#include <arpa/inet.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace simpo {

std::string ListenAddress::ToString() const {
  const bool ipv6 = host.find(':') != std::string::npos;
  return ipv6 ? absl::StrCat("[", host, "]:", port) : absl::StrCat(host, ":", port);
}

bool ListenAddress::IsLoopback() const {
  in_addr address = {};  // a name may begin with 127. too
  const bool loopback = inet_pton(AF_INET, host.c_str(), &address) == 1 && absl::StartsWith(host, "127.");
  return loopback || host == "localhost" || host == "::1";
}

std::string ListenAddress::Reachable(int actual_port) const {
  ListenAddress address{.host = host, .port = actual_port};
  if (host == "0.0.0.0") address.host = "127.0.0.1";
  if (host == "::") address.host = "::1";
  return address.ToString();
}

absl::StatusOr<ListenAddress> ParseListenAddress(const std::string& flag, const std::string& text) {
  ListenAddress address;
  const size_t colon = text.rfind(':');
  const bool parsed = colon != std::string::npos && colon > 0 &&
                      absl::SimpleAtoi(text.substr(colon + 1), &address.port) && address.port >= 0 &&
                      address.port <= 65535;
  if (parsed) address.host = text.substr(0, colon);
  if (address.host.size() > 2 && address.host.front() == '[' && address.host.back() == ']') {
    address.host = address.host.substr(1, address.host.size() - 2);
  } else if (address.host.find(':') != std::string::npos) {
    address.host.clear();  // an IPv6 address without brackets
  }
  if (!address.host.empty()) return address;
  return absl::InvalidArgumentError(
      absl::StrCat(flag, " is '", text, "'; it must be HOST:PORT, such as 127.0.0.1:7077 or [::1]:7077"));
}

absl::Status CheckCanListen(const ListenAddress& address, const std::string& flag) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE;
  addrinfo* raw = nullptr;
  const int failure = getaddrinfo(address.host.c_str(), absl::StrCat(address.port).c_str(), &hints, &raw);
  if (failure != 0) {
    return absl::UnavailableError(absl::StrCat(flag, ": cannot resolve '", address.host, "': ", gai_strerror(failure)));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> found(raw, &freeaddrinfo);
  const int socket_fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int yes = 1;
  setsockopt(socket_fd, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  const bool free = bind(socket_fd, found->ai_addr, found->ai_addrlen) == 0 && listen(socket_fd, 1) == 0;
  const int error = errno;
  close(socket_fd);
  if (free) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("cannot listen on ", address.ToString(), ": ", std::strerror(error),
                                             error == EADDRINUSE ? " (is another simpo-coordinator running?)" : "",
                                             "; choose another address with ", flag, " (port 0: any free one)"));
}

}  // namespace simpo
