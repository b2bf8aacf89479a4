#ifndef SIMPO_COORDINATOR_LOG_READER_H_
#define SIMPO_COORDINATOR_LOG_READER_H_

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

namespace simpo {

// Where the last `lines` lines of a file begin; 0 when it has fewer, or is not there.
int64_t TailOffset(const std::filesystem::path& path, int64_t lines);

// Whole lines from `*offset`, at most about 64 KiB, and moves the offset past them. `complete`: the file
// grows no more, so a last line without its end is taken too. A longer line comes in pieces. Empty text:
// nothing more is there yet. A file that has become shorter is read from its start. No value: the file does not exist.
std::optional<std::string> ReadLines(const std::filesystem::path& path, bool complete, int64_t* offset);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_LOG_READER_H_
