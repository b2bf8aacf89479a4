#include "coordinator/data_dir.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "common/atomic_file.h"
#include "common/status_macros.h"
#include "coordinator/database.h"
#include "coordinator/sqlite.h"
#include "coordinator/tokens.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

// From statfs(2) and the kernel's magic.h.
constexpr std::pair<int64_t, const char*> kNetworkMagics[] = {
    {0x6969, "nfs"},          {0xff534d42, "cifs"},  {0xfe534d42, "smb2"}, {0x517b, "smb"},
    {0x0bd00bd0, "lustre"},   {0x00c36400, "ceph"},  {0x47504653, "gpfs"}, {0x5346414f, "afs"},
    {0x6b414653, "kafs"},     {0x73757245, "coda"},  {0x564c, "ncp"},      {0x19830326, "beegfs"},
    {0x20030528, "orangefs"}, {0x013111a8, "ibrix"},
};
constexpr int64_t kFuseMagic = 0x65735546;
// FUSE file systems whose files lie on this machine; of others it is not known.
constexpr const char* kLocalFuse[] = {"fuse",           "fuseblk",       "fuse.fuse-overlayfs", "fuse.ntfs-3g",
                                      "fuse.bindfs",    "fuse.mergerfs", "fuse.encfs",          "fuse.gocryptfs",
                                      "fuse.unionfs",   "fuse.exfat",    "fuse.lxcfs",          "fuse.ext2",
                                      "fuse.squashfuse"};

// The type of the mount that a file lies on, as /proc/self/mountinfo names it; empty when it is not found.
std::string MountType(const fs::path& path) {
  struct stat status = {};
  if (stat(path.c_str(), &status) != 0) return "";
  const std::string device = absl::StrCat(major(status.st_dev), ":", minor(status.st_dev));
  std::ifstream mounts("/proc/self/mountinfo");
  for (std::string line; std::getline(mounts, line);) {
    // "36 35 98:0 /root /mount/point options [tags...] - type source options"
    const std::vector<std::string> words = absl::StrSplit(line, ' ');
    const auto dash = std::find(words.begin(), words.end(), "-");
    if (words.size() > 3 && words[2] == device && std::distance(dash, words.end()) > 1) return dash[1];
  }
  return "";
}

absl::Status CheckFileSystem(const fs::path& dir) {
  struct statfs system = {};
  if (statfs(dir.c_str(), &system) != 0) return absl::OkStatus();  // what cannot be told is no reason to refuse
  const std::string name =
      NetworkFileSystem(static_cast<int64_t>(static_cast<uint32_t>(system.f_type)), MountType(dir));
  if (name.empty()) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("the data directory ", dir.string(), " is on a network file system (", name,
                   "), where the locks and the shared memory of the database do not hold and jobs could be lost; "
                   "choose a folder on a disk of this machine with --data-dir. Models, data and output_dir of jobs "
                   "may lie on it"));
}

absl::Status SyncToDisk(const fs::path& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  const bool ok = fd >= 0 && fsync(fd) == 0;
  const int error = errno;
  if (fd >= 0) close(fd);
  if (ok) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("cannot sync ", path.string(), ": ", std::strerror(error)));
}

absl::Status CopyDatabase(const fs::path& from, const fs::path& to) {
  SIMPO_ASSIGN_OR_RETURN(Sqlite source, Sqlite::Open(from, /*read_only=*/true));
  SIMPO_RETURN_IF_ERROR(source.BackUp(to));
  SIMPO_ASSIGN_OR_RETURN(Sqlite copy, Sqlite::Open(to, /*read_only=*/true));
  SIMPO_ASSIGN_OR_RETURN(SqliteStatement check, copy.Prepare("PRAGMA quick_check(1)"));
  SIMPO_RETURN_IF_ERROR(check.Step().status());
  if (check.Text(0) == "ok") return SyncToDisk(to);
  return absl::DataLossError(absl::StrCat("the copy of ", from.string(), " is damaged: ", check.Text(0)));
}

absl::Status CopyDatabases(const fs::path& dir, const fs::path& target) {
  // Jobs first: all points that the state of these jobs relies on are stored by then, and so they are in
  // the second copy, which is made later. Points of jobs that the first copy does not know are dropped by
  // the coordinator that starts on the two.
  SIMPO_RETURN_IF_ERROR(CopyDatabase(dir / kJobsFile, target / kJobsFile));
  // A data directory of an older coordinator has one file alone.
  if (fs::exists(dir / kMetricsFile)) SIMPO_RETURN_IF_ERROR(CopyDatabase(dir / kMetricsFile, target / kMetricsFile));
  // Opened for the check, and empty.
  for (const char* file : {kJobsFile, kMetricsFile}) {
    for (const char* end : {"-wal", "-shm"}) fs::remove(target / absl::StrCat(file, end));
  }
  return SyncToDisk(target);
}

// Their hashes, and that tokens are asked for: without the mark a coordinator that is restored without the hashes would
// let anybody in.
absl::Status CopyTokens(const fs::path& dir, const fs::path& target) {
  const std::string mark = absl::StrCat(kTokensFile, kRequiredMark);
  const absl::StatusOr<std::string> tokens = ReadFile(dir / kTokensFile, /*max_bytes=*/1 << 26);
  if (!tokens.ok() && !absl::IsNotFound(tokens.status())) return tokens.status();
  if (tokens.ok()) SIMPO_RETURN_IF_ERROR(WriteFileAtomically(target / kTokensFile, *tokens, 0600));
  if (!tokens.ok() && !fs::exists(dir / mark)) return absl::OkStatus();
  return WriteFileAtomically(target / mark, "", 0600);
}

}  // namespace

std::string NetworkFileSystem(int64_t magic, const std::string& mount_type) {
  for (const auto& [known, name] : kNetworkMagics) {
    if (magic == known) return name;
  }
  if (magic != kFuseMagic || mount_type.empty()) return "";
  const bool local =
      std::any_of(std::begin(kLocalFuse), std::end(kLocalFuse), [&](const char* known) { return mount_type == known; });
  return local ? "" : mount_type;
}

absl::Status MakeDataDir(const fs::path& dir) {
  std::error_code error;
  const bool is_new = fs::create_directories(dir, error);
  if (is_new) fs::permissions(dir, fs::perms::owner_all, error);
  if (!error && access(dir.c_str(), W_OK | X_OK) == 0) return CheckFileSystem(dir);
  return absl::PermissionDeniedError(absl::StrCat("cannot use the data directory ", dir.string(), ": ",
                                                  error ? error.message() : "no permission to write there",
                                                  "; choose another one with --data-dir"));
}

absl::Status BecomeOwner(const fs::path& dir) {
  struct stat info = {};
  if (geteuid() != 0 || stat(dir.c_str(), &info) != 0 || info.st_uid == 0) return absl::OkStatus();
  if (setegid(info.st_gid) == 0 && seteuid(info.st_uid) == 0) return absl::OkStatus();
  return absl::PermissionDeniedError(absl::StrCat("cannot become the owner of ", dir.string(), ": ",
                                                  std::strerror(errno), "; run this as ", "the coordinator's account"));
}

absl::StatusOr<FileLock> LockDataDir(const fs::path& dir) {
  absl::StatusOr<FileLock> lock = FileLock::Acquire(dir / "coordinator.lock");
  if (!absl::IsAlreadyExists(lock.status())) return lock;
  return absl::AlreadyExistsError(absl::StrCat("another simpo-coordinator is using the data directory ", dir.string(),
                                               "; stop it first, or choose another one with --data-dir"));
}

absl::Status BackUpDataDir(const fs::path& dir, const fs::path& target) {
  std::error_code error;
  if (!fs::exists(dir / kJobsFile, error)) {
    return absl::NotFoundError(
        absl::StrCat(dir.string(), " is no data directory: there is no ", kJobsFile, "; see --data-dir"));
  }
  if (fs::exists(target, error) && !fs::is_empty(target, error)) {
    return absl::AlreadyExistsError(
        absl::StrCat(target.string(), " is not an empty folder; name a new one with --to, and each backup is kept"));
  }
  fs::path parent = fs::absolute(target).lexically_normal();
  if (!parent.has_filename()) parent = parent.parent_path();  // "copies/", as a shell completes it
  parent = parent.parent_path();
  const fs::path partial = parent / absl::StrCat(".simpo-backup-", getpid());
  fs::create_directories(partial, error);
  if (!error) fs::permissions(partial, fs::perms::owner_all, error);
  if (error) {
    return absl::PermissionDeniedError(
        absl::StrCat("cannot make a folder in ", parent.string(), ": ", error.message(), "; see --to"));
  }
  absl::Status status = CopyDatabases(dir, partial);
  if (status.ok()) status = CopyTokens(dir, partial);
  if (status.ok()) {
    fs::rename(partial, target, error);  // an empty folder is replaced
    status = error ? absl::UnavailableError(absl::StrCat("cannot make ", target.string(), ": ", error.message()))
                   : SyncToDisk(parent);
  }
  if (!status.ok()) fs::remove_all(partial, error);
  return status;
}

}  // namespace simpo
