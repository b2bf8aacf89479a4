#include "common/tls_files.h"

#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "common/atomic_file.h"
#include "common/pem.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

constexpr int64_t kMaxBytes = 1 << 20;
constexpr char kCa[] = "--ca (SIMPO_CA)";
constexpr char kCert[] = "--cert (SIMPO_CERT)";
constexpr char kKey[] = "--key (SIMPO_KEY)";

std::string Variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

absl::StatusOr<std::string> Read(const char* what, const std::string& file) {
  absl::StatusOr<std::string> text = ReadFile(file, kMaxBytes);
  if (text.ok()) return text;
  return absl::InvalidArgumentError(absl::StrCat(what, ": ", std::string(text.status().message())));
}

// gRPC would say of a file that does not fit only that it has no address to connect to.
absl::Status CheckPair(const TlsFiles& files, const TlsTexts& texts) {
  const Certificate certificate = FirstCertificate(texts.cert);
  if (!certificate) {
    return absl::InvalidArgumentError(absl::StrCat(kCert, ": ", files.cert, " holds no certificate in PEM form"));
  }
  const PrivateKey key = PrivateKeyOf(texts.key);
  if (!key) {
    return absl::InvalidArgumentError(
        absl::StrCat(kKey, ": ", files.key, " holds no private key in PEM form without a pass phrase"));
  }
  if (!IsPair(certificate, key)) {
    return absl::InvalidArgumentError(absl::StrCat(kKey, ": the key ", files.key, " is not that of ", files.cert));
  }
  if (X509_cmp_current_time(X509_get0_notAfter(certificate.get())) >= 0) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(kCert, ": the certificate ", files.cert, " has expired; renew it"));
}

}  // namespace

TlsFiles TlsFilesOfEnvironment() {
  return {.ca = Variable("SIMPO_CA"),
          .cert = Variable("SIMPO_CERT"),
          .key = Variable("SIMPO_KEY"),
          .name = Variable("SIMPO_TLS_NAME")};
}

absl::StatusOr<TlsTexts> ReadTlsFiles(const TlsFiles& files) {
  if (files.cert.empty() != files.key.empty()) {
    return absl::InvalidArgumentError(
        "a client certificate needs its key, and a key its certificate: --cert and --key (SIMPO_CERT, SIMPO_KEY)");
  }
  if (files.ca.empty() && !files.cert.empty()) {
    return absl::InvalidArgumentError(
        "a client certificate is of use only with TLS: name the coordinator's authority with --ca (SIMPO_CA)");
  }
  TlsTexts texts;
  if (files.ca.empty()) return texts;
  SIMPO_ASSIGN_OR_RETURN(texts.ca, Read(kCa, files.ca));
  if (!FirstCertificate(texts.ca)) {
    return absl::InvalidArgumentError(absl::StrCat(kCa, ": ", files.ca, " holds no certificate in PEM form"));
  }
  if (files.cert.empty()) return texts;
  SIMPO_ASSIGN_OR_RETURN(texts.cert, Read(kCert, files.cert));
  SIMPO_ASSIGN_OR_RETURN(texts.key, Read(kKey, files.key));
  SIMPO_RETURN_IF_ERROR(CheckPair(files, texts));
  return texts;
}

}  // namespace simpo
