#ifndef SIMPO_COORDINATOR_LOG_READER_H_
#define SIMPO_COORDINATOR_LOG_READER_H_

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

namespace simpo {

// A file where a job may have put anything. A link, a pipe, a folder: as if nothing were there, and nobody waits.
class RegularFile {
 public:
  explicit RegularFile(const std::filesystem::path& path);
  RegularFile(const RegularFile&) = delete;
  RegularFile& operator=(const RegularFile&) = delete;
  ~RegularFile();

  bool is_open() const { return fd_ >= 0; }
  int64_t size() const { return size_; }  // when it was opened; 0 if it is not open
  // Fewer at its end.
  std::string Read(int64_t offset, int64_t bytes) const;

 private:
  int fd_ = -1;
  int64_t size_ = 0;
};

// Where the last `lines` lines of a file begin; 0 when it has fewer, or is not there. At most 64 MiB before its end.
int64_t TailOffset(const std::filesystem::path& path, int64_t lines);

// Whole lines from `*offset`, at most about 64 KiB, and moves the offset past them. `complete`: the file
// grows no more, so a last line without its end is taken too. A longer line comes in pieces. Empty text:
// nothing more is there yet. A file that has become shorter is read from its start. No value: there is no
// such file.
std::optional<std::string> ReadLines(const std::filesystem::path& path, bool complete, int64_t* offset);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_LOG_READER_H_
