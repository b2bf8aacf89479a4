#include "common/atomic_file.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>

#include "absl/strings/str_cat.h"
#include "common/file_system.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

struct FileDescriptor {
  int fd = -1;
  ~FileDescriptor() {
    if (fd >= 0) close(fd);
  }
};

}  // namespace

absl::StatusOr<std::string> ReadFile(const std::filesystem::path& path, int64_t max_bytes) {
  FileDescriptor file{FileSystem::Current().Open(path, O_RDONLY)};
  if (file.fd < 0) return ErrnoStatus("read", path);
  struct stat info {};
  if (fstat(file.fd, &info) != 0) return ErrnoStatus("read", path);
  if (S_ISDIR(info.st_mode)) return absl::InvalidArgumentError(absl::StrCat(path.string(), " is a folder, not a file"));
  std::string content;
  char buffer[65536];
  while (true) {
    const ssize_t got = read(file.fd, buffer, sizeof(buffer));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return ErrnoStatus("read", path);
    if (got == 0) return content;
    content.append(buffer, static_cast<size_t>(got));
    if (static_cast<int64_t>(content.size()) > max_bytes) {
      return absl::OutOfRangeError(absl::StrCat(path.string(), " is larger than ", max_bytes, " bytes"));
    }
  }
}

absl::Status SyncPath(const std::filesystem::path& path) {
  FileDescriptor file{FileSystem::Current().Open(path, O_RDONLY)};
  if (file.fd < 0 || FileSystem::Current().Sync(file.fd) != 0) return ErrnoStatus("sync", path);
  return absl::OkStatus();
}

absl::Status WriteFileAtomically(const std::filesystem::path& path, std::string_view content, int mode) {
  static std::atomic<int> counter = 0;  // threads may write the same path
  const std::filesystem::path temporary = absl::StrCat(path.string(), ".tmp.", getpid(), ".", ++counter);
  absl::Status status;
  {
    OutputFile file(temporary, static_cast<mode_t>(mode));
    status = file.Write(content.data(), content.size());
    if (status.ok()) status = file.Sync();
  }
  if (status.ok() && FileSystem::Current().Rename(temporary, path) != 0) status = ErrnoStatus("rename to", path);
  if (!status.ok()) {
    FileSystem::Current().Remove(temporary);  // the error to report is the one before
    return status;
  }
  return SyncPath(path.has_parent_path() ? path.parent_path() : std::filesystem::path("."));
}

}  // namespace simpo
