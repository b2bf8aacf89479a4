#ifndef SIMPO_COMMON_ATOMIC_FILE_H_
#define SIMPO_COMMON_ATOMIC_FILE_H_

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace simpo {

// The whole file. NOT_FOUND, PERMISSION_DENIED or OUT_OF_RANGE (larger than max_bytes) name the path.
absl::StatusOr<std::string> ReadFile(const std::filesystem::path& path, int64_t max_bytes);

// Replaces `path` by a file with this content, whole or not at all: a temporary file beside it is
// written and synced, renamed over it, and the folder synced.
absl::Status WriteFileAtomically(const std::filesystem::path& path, std::string_view content, int mode = 0644);

// Syncs a file or a folder (after renames in it) to disk.
absl::Status SyncPath(const std::filesystem::path& path);

}  // namespace simpo

#endif  // SIMPO_COMMON_ATOMIC_FILE_H_
