#ifndef SIMPO_COMMON_SHA256_H_
#define SIMPO_COMMON_SHA256_H_

#include <filesystem>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace simpo {

// SHA-256 in lower-case hexadecimal.
std::string Sha256(std::string_view text);
// Of a file, read in pieces. NOT_FOUND or UNAVAILABLE name the path.
absl::StatusOr<std::string> Sha256OfFile(const std::filesystem::path& path);

}  // namespace simpo

#endif  // SIMPO_COMMON_SHA256_H_
