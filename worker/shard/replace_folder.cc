#include "worker/shard/replace_folder.h"

#include <errno.h>

#include <string>
#include <system_error>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/atomic_file.h"
#include "common/file_system.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

fs::path ParentOf(const fs::path& path) { return path.has_parent_path() ? path.parent_path() : fs::path("."); }

absl::Status Remove(const fs::path& path) {
  if (FileSystem::Current().Remove(path) == 0 || errno == ENOENT) return absl::OkStatus();
  return ErrnoStatus("remove", path);
}

// A file, a link, or a folder with all that is in it; nothing is fine too.
absl::Status RemoveAll(const fs::path& path) {
  std::error_code error;
  if (fs::symlink_status(path, error).type() == fs::file_type::directory) {
    std::vector<fs::path> inside;
    for (const auto& item : fs::directory_iterator(path, error)) inside.push_back(item.path());
    for (const fs::path& item : inside) SIMPO_RETURN_IF_ERROR(RemoveAll(item));
  }
  return Remove(path);
}

absl::Status Rename(const fs::path& from, const fs::path& to) {
  if (FileSystem::Current().Rename(from, to) == 0) return absl::OkStatus();
  return ErrnoStatus(absl::StrCat("rename ", from.string(), " to"), to);
}

absl::Status SyncParent(const fs::path& path) { return SyncPath(ParentOf(path)); }

}  // namespace

fs::path PartialFolder(const fs::path& path) { return path.string() + ".partial"; }

fs::path OldFolder(const fs::path& path) { return path.string() + ".old"; }

absl::Status MakeFolders(const fs::path& path) {
  std::error_code error;
  if (fs::is_directory(path, error)) return absl::OkStatus();
  SIMPO_RETURN_IF_ERROR(MakeFolders(ParentOf(path)));
  if (FileSystem::Current().MakeFolder(path) != 0 && errno != EEXIST) return ErrnoStatus("make", path);
  return SyncParent(path);
}

absl::Status StartFolder(const fs::path& path) {
  const fs::path partial = PartialFolder(path);
  SIMPO_RETURN_IF_ERROR(RemoveAll(partial));
  return MakeFolders(partial);
}

absl::Status PublishFolder(const fs::path& path) {
  const fs::path partial = PartialFolder(path);
  SIMPO_RETURN_IF_ERROR(SyncPath(partial));
  if (fs::exists(path)) {
    SIMPO_RETURN_IF_ERROR(RemoveAll(OldFolder(path)));
    SIMPO_RETURN_IF_ERROR(Rename(path, OldFolder(path)));
  }
  SIMPO_RETURN_IF_ERROR(Rename(partial, path));
  SIMPO_RETURN_IF_ERROR(SyncParent(path));
  return RemoveAll(OldFolder(path));
}

absl::Status RemoveFolder(const fs::path& path) {
  if (!fs::exists(path)) return absl::OkStatus();
  const fs::path doomed = PartialFolder(path);
  SIMPO_RETURN_IF_ERROR(RemoveAll(doomed));
  SIMPO_RETURN_IF_ERROR(Rename(path, doomed));
  SIMPO_RETURN_IF_ERROR(SyncParent(path));  // before anything in it goes
  return RemoveAll(doomed);
}

absl::Status RemovePartial(const fs::path& path) { return RemoveAll(PartialFolder(path)); }

}  // namespace simpo
