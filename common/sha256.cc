#include "common/sha256.h"

#include <errno.h>
#include <fcntl.h>
#include <openssl/evp.h>
#include <string.h>
#include <unistd.h>

#include <memory>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "common/file_system.h"

namespace simpo {
struct Sha256Hasher::Context {
  std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> state{EVP_MD_CTX_new(), EVP_MD_CTX_free};
};

Sha256Hasher::Sha256Hasher() : context_(std::make_unique<Context>()) {
  EVP_DigestInit_ex(context_->state.get(), EVP_sha256(), nullptr);
}

Sha256Hasher::~Sha256Hasher() = default;

void Sha256Hasher::Add(const void* data, size_t size) { EVP_DigestUpdate(context_->state.get(), data, size); }

std::string Sha256Hasher::Finish() {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int size = 0;
  EVP_DigestFinal_ex(context_->state.get(), digest, &size);
  return absl::BytesToHexString(absl::string_view(reinterpret_cast<char*>(digest), size));
}

std::string Sha256(std::string_view text) {
  Sha256Hasher hasher;
  hasher.Add(text.data(), text.size());
  return hasher.Finish();
}

absl::StatusOr<std::string> Sha256OfFile(const std::filesystem::path& path) {
  const int fd = FileSystem::Current().Open(path, O_RDONLY);
  if (fd < 0) return ErrnoStatus("read", path);
  Sha256Hasher hasher;
  std::vector<char> buffer(1 << 20);
  ssize_t got = 0;
  while ((got = read(fd, buffer.data(), buffer.size())) > 0) hasher.Add(buffer.data(), static_cast<size_t>(got));
  const int error = errno;
  close(fd);
  if (got < 0) return absl::UnavailableError(absl::StrCat("cannot read ", path.string(), ": ", strerror(error)));
  return hasher.Finish();
}

}  // namespace simpo
