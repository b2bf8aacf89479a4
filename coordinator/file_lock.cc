#include "coordinator/file_lock.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

// An open-file-description lock: unlike flock it can be asked for without being taken.
struct flock WholeFile() {
  struct flock lock = {};
  lock.l_type = F_WRLCK;
  lock.l_whence = SEEK_SET;
  return lock;
}

}  // namespace

absl::StatusOr<FileLock> FileLock::Acquire(const std::filesystem::path& path) {
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) {
    return absl::UnavailableError(absl::StrCat("cannot open ", path.string(), ": ", std::strerror(errno)));
  }
  FileLock result(fd);
  struct flock lock = WholeFile();
  if (fcntl(fd, F_OFD_SETLK, &lock) == 0) return result;
  if (errno == EAGAIN || errno == EACCES) {
    return absl::AlreadyExistsError(absl::StrCat(path.string(), " is locked by another process"));
  }
  return absl::UnavailableError(absl::StrCat("cannot lock ", path.string(), ": ", std::strerror(errno)));
}

absl::StatusOr<bool> FileLock::IsHeld(const std::filesystem::path& path) {
  const FileLock file(open(path.c_str(), O_RDWR | O_CLOEXEC));
  if (file.fd_ < 0 && errno == ENOENT) return false;
  struct flock lock = WholeFile();
  if (file.fd_ >= 0 && fcntl(file.fd_, F_OFD_GETLK, &lock) == 0) return lock.l_type != F_UNLCK;
  return absl::UnavailableError(absl::StrCat("cannot look at the lock ", path.string(), ": ", std::strerror(errno)));
}

FileLock::~FileLock() {
  if (fd_ >= 0) close(fd_);
}

}  // namespace simpo
