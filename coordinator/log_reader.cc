#include "coordinator/log_reader.h"

#include <algorithm>
#include <fstream>

namespace simpo {
namespace {

constexpr int64_t kChunkBytes = 64 << 10;

std::string ReadChunk(std::ifstream& file, int64_t offset, int64_t bytes) {
  std::string chunk(static_cast<size_t>(bytes), '\0');
  file.clear();
  file.seekg(offset);
  file.read(chunk.data(), bytes);
  chunk.resize(static_cast<size_t>(std::max<std::streamsize>(0, file.gcount())));
  return chunk;
}

}  // namespace

int64_t TailOffset(const std::filesystem::path& path, int64_t lines) {
  std::ifstream file(path, std::ios::binary | std::ios::ate);
  if (!file || lines <= 0) return 0;
  int64_t end = file.tellg();
  // The line break at the very end closes the last line; one more stands before the first wanted one.
  bool at_end = true;
  for (int64_t left = lines; end > 0;) {
    const int64_t begin = std::max<int64_t>(0, end - kChunkBytes);
    const std::string chunk = ReadChunk(file, begin, end - begin);
    for (size_t i = chunk.size(); i > 0; --i) {
      const bool line_break = chunk[i - 1] == '\n';
      if (line_break && !at_end && --left == 0) return begin + static_cast<int64_t>(i);
      at_end = false;
    }
    end = begin;
  }
  return 0;
}

std::optional<std::string> ReadLines(const std::filesystem::path& path, bool complete, int64_t* offset) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return std::nullopt;
  file.seekg(0, std::ios::end);
  if (file.tellg() < *offset) *offset = 0;  // it was cut, and begins anew
  std::string text = ReadChunk(file, *offset, kChunkBytes);
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
