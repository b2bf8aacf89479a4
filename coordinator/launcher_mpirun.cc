#include "coordinator/launcher_mpirun.h"

#include <signal.h>
#include <sys/random.h>
#include <sys/wait.h>

#include <array>
#include <fstream>

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
  const fs::path temporary = path.string() + ".tmp";  // one writer; what a killed one has left is written over
  std::ofstream file(temporary, std::ios::binary | std::ios::trunc);
  file << content;
  file.close();
  std::error_code error;
  if (file) fs::rename(temporary, path, error);
  if (file && !error) return absl::OkStatus();
  return absl::UnavailableError(
      absl::StrCat("cannot write ", path.string(), error ? ": " + error.message() : "; is the disk full?"));
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
  if (!fs::exists(files.Secret())) {
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

absl::Status MpirunLauncher::Start(const GangRequest& request) {
  const AttemptFiles files = Files(request.job_id, request.attempt);
  // A coordinator that died after this point has started it. If its supervisor is just about to take
  // the lock, a second one finds it taken and leaves.
  if (fs::exists(files.Supervisor()) || FileLock::IsHeld(files.Lock())) return absl::OkStatus();
  SIMPO_RETURN_IF_ERROR(WriteFiles(files, request));
  SIMPO_ASSIGN_OR_RETURN(const pid_t pid,
                         SpawnInNewSession({options_.supervisor, "supervise", "--attempt-dir", files.dir.string()},
                                           request.log_dir / kLauncherLog));
  children_[{request.job_id, request.attempt}] = pid;
  return absl::OkStatus();
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
  const AttemptFiles files = Files(job_id, attempt);
  // In this order: a supervisor writes exit.json before it ends.
  const bool runs = ChildRuns(job_id, attempt) || FileLock::IsHeld(files.Lock());
  if (runs) {
    if (fs::exists(files.Gang())) return {.phase = GangStatus::Phase::kTraining};
    const bool supervised = fs::exists(files.Supervisor());
    return {.phase = supervised ? GangStatus::Phase::kPreparing : GangStatus::Phase::kStarting};
  }
  const absl::StatusOr<AttemptExit> exit = ReadExit(files);
  if (exit.ok()) return {.phase = GangStatus::Phase::kEnded, .exit = *exit};
  const absl::StatusOr<ProcessIdentity> supervisor = ReadSupervisor(files);
  if (supervisor.ok() && supervisor->boot_id != BootId()) {
    return {.phase = GangStatus::Phase::kLost, .reason = "the machine was restarted"};
  }
  return {.phase = GangStatus::Phase::kLost,
          .reason = supervisor.ok() ? "its supervisor ended without a word (killed, or out of memory)"
                                    : "its supervisor could not begin; see launcher.log"};
}

std::optional<std::chrono::milliseconds> MpirunLauncher::RunsFor(const std::string& job_id, int attempt) {
  const absl::StatusOr<ProcessIdentity> supervisor = ReadSupervisor(Files(job_id, attempt));
  if (!supervisor.ok() || supervisor->boot_id != BootId()) return std::nullopt;
  return Age(*supervisor);
}

void MpirunLauncher::Terminate(const std::string& job_id, int attempt) {
  const absl::StatusOr<ProcessIdentity> supervisor = ReadSupervisor(Files(job_id, attempt));
  if (supervisor.ok()) SignalProcess(*supervisor, SIGTERM);
}

void MpirunLauncher::Kill(const std::string& job_id, int attempt) {
  const AttemptFiles files = Files(job_id, attempt);
  const absl::StatusOr<ProcessIdentity> supervisor = ReadSupervisor(files);
  if (supervisor.ok()) SignalProcess(*supervisor, SIGKILL);
  SignalProcessesWithEnvironment(kSecretFileVariable, files.Secret().string(), SIGKILL);
  if (const absl::StatusOr<AttemptSpec> spec = ReadAttemptSpec(files); spec.ok()) {
    std::error_code error;
    fs::remove_all(ScratchDir(*spec), error);
  }
}

void MpirunLauncher::Forget(const std::string& job_id) {
  std::error_code error;
  fs::remove_all(options_.attempts_dir / job_id, error);
  if (error) {
    LOG_WARNING(absl::StrCat("cannot remove ", (options_.attempts_dir / job_id).string(), ": ", error.message()));
  }
}

void MpirunLauncher::Sweep(const std::function<bool(const std::string& job_id)>& is_live) {
  std::error_code error;
  std::vector<std::string> left;
  for (const auto& entry : fs::directory_iterator(options_.attempts_dir, error)) {
    if (const std::string job_id = entry.path().filename().string(); !is_live(job_id)) left.push_back(job_id);
  }
  for (const std::string& job_id : left) {
    for (const auto& entry : fs::directory_iterator(options_.attempts_dir / job_id, error)) {
      int attempt = 0;
      if (!absl::SimpleAtoi(entry.path().filename().string(), &attempt)) continue;
      if (FileLock::IsHeld(Files(job_id, attempt).Lock())) {
        LOG_WARNING(absl::StrCat("job ", job_id, ", attempt ", attempt, " runs, but is not known here; ending it"));
        Kill(job_id, attempt);
      }
    }
    Forget(job_id);
  }
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
