#ifndef SIMPO_COORDINATOR_FILE_LOCK_H_
#define SIMPO_COORDINATOR_FILE_LOCK_H_

#include <filesystem>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace simpo {

// An exclusive lock on a file. The kernel releases it when the holder ends, however it ends; programs
// that the holder starts do not inherit it.
class FileLock {
 public:
  // Makes the file when it is missing. ALREADY_EXISTS: another holder; UNAVAILABLE: no such folder...
  static absl::StatusOr<FileLock> Acquire(const std::filesystem::path& path);
  // Whether somebody holds it. Does not take it, not even for a moment. An error: that cannot be told at the moment,
  // as when too many files are open.
  static absl::StatusOr<bool> IsHeld(const std::filesystem::path& path);

  FileLock(FileLock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  FileLock& operator=(FileLock&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~FileLock();

 private:
  explicit FileLock(int fd) : fd_(fd) {}
  int fd_;
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_FILE_LOCK_H_
