#ifndef SIMPO_WORKER_SHARD_REPLACE_FOLDER_H_
#define SIMPO_WORKER_SHARD_REPLACE_FOLDER_H_

#include <filesystem>

#include "absl/status/status.h"

namespace simpo {

// A folder of results is made under the name PartialFolder(path) and renamed when it is whole, so
// that `path` never names half of it.

// `path` with ".partial" appended.
std::filesystem::path PartialFolder(const std::filesystem::path& path);

// `path` with ".old" appended: where the earlier folder stands during the two renames of
// PublishFolder; a crash between them leaves it there.
std::filesystem::path OldFolder(const std::filesystem::path& path);

// Makes a folder and its parents, each durable in the one above it.
absl::Status MakeFolders(const std::filesystem::path& path);

// Makes PartialFolder(path), and its parents; whatever an earlier run left of it is removed.
absl::Status StartFolder(const std::filesystem::path& path);

// Syncs PartialFolder(path), renames it to `path` in place of an earlier folder, and syncs the
// parent. The files in it must have been synced.
absl::Status PublishFolder(const std::filesystem::path& path);

// Removes PartialFolder(path), if it is there.
absl::Status RemovePartial(const std::filesystem::path& path);

// Removes `path`, under another name, so that a crash half-way does not leave half a folder there.
absl::Status RemoveFolder(const std::filesystem::path& path);

}  // namespace simpo

#endif  // SIMPO_WORKER_SHARD_REPLACE_FOLDER_H_
