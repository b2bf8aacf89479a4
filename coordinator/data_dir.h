#ifndef SIMPO_COORDINATOR_DATA_DIR_H_
#define SIMPO_COORDINATOR_DATA_DIR_H_

#include <cstdint>
#include <filesystem>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/file_lock.h"

namespace simpo {

// Makes the folder when it is missing, for its account alone. One that cannot be written to, or that lies on a network
// file system, is refused with the remedy.
absl::Status MakeDataDir(const std::filesystem::path& dir);

// Has root go on as the account that owns the folder, so that the coordinator can read what is written there. Others
// stay who they are.
absl::Status BecomeOwner(const std::filesystem::path& dir);

// Held while a coordinator runs: the folder has one.
absl::StatusOr<FileLock> LockDataDir(const std::filesystem::path& dir);

// The name of the network file system that this is, or nothing: `magic` is statfs's f_type, `mount_type` what
// the table of mounts says (it alone tells one FUSE from another). Pure.
std::string NetworkFileSystem(int64_t magic, const std::string& mount_type);

// Copies the databases of a data directory, whose coordinator may be running, into `target`: a folder that is
// made, or an empty one. Whole or absent: an error leaves nothing there.
absl::Status BackUpDataDir(const std::filesystem::path& dir, const std::filesystem::path& target);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_DATA_DIR_H_
