#include "coordinator/launcher_mpirun.h"

#include <signal.h>
#include <sys/random.h>
#include <sys/wait.h>

#include <array>
#include <cerrno>
#include <cstdio>
#include <system_error>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "common/atomic_file.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "coordinator/file_lock.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

absl::StatusOr<std::string> NewSecret() {
  std::array<char, 32> bytes;
  if (getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    return absl::UnavailableError("the kernel gives no random bytes");
  }
  return absl::BytesToHexString(absl::string_view(bytes.data(), bytes.size()));
}

absl::Status MakeDir(const fs::path& dir, fs::perms permissions) {
  std::error_code error;
  fs::create_directories(dir, error);
  if (!error) fs::permissions(dir, permissions, error);
  if (!error) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("cannot make the folder ", dir.string(), ": ", error.message()));
}

// Whole or not at all for whoever reads it, but not synced to disk: for what a crash of the machine makes worthless. A
// thousand gangs are adopted in the time of a few syncs.
absl::Status ReplaceFile(const fs::path& path, const std::string& content) {
  const fs::path temporary = path.string() + ".tmp";  // one writer; what a killed one has left goes
  std::error_code error;
  fs::remove(temporary, error);
  // A new file: a user may have put a link there again, which would be followed.
  std::FILE* const file = std::fopen(temporary.c_str(), "wxe");
  bool written = file != nullptr && std::fwrite(content.data(), 1, content.size(), file) == content.size();
  if (file != nullptr) written = std::fclose(file) == 0 && written;
  if (!written) error.assign(errno, std::generic_category());
  if (written) fs::rename(temporary, path, error);
  if (written && !error) return absl::OkStatus();
  return absl::UnavailableError(absl::StrCat("cannot write ", path.string(), ": ", error.message()));
}

absl::StatusOr<bool> Exists(const fs::path& path) {
  std::error_code error;
  const bool exists = fs::exists(path, error);
  if (error) return absl::UnavailableError(absl::StrCat("cannot look at ", path.string(), ": ", error.message()));
  return exists;
}

absl::StatusOr<std::vector<std::string>> NamesIn(const fs::path& dir) {
  std::vector<std::string> names;
  std::error_code error;
  for (fs::directory_iterator entry(dir, error), end; !error && entry != end; entry.increment(error)) {
    names.push_back(entry->path().filename().string());
  }
  if (!error || error == std::errc::no_such_file_or_directory || error == std::errc::not_a_directory) return names;
  return absl::UnavailableError(absl::StrCat("cannot list the folder ", dir.string(), ": ", error.message()));
}

// Those that another job has left in an attempt's log_dir. Not through links: they may lead to what is not the job's.
void RemoveLogs(const GangRequest& request) {
  std::error_code error;
  const fs::path inside = request.log_dir.lexically_relative(request.output_dir);
  if (fs::canonical(request.log_dir, error) != fs::canonical(request.output_dir, error) / inside || error) return;
  std::vector<fs::path> logs;
  for (fs::directory_iterator entry(request.log_dir, error), end; !error && entry != end; entry.increment(error)) {
    if (entry->path().extension() == ".log") logs.push_back(entry->path());
  }
  for (const fs::path& log : logs) fs::remove(log, error);
}

// Whether an error says that what was asked for is not there or of no use, and not that it cannot be looked at now.
bool IsAbsent(const absl::Status& status) { return absl::IsNotFound(status) || absl::IsDataLoss(status); }

// OK also where there is no supervisor yet, or none any more.
absl::Status SignalSupervisor(const AttemptFiles& files, int signal) {
  const absl::StatusOr<ProcessIdentity> supervisor = ReadSupervisor(files);
  const absl::Status status = supervisor.ok() ? SignalProcess(*supervisor, signal) : supervisor.status();
  return IsAbsent(status) ? absl::OkStatus() : status;
}

}  // namespace

AttemptFiles MpirunLauncher::Files(const std::string& job_id, int attempt) const {
  return {options_.attempts_dir / job_id / absl::StrCat(attempt)};
}

std::string MpirunLauncher::AddressText() const {
  std::string text = options_.coordinator_address + "\n";
  if (!options_.ca.empty()) absl::StrAppend(&text, options_.ca, "\n", options_.tls_name, "\n");
  return text;
}

absl::Status MpirunLauncher::WriteFiles(const AttemptFiles& files, const GangRequest& request) const {
  SIMPO_RETURN_IF_ERROR(MakeDir(files.dir, fs::perms::owner_all));
  SIMPO_RETURN_IF_ERROR(MakeDir(request.log_dir, fs::perms::owner_all | fs::perms::group_read | fs::perms::group_exec |
                                                     fs::perms::others_read | fs::perms::others_exec));
  SIMPO_ASSIGN_OR_RETURN(const bool has_secret, Exists(files.Secret()));
  if (!has_secret) {
    // All who write to the logs append to them; this attempt's must not go on after those of a job before it.
    RemoveLogs(request);
    SIMPO_ASSIGN_OR_RETURN(const std::string secret, NewSecret());
    SIMPO_RETURN_IF_ERROR(WriteFileAtomically(files.Secret(), secret + "\n", 0600));
  }
  SIMPO_RETURN_IF_ERROR(WriteFileAtomically(files.Address(), AddressText()));
  SIMPO_RETURN_IF_ERROR(WriteFileAtomically(files.Job(), request.job_yaml));
  SIMPO_RETURN_IF_ERROR(ReplaceFile(request.output_dir / "job.yaml", request.job_yaml));  // for the user
  return WriteAttemptSpec(files, {.job_id = request.job_id,
                                  .attempt = request.attempt,
                                  .ranks = request.ranks,
                                  .threads_per_rank = request.threads_per_rank,
                                  .resume_latest = request.resume_latest,
                                  .worker = options_.worker,
                                  .mpirun = options_.mpirun,
                                  .log_dir = request.log_dir.string(),
                                  .output_dir = request.output_dir.string(),
                                  .coordinator = options_.coordinator_address,
                                  .log_limit_bytes = options_.log_limit_bytes});
}

absl::StatusOr<bool> MpirunLauncher::Start(const GangRequest& request) {
  const AttemptFiles files = Files(request.job_id, request.attempt);
  // A coordinator that died after this point has started it. If its supervisor is just about to take
  // the lock, a second one finds it taken and leaves.
  SIMPO_ASSIGN_OR_RETURN(const bool runs, FileLock::IsHeld(files.Lock()));
  SIMPO_ASSIGN_OR_RETURN(const bool ran, Exists(files.Supervisor()));
  if (runs || ran) return false;
  SIMPO_RETURN_IF_ERROR(WriteFiles(files, request));
  SIMPO_ASSIGN_OR_RETURN(const pid_t pid,
                         SpawnInNewSession({options_.supervisor, "supervise", "--attempt-dir", files.dir.string()},
                                           request.log_dir / kLauncherLog));
  children_[{request.job_id, request.attempt}] = pid;
  return true;
}

bool MpirunLauncher::ChildRuns(const std::string& job_id, int attempt) {
  const auto child = children_.find({job_id, attempt});
  if (child == children_.end()) return false;
  int status = 0;
  if (waitpid(child->second, &status, WNOHANG) == 0) return true;
  children_.erase(child);
  return false;
}

GangStatus MpirunLauncher::Poll(const std::string& job_id, int attempt) {
  absl::StatusOr<GangStatus> status = Look(job_id, attempt);
  if (status.ok()) return *std::move(status);
  return {.phase = GangStatus::Phase::kUnknown, .reason = std::string(status.status().message())};
}

absl::StatusOr<GangStatus> MpirunLauncher::Look(const std::string& job_id, int attempt) {
  const AttemptFiles files = Files(job_id, attempt);
  GangStatus status;
  // In this order: a supervisor writes exit.json before it ends.
  bool runs = ChildRuns(job_id, attempt);
  if (!runs) {
    SIMPO_ASSIGN_OR_RETURN(runs, FileLock::IsHeld(files.Lock()));
  }
  if (runs) {
    SIMPO_ASSIGN_OR_RETURN(const bool training, Exists(files.Gang()));
    SIMPO_ASSIGN_OR_RETURN(const bool supervised, Exists(files.Supervisor()));
    if (supervised) status.phase = GangStatus::Phase::kPreparing;
    if (training) status.phase = GangStatus::Phase::kTraining;
    return status;
  }
  absl::StatusOr<AttemptExit> exit = ReadExit(files);
  if (exit.ok()) {
    status.phase = GangStatus::Phase::kEnded;
    status.exit = *std::move(exit);
    return status;
  }
  if (!IsAbsent(exit.status())) return exit.status();
  status.phase = GangStatus::Phase::kLost;
  status.reason = "its supervisor could not begin; see launcher.log";
  const absl::StatusOr<ProcessIdentity> supervisor = ReadSupervisor(files);
  if (!supervisor.ok() && !IsAbsent(supervisor.status())) return supervisor.status();
  if (supervisor.ok()) {
    SIMPO_ASSIGN_OR_RETURN(const std::string boot_id, BootId());
    status.reason = supervisor->boot_id == boot_id ? "its supervisor ended without a word (killed, or out of memory)"
                                                   : "the machine was restarted";
  }
  return status;
}

std::optional<std::chrono::milliseconds> MpirunLauncher::RunsFor(const std::string& job_id, int attempt) {
  const absl::StatusOr<ProcessIdentity> supervisor = ReadSupervisor(Files(job_id, attempt));
  const absl::StatusOr<std::string> boot_id = BootId();
  if (!supervisor.ok() || !boot_id.ok() || supervisor->boot_id != *boot_id) return std::nullopt;
  return Age(*supervisor);
}

absl::Status MpirunLauncher::Terminate(const std::string& job_id, int attempt) {
  return SignalSupervisor(Files(job_id, attempt), SIGTERM);
}

absl::Status MpirunLauncher::Kill(const std::string& job_id, int attempt) {
  const AttemptFiles files = Files(job_id, attempt);
  absl::Status status = SignalSupervisor(files, SIGKILL);
  status.Update(SignalProcessesWithEnvironment(kSecretFileVariable, files.Secret().string(), SIGKILL));
  RemoveScratch(files);
  return status;
}

void MpirunLauncher::Forget(const std::string& job_id) {
  std::error_code error;
  fs::remove_all(options_.attempts_dir / job_id, error);
  if (error) {
    LOG_WARNING(absl::StrCat("cannot remove ", (options_.attempts_dir / job_id).string(), ": ", error.message()));
  }
}

void MpirunLauncher::Sweep(const std::function<bool(const std::string& job_id)>& is_live) {
  const absl::StatusOr<std::vector<std::string>> jobs = NamesIn(options_.attempts_dir);
  if (!jobs.ok()) return LOG_WARNING(std::string(jobs.status().message()));
  for (const std::string& job_id : *jobs) {
    if (is_live(job_id)) continue;
    if (const absl::Status status = EndAttempts(job_id); !status.ok()) {
      // Without its folder nobody would find it any more.
      LOG_WARNING(absl::StrCat("job ", job_id, " is not known here, but may run; the next coordinator looks again: ",
                               std::string(status.message())));
    } else {
      Forget(job_id);
    }
  }
}

absl::Status MpirunLauncher::EndAttempts(const std::string& job_id) {
  SIMPO_ASSIGN_OR_RETURN(const std::vector<std::string> names, NamesIn(options_.attempts_dir / job_id));
  for (const std::string& name : names) {
    int attempt = 0;
    if (!absl::SimpleAtoi(name, &attempt)) continue;
    SIMPO_ASSIGN_OR_RETURN(const bool held, FileLock::IsHeld(Files(job_id, attempt).Lock()));
    if (held)
      LOG_WARNING(absl::StrCat("job ", job_id, ", attempt ", attempt, " runs, but is not known here; ending it"));
    // Its supervisor may have gone before its ranks.
    SIMPO_RETURN_IF_ERROR(Kill(job_id, attempt));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> MpirunLauncher::ReadSecret(const std::string& job_id, int attempt) {
  SIMPO_ASSIGN_OR_RETURN(std::string secret, ReadFile(Files(job_id, attempt).Secret(), /*max_bytes=*/256));
  absl::StripTrailingAsciiWhitespace(&secret);
  return secret;
}

absl::Status MpirunLauncher::PublishAddress(const std::string& job_id, int attempt) {
  return ReplaceFile(Files(job_id, attempt).Address(), AddressText());
}

}  // namespace simpo
