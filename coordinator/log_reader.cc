#include "coordinator/log_reader.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace simpo {
namespace {

constexpr int64_t kChunkBytes = 64 << 10;
constexpr int64_t kMaxTailBytes = 64 << 20;

}  // namespace

RegularFile::RegularFile(const std::filesystem::path& path)
    : fd_(open(path.c_str(), O_RDONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC)) {
  struct stat info {};
  if (fd_ < 0) return;
  if (fstat(fd_, &info) == 0 && S_ISREG(info.st_mode)) {
    size_ = info.st_size;
  } else {
    close(fd_);
    fd_ = -1;
  }
}

RegularFile::~RegularFile() {
  if (fd_ >= 0) close(fd_);
}

std::string RegularFile::Read(int64_t offset, int64_t bytes) const {
  std::string text(static_cast<size_t>(bytes), '\0');
  size_t length = 0;
  while (length < text.size()) {
    const ssize_t got = pread(fd_, text.data() + length, text.size() - length, offset + static_cast<int64_t>(length));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) break;
    length += static_cast<size_t>(got);
  }
  text.resize(length);
  return text;
}

int64_t TailOffset(const std::filesystem::path& path, int64_t lines) {
  const RegularFile file(path);
  if (lines <= 0) return 0;
  int64_t end = file.size();
  const int64_t first = std::max<int64_t>(0, end - kMaxTailBytes);
  // The line break at the very end closes the last line; one more stands before the first wanted one.
  bool at_end = true;
  for (int64_t left = lines; end > first;) {
    const int64_t begin = std::max(first, end - kChunkBytes);
    const std::string chunk = file.Read(begin, end - begin);
    for (size_t i = chunk.size(); i > 0; --i) {
      const bool line_break = chunk[i - 1] == '\n';
      if (line_break && !at_end && --left == 0) return begin + static_cast<int64_t>(i);
      at_end = false;
    }
    end = begin;
  }
  return first;
}

std::optional<std::string> ReadLines(const std::filesystem::path& path, bool complete, int64_t* offset) {
  const RegularFile file(path);
  if (!file.is_open()) return std::nullopt;
  if (file.size() < *offset) *offset = 0;  // it was cut, and begins anew
  std::string text = file.Read(*offset, kChunkBytes);
  const size_t last_break = text.rfind('\n');
  const bool full = static_cast<int64_t>(text.size()) == kChunkBytes;
  if (last_break != std::string::npos) {
    text.resize(last_break + 1);
  } else if (!complete && !full) {
    text.clear();
  }
  *offset += static_cast<int64_t>(text.size());
  return text;
}

}  // namespace simpo
