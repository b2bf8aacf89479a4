#include "common/tls_files.h"

#include <cstdlib>

#include "absl/strings/str_cat.h"
#include "common/atomic_file.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

constexpr int64_t kMaxBytes = 1 << 20;

std::string Variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

absl::StatusOr<std::string> Read(const char* what, const std::string& file) {
  if (file.empty()) return std::string();
  absl::StatusOr<std::string> text = ReadFile(file, kMaxBytes);
  if (text.ok() && text->find("-----BEGIN") != std::string::npos) return text;
  if (text.ok()) return absl::InvalidArgumentError(absl::StrCat(what, ": ", file, " is not in PEM form"));
  return absl::InvalidArgumentError(absl::StrCat(what, ": ", std::string(text.status().message())));
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
  SIMPO_ASSIGN_OR_RETURN(texts.ca, Read("--ca (SIMPO_CA)", files.ca));
  SIMPO_ASSIGN_OR_RETURN(texts.cert, Read("--cert (SIMPO_CERT)", files.cert));
  SIMPO_ASSIGN_OR_RETURN(texts.key, Read("--key (SIMPO_KEY)", files.key));
  return texts;
}

}  // namespace simpo
