#include "coordinator/tls.h"

#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <sys/stat.h>

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "common/atomic_file.h"
#include "common/log.h"
#include "common/pem.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

constexpr int64_t kMaxPemBytes = 1 << 20;
constexpr time_t kRenewalSeconds = 2;  // for which a renewal may be half done: the new key there, the certificate not

using Store = std::unique_ptr<X509_STORE, decltype(&X509_STORE_free)>;

Store StoreOf(const std::string& authorities) {
  Store store(X509_STORE_new(), &X509_STORE_free);
  const Bio bio = BioOf(authorities);
  while (const Certificate certificate = NextCertificate(bio)) X509_STORE_add_cert(store.get(), certificate.get());
  return store;
}

absl::StatusOr<std::string> ReadPem(const char* flag, const std::string& file) {
  const absl::StatusOr<std::string> text = ReadFile(file, kMaxPemBytes);
  if (text.ok()) return *text;
  return absl::InvalidArgumentError(absl::StrCat(flag, ": ", std::string(text.status().message())));
}

// The first certificate of the file with this text.
absl::StatusOr<Certificate> CertificateIn(const char* flag, const std::string& file, const std::string& text) {
  Certificate certificate = FirstCertificate(text);
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

// As the ranks will check it.
absl::Status CheckAuthority(const TlsConfig& tls, const std::string& cert_text) {
  SIMPO_ASSIGN_OR_RETURN(const std::string authorities, ReadPem("--tls-ca", tls.ca));
  SIMPO_RETURN_IF_ERROR(CertificateIn("--tls-ca", tls.ca, authorities).status());
  const Store store = StoreOf(authorities);
  X509_STORE_set_flags(store.get(), X509_V_FLAG_PARTIAL_CHAIN);  // gRPC takes one in the middle of the chain too
  const Bio bio = BioOf(cert_text);
  const Certificate leaf = NextCertificate(bio);
  const std::unique_ptr<STACK_OF(X509), void (*)(STACK_OF(X509)*)> chain(
      sk_X509_new_null(), [](STACK_OF(X509) * stack) { sk_X509_pop_free(stack, X509_free); });
  while (Certificate next = NextCertificate(bio)) sk_X509_push(chain.get(), next.release());
  const std::unique_ptr<X509_STORE_CTX, decltype(&X509_STORE_CTX_free)> context(X509_STORE_CTX_new(),
                                                                                &X509_STORE_CTX_free);
  X509_STORE_CTX_init(context.get(), store.get(), leaf.get(), chain.get());
  X509_STORE_CTX_set_purpose(context.get(), X509_PURPOSE_SSL_SERVER);
  const bool good = X509_verify_cert(context.get()) == 1;
  ERR_clear_error();
  if (good) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("--tls-ca: ", tls.ca, " does not vouch for the certificate ", tls.cert, " (",
                   X509_verify_cert_error_string(X509_STORE_CTX_get_error(context.get())),
                   "), so no rank could check it; name the authority that has signed it"));
}

// The files of a TlsConfig with a certificate and a key, each read once and checked.
absl::StatusOr<ServedTls::Pem> ReadTls(const TlsConfig& tls) {
  ServedTls::Pem pem;
  SIMPO_ASSIGN_OR_RETURN(pem.cert, ReadPem("--tls-cert", tls.cert));
  SIMPO_ASSIGN_OR_RETURN(const Certificate certificate, CertificateIn("--tls-cert", tls.cert, pem.cert));
  SIMPO_RETURN_IF_ERROR(CheckTime("--tls-cert", tls.cert, certificate.get()));
  SIMPO_ASSIGN_OR_RETURN(pem.key, ReadPem("--tls-key", tls.key));
  const PrivateKey key = PrivateKeyOf(pem.key);
  if (!key) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tls-key: ", tls.key, " holds no private key in PEM form without a pass phrase"));
  }
  if (!IsPair(certificate, key)) {
    return absl::InvalidArgumentError(absl::StrCat("--tls-key: the key ", tls.key, " is not that of ", tls.cert));
  }
  if (!tls.client_ca.empty()) {
    SIMPO_ASSIGN_OR_RETURN(pem.client_ca, ReadPem("--tls-client-ca", tls.client_ca));
    SIMPO_RETURN_IF_ERROR(CertificateIn("--tls-client-ca", tls.client_ca, pem.client_ca).status());
  }
  if (!tls.ca.empty()) SIMPO_RETURN_IF_ERROR(CheckAuthority(tls, pem.cert));
  tm end = {};
  if (ASN1_TIME_to_tm(X509_get0_notAfter(certificate.get()), &end) != 1) {
    return absl::InvalidArgumentError(absl::StrCat("--tls-cert: the end of the certificate ", tls.cert, " is no time"));
  }
  pem.expires_s = timegm(&end);
  return pem;
}

// For one connection, before the certificate is shown.
int ShowInHandshake(SSL* ssl, void* argument) {
  const std::shared_ptr<const ServedTls::Pem> pem = static_cast<ServedTls*>(argument)->Current();
  if (pem == nullptr) return 0;
  const Bio bio = BioOf(pem->cert);
  if (SSL_use_certificate(ssl, NextCertificate(bio).get()) != 1) return 0;
  while (const Certificate next = NextCertificate(bio)) {
    if (SSL_add1_chain_cert(ssl, next.get()) != 1) return 0;
  }
  if (SSL_use_PrivateKey(ssl, PrivateKeyOf(pem->key).get()) != 1) return 0;
  if (pem->client_ca.empty()) return 1;
  return SSL_set1_verify_cert_store(ssl, StoreOf(pem->client_ca).get()) == 1 ? 1 : 0;
}

// Before each handshake, one after the other. gRPC keeps the earlier ones after FAIL and asks again the next time.
grpc_ssl_certificate_config_reload_status FetchForHandshake(void* argument,
                                                            grpc_ssl_server_certificate_config** config) {
  auto* const served = static_cast<ServedTls*>(argument);
  const std::shared_ptr<const ServedTls::Pem> pem = served->Current();
  if (pem == nullptr) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_FAIL;
  if (pem == served->of_grpc) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
  served->of_grpc = pem;
  const grpc_ssl_pem_key_cert_pair pair = {pem->key.c_str(), pem->cert.c_str()};
  // It insists on authorities, which count only where clients are asked for certificates.
  const std::string& authorities = pem->client_ca.empty() ? pem->cert : pem->client_ca;
  *config = grpc_ssl_server_certificate_config_create(authorities.c_str(), &pair, 1);
  return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
}

// The C++ wrappers of gRPC have none by which a server fetches its certificate. It is gone once the server runs.
class FetchingCredentials final : public grpc::ServerCredentials {
 public:
  explicit FetchingCredentials(ServedTls& served) {
    const auto request = served.files().client_ca.empty() ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                                                          : GRPC_SSL_REQUEST_CLIENT_CERTIFICATE_AND_VERIFY;
    credentials_ = grpc_ssl_server_credentials_create_with_options(
        grpc_ssl_server_credentials_create_options_using_config_fetcher(request, &FetchForHandshake, &served));
  }
  ~FetchingCredentials() override { grpc_server_credentials_release(credentials_); }
  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), credentials_);
  }
  grpc_server_credentials* credentials_;
};

// Tells any change of the files; `newest_s` is when the last one was changed.
std::string StateOf(const TlsConfig& tls, time_t* newest_s) {
  std::string state;
  for (const std::string& file : {tls.cert, tls.key, tls.client_ca, tls.ca}) {
    struct stat info = {};
    if (!file.empty() && stat(file.c_str(), &info) == 0) *newest_s = std::max(*newest_s, info.st_ctim.tv_sec);
    absl::StrAppend(&state, info.st_dev, " ", info.st_ino, " ", info.st_size, " ", info.st_ctim.tv_sec, ".",
                    info.st_ctim.tv_nsec, "\n");
  }
  return state;
}

}  // namespace

absl::Status CheckTls(const TlsConfig& tls) {
  if (!tls.on() && tls.key.empty() && tls.client_ca.empty()) return absl::OkStatus();
  if (tls.cert.empty() || tls.key.empty()) {
    return absl::InvalidArgumentError(
        "TLS needs both --tls-cert and --tls-key; --tls-client-ca alone cannot be (it comes on top of them)");
  }
  return ReadTls(tls).status();
}

std::shared_ptr<const ServedTls::Pem> ServedTls::Current() {
  if (!tls_.on()) return nullptr;
  const std::lock_guard lock(mutex_);
  const time_t now_s = time(nullptr);
  time_t newest_s = 0;
  const std::string state = StateOf(tls_, &newest_s);
  if (state != seen_) {
    absl::StatusOr<Pem> pem = ReadTls(tls_);
    if (pem.ok()) {
      current_ = std::make_shared<const Pem>(*std::move(pem));
      told_of_end_ = false;
      seen_ = state;
    } else if (state != told_ && (now_s >= newest_s + kRenewalSeconds || now_s < newest_s)) {
      told_ = state;
      LOG_ERROR(absl::StrCat(std::string(pem.status().message()),
                             ". Going on with the earlier certificate; mend the file, it is read again by itself"));
    }
  }
  if (current_ != nullptr && now_s > current_->expires_s && !std::exchange(told_of_end_, true)) {
    LOG_ERROR(absl::StrCat("the certificate ", tls_.cert, " has expired and clients refuse it; renew it"));
  }
  return current_;
}

std::string ServedTls::Problem() {
  const std::shared_ptr<const Pem> pem = Current();
  if (pem == nullptr || time(nullptr) <= pem->expires_s) return "";
  return absl::StrCat("the certificate ", tls_.cert, " has expired; renew it");
}

std::shared_ptr<grpc::ServerCredentials> MakeServerCredentials(ServedTls& served) {
  if (!served.files().on()) return grpc::InsecureServerCredentials();
  return std::make_shared<FetchingCredentials>(served);
}

absl::StatusOr<std::string> NameToCheck(const std::string& cert_file, const std::string& host) {
  SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadPem("--tls-cert", cert_file));
  SIMPO_ASSIGN_OR_RETURN(const Certificate certificate, CertificateIn("--tls-cert", cert_file, text));
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

bool UseTls(ServedTls& served, void* context) {
  auto* ssl_context = static_cast<SSL_CTX*>(context);
  SSL_CTX_set_min_proto_version(ssl_context, TLS1_2_VERSION);
  SSL_CTX_set_cert_cb(ssl_context, &ShowInHandshake, &served);
  if (!served.files().client_ca.empty()) {
    SSL_CTX_set_verify(ssl_context, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, nullptr);
  }
  return true;
}

}  // namespace simpo
