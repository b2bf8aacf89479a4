#ifndef SIMPO_COMMON_FILE_SYSTEM_H_
#define SIMPO_COMMON_FILE_SYSTEM_H_

#include <sys/types.h>

#include <cstddef>
#include <filesystem>
#include <string_view>

#include "absl/status/status.h"

namespace simpo {

// The system calls that make, change and open files, in one place, so that a test can let any of them
// fail or lose what was not synced. Each returns what the call does: -1 and errno on an error.
// Thread-safe.
class FileSystem {
 public:
  virtual ~FileSystem() = default;
  virtual int Open(const std::filesystem::path& path, int flags, mode_t mode = 0);
  virtual ssize_t Write(int fd, const void* data, size_t size);
  virtual int Sync(int fd);
  virtual int Rename(const std::filesystem::path& from, const std::filesystem::path& to);
  virtual int MakeFolder(const std::filesystem::path& path);
  virtual int Remove(const std::filesystem::path& path);  // a file or an empty folder

  static FileSystem& Current();
};

// For tests: `file_system` takes the place of the real one while this lives, on every thread.
class ScopedFileSystem {
 public:
  explicit ScopedFileSystem(FileSystem& file_system);
  ScopedFileSystem(const ScopedFileSystem&) = delete;
  ScopedFileSystem& operator=(const ScopedFileSystem&) = delete;
  ~ScopedFileSystem();
};

// errno as "cannot <what> <path>: <reason>": NOT_FOUND, PERMISSION_DENIED, RESOURCE_EXHAUSTED (no
// space) or UNAVAILABLE.
absl::Status ErrnoStatus(std::string_view what, const std::filesystem::path& path);

// A new file, or an earlier one emptied, that is written from front to end. The first error is kept:
// what follows it does nothing.
class OutputFile {
 public:
  explicit OutputFile(std::filesystem::path path, mode_t mode = 0644);
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile();

  absl::Status Write(const void* data, size_t size);
  absl::Status Sync();
  const absl::Status& status() const { return status_; }

 private:
  const std::filesystem::path path_;
  int fd_ = -1;
  absl::Status status_;
};

}  // namespace simpo

#endif  // SIMPO_COMMON_FILE_SYSTEM_H_
