#include "worker/shard/replace_folder.h"

#include <string>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "common/atomic_file.h"
#include "common/status_macros.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

absl::Status ToStatus(const std::error_code& error, const char* what, const fs::path& path) {
  if (!error) return absl::OkStatus();
  const std::string text = absl::StrCat("cannot ", what, " ", path.string(), ": ", error.message());
  if (error == std::errc::no_space_on_device) return absl::ResourceExhaustedError(text);
  if (error == std::errc::permission_denied || error == std::errc::read_only_file_system) {
    return absl::PermissionDeniedError(text);
  }
  return absl::UnavailableError(text);
}

absl::Status RemoveAll(const fs::path& path) {
  std::error_code error;
  fs::remove_all(path, error);
  return ToStatus(error, "remove", path);
}

absl::Status Rename(const fs::path& from, const fs::path& to) {
  std::error_code error;
  fs::rename(from, to, error);
  return ToStatus(error, absl::StrCat("rename ", from.string(), " to").c_str(), to);
}

absl::Status SyncParent(const fs::path& path) {
  return SyncPath(path.has_parent_path() ? path.parent_path() : fs::path("."));
}

}  // namespace

fs::path PartialFolder(const fs::path& path) { return path.string() + ".partial"; }

fs::path OldFolder(const fs::path& path) { return path.string() + ".old"; }

absl::Status StartFolder(const fs::path& path) {
  const fs::path partial = PartialFolder(path);
  SIMPO_RETURN_IF_ERROR(RemoveAll(partial));
  std::error_code error;
  fs::create_directories(partial, error);
  return ToStatus(error, "make", partial);
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
  return RemoveAll(doomed);
}

}  // namespace simpo
