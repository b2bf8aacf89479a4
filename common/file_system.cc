#include "common/file_system.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <utility>

#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

std::atomic<FileSystem*> g_replacement = nullptr;  // of a test

}  // namespace

int FileSystem::Open(const std::filesystem::path& path, int flags, mode_t mode) {
  return open(path.c_str(), flags | O_CLOEXEC, mode);
}
ssize_t FileSystem::Write(int fd, const void* data, size_t size) { return write(fd, data, size); }
int FileSystem::Sync(int fd) { return fsync(fd); }
int FileSystem::Rename(const std::filesystem::path& from, const std::filesystem::path& to) {
  return rename(from.c_str(), to.c_str());
}
int FileSystem::MakeFolder(const std::filesystem::path& path) { return mkdir(path.c_str(), 0777); }
int FileSystem::Remove(const std::filesystem::path& path) { return remove(path.c_str()); }

FileSystem& FileSystem::Current() {
  static FileSystem real;
  FileSystem* const replacement = g_replacement.load();
  return replacement != nullptr ? *replacement : real;
}

ScopedFileSystem::ScopedFileSystem(FileSystem& file_system) { g_replacement = &file_system; }
ScopedFileSystem::~ScopedFileSystem() { g_replacement = nullptr; }

absl::Status ErrnoStatus(std::string_view what, const std::filesystem::path& path) {
  const int error = errno;
  const std::string message = absl::StrCat("cannot ", std::string(what), " ", path.string(), ": ", strerror(error));
  if (error == ENOENT) return absl::NotFoundError(message);
  if (error == EACCES || error == EPERM || error == EROFS) return absl::PermissionDeniedError(message);
  if (error == ENOSPC || error == EDQUOT) return absl::ResourceExhaustedError(message);
  return absl::UnavailableError(message);
}

OutputFile::OutputFile(std::filesystem::path path, mode_t mode) : path_(std::move(path)) {
  fd_ = FileSystem::Current().Open(path_, O_WRONLY | O_CREAT | O_TRUNC, mode);
  if (fd_ < 0) status_ = ErrnoStatus("write", path_);
}

OutputFile::~OutputFile() {
  if (fd_ >= 0) close(fd_);
}

absl::Status OutputFile::Write(const void* data, size_t size) {
  constexpr size_t kPiece = size_t{64} << 20;  // what one call can always take
  const char* next = static_cast<const char*>(data);
  while (size > 0 && status_.ok()) {
    const ssize_t written = FileSystem::Current().Write(fd_, next, size < kPiece ? size : kPiece);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) {
      status_ = ErrnoStatus("write", path_);
      break;
    }
    next += written;
    size -= static_cast<size_t>(written);
  }
  return status_;
}

absl::Status OutputFile::Sync() {
  if (status_.ok() && FileSystem::Current().Sync(fd_) != 0) status_ = ErrnoStatus("sync", path_);
  return status_;
}

}  // namespace simpo
