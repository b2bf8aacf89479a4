#ifndef SIMPO_COORDINATOR_TLS_H_
#define SIMPO_COORDINATOR_TLS_H_

#include <grpcpp/security/server_credentials.h>

#include <ctime>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace simpo {

// The files that make a server known, in PEM; all empty: no TLS.
struct TlsConfig {
  std::string cert;       // the server's certificate, then those between it and its authority
  std::string key;        // of the first one
  std::string client_ca;  // authorities of clients' certificates; empty: none is asked for
  std::string ca = {};    // by which the ranks check the certificate; empty: itself
  bool on() const { return !cert.empty(); }
};

// INVALID_ARGUMENT names the file and what is wrong: it cannot be read, is no certificate, has expired, the key is
// another certificate's, or `ca` has not signed the certificate.
absl::Status CheckTls(const TlsConfig& tls);

// What connections are shown. The files are looked at before each handshake, so a renewed certificate needs no restart;
// those that CheckTls refuses are logged, and the last good ones stay in use. Thread-safe.
class ServedTls {
 public:
  struct Pem {
    std::string cert, key, client_ca;
    time_t expires_s = 0;
  };
  explicit ServedTls(TlsConfig tls) : tls_(std::move(tls)) {}

  const TlsConfig& files() const { return tls_; }
  // Null: TLS is off, or the files have never been good.
  std::shared_ptr<const Pem> Current();
  // Why nobody can connect, for /healthz, or "".
  std::string Problem();

  std::shared_ptr<const Pem> of_grpc;  // what gRPC was given last; under its lock, so for one port

 private:
  const TlsConfig tls_;
  std::mutex mutex_;
  std::shared_ptr<const Pem> current_;  // guarded by mutex_
  std::string seen_;                    // guarded by mutex_; the state of the files that current_ was read from
  std::string told_;                    // guarded by mutex_; the state of those that a line of the log is about
  bool told_of_end_ = false;            // guarded by mutex_
};

// A client without a certificate gets through the handshake, so that the call can be refused with words; one with a
// foreign or expired certificate does not. `served` outlives the server.
std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(ServedTls& served);

// The name by which a client that connects to `host` must check this certificate: "" when `host` stands in it, else
// the first name in it.
absl::StatusOr<std::string> NameToCheck(const std::string& cert_file, const std::string& host);

// For a TLS server of OpenSSL (`context` is an SSL_CTX). `served` outlives it.
bool UseTls(ServedTls& served, void* context);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_TLS_H_
