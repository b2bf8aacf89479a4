#ifndef SIMPO_COMMON_TLS_FILES_H_
#define SIMPO_COMMON_TLS_FILES_H_

#include <string>

#include "absl/status/statusor.h"

namespace simpo {

// How a client reaches a coordinator that has TLS: files in PEM form.
struct TlsFiles {
  std::string ca;    // whom to trust; empty: no TLS
  std::string cert;  // the client's own, where the coordinator asks for one; empty: none
  std::string key;
  std::string name;  // that the coordinator's certificate must hold; empty: the host of its address
};

// Their contents.
struct TlsTexts {
  std::string ca, cert, key;
};

// From SIMPO_CA, SIMPO_CERT, SIMPO_KEY and SIMPO_TLS_NAME.
TlsFiles TlsFilesOfEnvironment();

// INVALID_ARGUMENT names the file that cannot be used, or says what is missing.
absl::StatusOr<TlsTexts> ReadTlsFiles(const TlsFiles& files);

}  // namespace simpo

#endif  // SIMPO_COMMON_TLS_FILES_H_
