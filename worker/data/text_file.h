#ifndef SIMPO_WORKER_DATA_TEXT_FILE_H_
#define SIMPO_WORKER_DATA_TEXT_FILE_H_

#include <zlib.h>

#include <filesystem>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace simpo {

// A text file, gzipped or not, read byte by byte through a buffer; a byte order mark is passed over.
class TextFile {
 public:
  // NOT_FOUND when it cannot be opened.
  static absl::StatusOr<TextFile> Open(const std::filesystem::path& path);
  TextFile(TextFile&& other) noexcept;
  TextFile(const TextFile&) = delete;
  TextFile& operator=(const TextFile&) = delete;
  ~TextFile();

  int Peek() { return next_ < end_ || Fill() ? static_cast<unsigned char>(buffer_[next_]) : -1; }
  // The next byte; -1 at the end, and after an error, which status() tells.
  int Get() {
    const int byte = Peek();
    if (byte < 0) return byte;
    ++next_;
    if (byte == '\n') ++line_;
    return byte;
  }
  // The next line without its end; false at the end of the file. Lines longer than `limit` are an error.
  bool GetLine(std::string* line, size_t limit);
  void Rewind();

  int64_t line() const { return line_; }  // of the next byte, from 1
  std::string Where(int64_t line) const;  // "file:line"
  absl::Status Bad(int64_t line, const std::string& problem) const;
  const absl::Status& status() const { return status_; }

 private:
  TextFile(std::filesystem::path path, gzFile file) : path_(std::move(path)), file_(file), buffer_(1 << 18) {}
  bool Fill();
  void SkipByteOrderMark();

  std::filesystem::path path_;
  gzFile file_;
  std::vector<char> buffer_;
  size_t next_ = 0, end_ = 0;
  int64_t line_ = 1;
  absl::Status status_;
};

}  // namespace simpo

#endif  // SIMPO_WORKER_DATA_TEXT_FILE_H_
