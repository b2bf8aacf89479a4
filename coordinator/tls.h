#ifndef SIMPO_COORDINATOR_TLS_H_
#define SIMPO_COORDINATOR_TLS_H_

#include <grpcpp/security/server_credentials.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace simpo {

// The files that make a server known, in PEM; all empty: no TLS.
struct TlsConfig {
  std::string cert;       // the server's certificate, then those between it and its authority
  std::string key;        // of the first one
  std::string client_ca;  // authorities of clients' certificates; empty: none is asked for
  bool on() const { return !cert.empty(); }
};

// INVALID_ARGUMENT names the file and what is wrong: it cannot be read, is no certificate, has expired, or the key is
// another certificate's.
absl::Status CheckTls(const TlsConfig& tls);

// The files are looked at every few seconds, so a renewed certificate needs no restart. A client without a
// certificate gets through the handshake, so that the call can be refused with words; one with a foreign or expired
// certificate does not.
std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(const TlsConfig& tls);

// The name by which a client that connects to `host` must check this certificate: "" when `host` stands in it, else
// the first name in it.
absl::StatusOr<std::string> NameToCheck(const std::string& cert_file, const std::string& host);

// For a TLS server of OpenSSL (`context` is an SSL_CTX): every handshake reads the files again.
bool UseTls(const TlsConfig& tls, void* context);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_TLS_H_
