#ifndef SIMPO_COMMON_SHA256_H_
#define SIMPO_COMMON_SHA256_H_

#include <cstddef>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace simpo {

// SHA-256 of what comes piece by piece.
class Sha256Hasher {
 public:
  Sha256Hasher();
  ~Sha256Hasher();
  void Add(const void* data, size_t size);
  std::string Finish();  // in lower-case hexadecimal; call it once, at the end

 private:
  struct Context;
  std::unique_ptr<Context> context_;
};

// SHA-256 in lower-case hexadecimal.
std::string Sha256(std::string_view text);
// Of a file, read in pieces. NOT_FOUND or UNAVAILABLE name the path.
absl::StatusOr<std::string> Sha256OfFile(const std::filesystem::path& path);

}  // namespace simpo

#endif  // SIMPO_COMMON_SHA256_H_
