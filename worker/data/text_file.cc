#include "worker/data/text_file.h"

#include <errno.h>
#include <string.h>

#include <utility>

#include "absl/strings/str_cat.h"

namespace simpo {

absl::StatusOr<TextFile> TextFile::Open(const std::filesystem::path& path) {
  std::error_code error;
  errno = 0;
  gzFile handle = std::filesystem::is_directory(path, error) ? nullptr : gzopen(path.c_str(), "rb");
  if (handle == nullptr) {
    return absl::NotFoundError(
        absl::StrCat("cannot read the data file ", path.string(), ": ", errno == 0 ? "not a file" : strerror(errno)));
  }
  TextFile file(path, handle);
  file.SkipByteOrderMark();
  return file;
}

TextFile::TextFile(TextFile&& other) noexcept
    : path_(std::move(other.path_)),
      file_(std::exchange(other.file_, nullptr)),
      buffer_(std::move(other.buffer_)),
      next_(other.next_),
      end_(other.end_),
      line_(other.line_),
      status_(std::move(other.status_)) {}

TextFile::~TextFile() {
  if (file_ != nullptr) gzclose(file_);
}

bool TextFile::Fill() {
  if (!status_.ok()) return false;
  const int size = gzread(file_, buffer_.data(), static_cast<unsigned>(buffer_.size()));
  int code = Z_OK;
  const char* problem = gzerror(file_, &code);
  // A gzipped file that is cut off ends with Z_BUF_ERROR and no negative size.
  if (size < 0 || code == Z_BUF_ERROR) {
    status_ = Bad(line_, code == Z_ERRNO ? strerror(errno) : absl::StrCat("the compressed file is damaged: ", problem));
    return false;
  }
  next_ = 0;
  end_ = static_cast<size_t>(size);
  return size > 0;
}

bool TextFile::GetLine(std::string* line, size_t limit) {
  line->clear();
  const int64_t number = line_;
  if (Peek() < 0) return false;
  while (next_ < end_ || Fill()) {
    const char* begin = buffer_.data() + next_;
    const void* found = memchr(begin, '\n', end_ - next_);
    const size_t size = found == nullptr ? end_ - next_ : static_cast<size_t>(static_cast<const char*>(found) - begin);
    if (line->size() + size > limit) {
      status_ = Bad(number, absl::StrCat("the line has more than ", limit, " bytes"));
      return false;
    }
    line->append(begin, size);
    next_ += size;
    if (found != nullptr) {
      ++next_;
      ++line_;
      return true;
    }
  }
  return status_.ok();
}

void TextFile::Rewind() {
  gzrewind(file_);
  next_ = end_ = 0;
  line_ = 1;
  SkipByteOrderMark();
}

void TextFile::SkipByteOrderMark() {
  if (Peek() == 0xef && end_ >= 3 && memcmp(buffer_.data(), "\xef\xbb\xbf", 3) == 0) next_ = 3;
}

std::string TextFile::Where(int64_t line) const { return absl::StrCat(path_.string(), ":", line); }

absl::Status TextFile::Bad(int64_t line, const std::string& problem) const {
  return absl::InvalidArgumentError(absl::StrCat(Where(line), ": ", problem));
}

}  // namespace simpo
