#include "common/tls_files.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <cstdlib>
#include <memory>

#include "absl/strings/str_cat.h"
#include "common/atomic_file.h"
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

using Bio = std::unique_ptr<BIO, decltype(&BIO_free)>;
using Certificate = std::unique_ptr<X509, decltype(&X509_free)>;
using Key = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;

Bio BioOf(const std::string& text) { return {BIO_new_mem_buf(text.data(), static_cast<int>(text.size())), &BIO_free}; }

// The first of the text; null when there is none.
Certificate CertificateOf(const std::string& text) {
  Certificate certificate(PEM_read_bio_X509(BioOf(text).get(), nullptr, nullptr, nullptr), &X509_free);
  ERR_clear_error();
  return certificate;
}

Key KeyOf(const std::string& text) {
  // gRPC could not ask for a pass phrase.
  const auto no_phrase = [](char*, int, int, void*) { return -1; };
  Key key(PEM_read_bio_PrivateKey(BioOf(text).get(), nullptr, no_phrase, nullptr), &EVP_PKEY_free);
  ERR_clear_error();
  return key;
}

absl::StatusOr<std::string> Read(const char* what, const std::string& file) {
  absl::StatusOr<std::string> text = ReadFile(file, kMaxBytes);
  if (text.ok()) return text;
  return absl::InvalidArgumentError(absl::StrCat(what, ": ", std::string(text.status().message())));
}

// gRPC would say of a file that does not fit only that it has no address to connect to.
absl::Status CheckPair(const TlsFiles& files, const TlsTexts& texts) {
  const Certificate certificate = CertificateOf(texts.cert);
  if (!certificate) {
    return absl::InvalidArgumentError(absl::StrCat(kCert, ": ", files.cert, " holds no certificate in PEM form"));
  }
  const Key key = KeyOf(texts.key);
  if (!key) {
    return absl::InvalidArgumentError(
        absl::StrCat(kKey, ": ", files.key, " holds no private key in PEM form without a pass phrase"));
  }
  const bool fits = X509_check_private_key(certificate.get(), key.get()) == 1;
  ERR_clear_error();
  if (!fits) {
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
  if (!CertificateOf(texts.ca)) {
    return absl::InvalidArgumentError(absl::StrCat(kCa, ": ", files.ca, " holds no certificate in PEM form"));
  }
  if (files.cert.empty()) return texts;
  SIMPO_ASSIGN_OR_RETURN(texts.cert, Read(kCert, files.cert));
  SIMPO_ASSIGN_OR_RETURN(texts.key, Read(kKey, files.key));
  SIMPO_RETURN_IF_ERROR(CheckPair(files, texts));
  return texts;
}

}  // namespace simpo
