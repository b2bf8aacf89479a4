#include "coordinator/tls.h"

#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>

#include "absl/strings/str_cat.h"
#include "common/atomic_file.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

constexpr int64_t kMaxPemBytes = 1 << 20;
constexpr unsigned kLookSeconds = 2;

using Bio = std::unique_ptr<BIO, decltype(&BIO_free)>;
using Certificate = std::unique_ptr<X509, decltype(&X509_free)>;
using Key = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;

absl::StatusOr<std::string> ReadPem(const char* flag, const std::string& file) {
  const absl::StatusOr<std::string> text = ReadFile(file, kMaxPemBytes);
  if (text.ok()) return *text;
  return absl::InvalidArgumentError(absl::StrCat(flag, ": ", std::string(text.status().message())));
}

// The first certificate of the file.
absl::StatusOr<Certificate> ReadCertificate(const char* flag, const std::string& file) {
  SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadPem(flag, file));
  const Bio bio(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())), &BIO_free);
  Certificate certificate(PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr), &X509_free);
  ERR_clear_error();
  if (certificate) return certificate;
  return absl::InvalidArgumentError(absl::StrCat(flag, ": ", file, " holds no certificate in PEM form"));
}

absl::Status CheckTime(const char* flag, const std::string& file, const X509* certificate) {
  if (X509_cmp_current_time(X509_get0_notAfter(certificate)) < 0) {
    return absl::InvalidArgumentError(absl::StrCat(flag, ": the certificate ", file, " has expired; renew it"));
  }
  if (X509_cmp_current_time(X509_get0_notBefore(certificate)) > 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(flag, ": the certificate ", file, " is not valid yet; is this machine's clock right?"));
  }
  return absl::OkStatus();
}

// For one connection, before the certificate is shown.
int LoadForHandshake(SSL* ssl, void* argument) {
  const auto* tls = static_cast<const TlsConfig*>(argument);
  if (SSL_use_certificate_chain_file(ssl, tls->cert.c_str()) != 1) return 0;
  if (SSL_use_PrivateKey_file(ssl, tls->key.c_str(), SSL_FILETYPE_PEM) != 1) return 0;
  if (tls->client_ca.empty()) return 1;
  const std::unique_ptr<X509_STORE, decltype(&X509_STORE_free)> store(X509_STORE_new(), &X509_STORE_free);
  if (X509_STORE_load_file(store.get(), tls->client_ca.c_str()) != 1) return 0;
  return SSL_set1_verify_cert_store(ssl, store.get()) == 1 ? 1 : 0;
}

}  // namespace

absl::Status CheckTls(const TlsConfig& tls) {
  if (!tls.on() && tls.key.empty() && tls.client_ca.empty()) return absl::OkStatus();
  if (tls.cert.empty() || tls.key.empty()) {
    return absl::InvalidArgumentError(
        "TLS needs both --tls-cert and --tls-key; --tls-client-ca alone cannot be (it comes on top of them)");
  }
  SIMPO_ASSIGN_OR_RETURN(const Certificate certificate, ReadCertificate("--tls-cert", tls.cert));
  SIMPO_RETURN_IF_ERROR(CheckTime("--tls-cert", tls.cert, certificate.get()));
  SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadPem("--tls-key", tls.key));
  const Bio bio(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())), &BIO_free);
  // A key with a pass phrase would make the coordinator ask for it on a terminal: it is refused.
  const auto no_phrase = [](char*, int, int, void*) { return -1; };
  const Key key(PEM_read_bio_PrivateKey(bio.get(), nullptr, no_phrase, nullptr), &EVP_PKEY_free);
  const bool fits = key && X509_check_private_key(certificate.get(), key.get()) == 1;
  ERR_clear_error();
  if (!key) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tls-key: ", tls.key, " holds no private key in PEM form without a pass phrase"));
  }
  if (!fits) {
    return absl::InvalidArgumentError(absl::StrCat("--tls-key: the key ", tls.key, " is not that of ", tls.cert));
  }
  if (tls.client_ca.empty()) return absl::OkStatus();
  return ReadCertificate("--tls-client-ca", tls.client_ca).status();
}

std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(const TlsConfig& tls) {
  if (!tls.on()) return grpc::InsecureServerCredentials();
  grpc::experimental::TlsServerCredentialsOptions options(
      std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(tls.key, tls.cert, tls.client_ca,
                                                                           kLookSeconds));
  options.watch_identity_key_cert_pairs();
  if (!tls.client_ca.empty()) {
    options.watch_root_certs();
    options.set_cert_request_type(GRPC_SSL_REQUEST_CLIENT_CERTIFICATE_AND_VERIFY);
  }
  return grpc::experimental::TlsServerCredentials(options);
}

absl::StatusOr<std::string> NameToCheck(const std::string& cert_file, const std::string& host) {
  SIMPO_ASSIGN_OR_RETURN(const Certificate certificate, ReadCertificate("--tls-cert", cert_file));
  X509* const x509 = certificate.get();
  if (X509_check_host(x509, host.c_str(), host.size(), 0, nullptr) == 1) return std::string();
  if (X509_check_ip_asc(x509, host.c_str(), 0) == 1) return std::string();
  const std::unique_ptr<GENERAL_NAMES, decltype(&GENERAL_NAMES_free)> names(
      static_cast<GENERAL_NAMES*>(X509_get_ext_d2i(x509, NID_subject_alt_name, nullptr, nullptr)), &GENERAL_NAMES_free);
  for (int i = 0; names && i < sk_GENERAL_NAME_num(names.get()); ++i) {
    const GENERAL_NAME* name = sk_GENERAL_NAME_value(names.get(), i);
    if (name->type != GEN_DNS) continue;
    return std::string(reinterpret_cast<const char*>(ASN1_STRING_get0_data(name->d.dNSName)),
                       static_cast<size_t>(ASN1_STRING_length(name->d.dNSName)));
  }
  return absl::InvalidArgumentError(absl::StrCat(
      "--tls-cert: the certificate ", cert_file, " is neither for ", host,
      " nor does it hold a DNS name (subjectAltName), so no program could check it; make one for DNS:localhost too"));
}

bool UseTls(const TlsConfig& tls, void* context) {
  auto* ssl_context = static_cast<SSL_CTX*>(context);
  SSL_CTX_set_min_proto_version(ssl_context, TLS1_2_VERSION);
  SSL_CTX_set_cert_cb(ssl_context, &LoadForHandshake, const_cast<TlsConfig*>(&tls));
  if (!tls.client_ca.empty()) {
    SSL_CTX_set_verify(ssl_context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
  }
  return true;
}

}  // namespace simpo
