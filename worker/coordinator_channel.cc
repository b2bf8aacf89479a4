#include "worker/coordinator_channel.h"

#include <grpcpp/grpcpp.h>

#include <fstream>
#include <string>

#include "common/status_macros.h"
#include "common/tls_files.h"

namespace simpo {
namespace {

constexpr int kConnectTimeoutMs = 5'000;
constexpr int kKeepaliveMs = 30'000;
constexpr int kKeepaliveTimeoutMs = 20'000;

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::Channel>> ConnectToCoordinator(const CoordinatorClient::Options& options,
                                                                    std::string* address) {
  *address = options.address;
  TlsFiles tls = TlsFilesOfEnvironment();
  if (!options.address_file.empty()) {
    std::ifstream file(options.address_file);
    std::string line, ca, name;
    if (std::getline(file, line) && !line.empty()) {
      std::getline(file, ca);
      std::getline(file, name);
      *address = line;
      tls.name = name;
      tls.ca = ca;
      if (ca.empty()) tls = {};
    }
  }
  SIMPO_ASSIGN_OR_RETURN(const TlsTexts texts, ReadTlsFiles(tls));
  grpc::ChannelArguments arguments;
  // A pool of its own: no back-off of an earlier channel is inherited.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, kConnectTimeoutMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  if (!tls.name.empty()) arguments.SetSslTargetNameOverride(tls.name);
  const std::shared_ptr<grpc::ChannelCredentials> credentials =
      texts.ca.empty() ? grpc::InsecureChannelCredentials()
                       : grpc::SslCredentials(
                             {.pem_root_certs = texts.ca, .pem_private_key = texts.key, .pem_cert_chain = texts.cert});
  return grpc::CreateCustomChannel(*address, credentials, arguments);
}

}  // namespace simpo
