#include "coordinator/supervisor.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/atomic_file.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "coordinator/attempt_files.h"
#include "coordinator/file_lock.h"
#include "coordinator/subprocess.h"

namespace simpo {
namespace {

using SteadyClock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kTermGrace{5'000};  // from SIGTERM to SIGKILL
constexpr milliseconds kLookAtLogs{1'000};
constexpr int kCannotStart = 127;  // as a shell says it

int64_t UnixMillis() {
  return std::chrono::duration_cast<milliseconds>(std::chrono::system_clock::now().time_since_epoch()).count();
}

// The signals that the supervisor waits for instead of being interrupted.
sigset_t WatchedSignals() {
  sigset_t set;
  sigemptyset(&set);
  for (int signal : {SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGUSR1}) sigaddset(&set, signal);
  return set;
}

// The next watched signal, or 0 after `timeout`.
int WaitForSignal(milliseconds timeout) {
  const sigset_t set = WatchedSignals();
  const timespec time = {.tv_sec = timeout.count() / 1000, .tv_nsec = (timeout.count() % 1000) * 1'000'000};
  const int signal = sigtimedwait(&set, nullptr, &time);
  return signal < 0 ? 0 : signal;
}

// Collects the ended children; the wait status of `pid` when it is among them.
std::optional<int> Reap(pid_t pid) {
  std::optional<int> found;
  int status = 0;
  for (pid_t ended; (ended = waitpid(-1, &status, WNOHANG)) > 0;) {
    if (ended == pid) found = status;
  }
  return found;
}

// A log that has grown too large begins anew, with a note: a disk that logs have filled stops every job. All who write
// to it append, so they go on at its new end.
void CapLogs(const AttemptSpec& spec) {
  if (spec.log_limit_bytes <= 0) return;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(spec.log_dir, error), end; !error && entry != end;
       entry.increment(error)) {
    if (entry->path().extension() != ".log") continue;
    const int fd = open(entry->path().c_str(), O_WRONLY | O_APPEND | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    struct stat info = {};
    if (fd >= 0 && fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && info.st_size > spec.log_limit_bytes &&
        ftruncate(fd, 0) == 0) {
      const std::string note = absl::StrCat("simpo: this log had grown to ", info.st_size,
                                            " bytes; it begins anew here (log_limit_mb of the coordinator)\n");
      if (write(fd, note.data(), note.size()) < 0) LOG_WARNING("cannot write to a log");
    }
    if (fd >= 0) close(fd);
  }
}

void Signal(const std::vector<pid_t>& processes, int signal) {
  for (pid_t pid : processes) kill(pid, signal);
}

// Runs one program to its end. Orphans of it become children of this process (see PR_SET_CHILD_SUBREAPER)
// and are not waited for here.
class Stage {
 public:
  explicit Stage(const AttemptSpec& spec) : spec_(spec) {}

  int Run(const std::vector<std::string>& command, const std::map<std::string, std::string>& environment) {
    const absl::StatusOr<pid_t> pid = SpawnInNewGroup(command, environment);
    if (!pid.ok()) {
      LOG_ERROR(std::string(pid.status().message()));
      return kCannotStart;
    }
    while (true) {
      const int signal = WaitForSignal(milliseconds(200));
      if (const std::optional<int> status = Reap(*pid)) return ExitCodeOfWaitStatus(*status);
      if (SteadyClock::now() >= look_at_logs_) {
        CapLogs(spec_);
        look_at_logs_ = SteadyClock::now() + kLookAtLogs;
      }
      if (signal == SIGTERM || signal == SIGINT || signal == SIGHUP) {
        terminated_ = true;
        if (!kill_at_) kill_at_ = SteadyClock::now() + kTermGrace;
        kill(-*pid, SIGTERM);
      } else if (signal == SIGUSR1) {
        kill(*pid, SIGUSR1);  // mpirun passes it on to the ranks
      }
      if (kill_at_ && SteadyClock::now() >= *kill_at_) {
        // Where they cannot be listed now, they are the next time.
        if (const auto left = Descendants(getpid()); left.ok()) Signal(*left, SIGKILL);
      }
    }
  }
  // SIGTERM has come.
  bool terminated() const { return terminated_; }

 private:
  const AttemptSpec& spec_;
  SteadyClock::time_point look_at_logs_;
  bool terminated_ = false;
  std::optional<SteadyClock::time_point> kill_at_;
};

// Ends whatever the gang has left behind, and waits until it is gone.
void SweepDescendants() {
  const SteadyClock::time_point kill_at = SteadyClock::now() + kTermGrace;
  for (bool asked = false;;) {
    Reap(/*pid=*/-1);
    const absl::StatusOr<std::vector<pid_t>> left = Descendants(getpid());
    if (left.ok() && left->empty()) return;
    const bool force = SteadyClock::now() >= kill_at;
    if (left.ok() && (!asked || force)) {
      Signal(*left, force ? SIGKILL : SIGTERM);
      asked = true;
    }
    WaitForSignal(milliseconds(50));
  }
}

std::map<std::string, std::string> GangEnvironment(const AttemptFiles& files, const AttemptSpec& spec,
                                                   const std::string& scratch) {
  return {
      {"OMP_NUM_THREADS", absl::StrCat(spec.threads_per_rank)},
      {kSecretFileVariable, files.Secret().string()},
      {"OMPI_ALLOW_RUN_AS_ROOT", "1"},
      {"OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"},
      {"OMPI_MCA_btl_vader_single_copy_mechanism", "none"},
      {"OMPI_MCA_btl_vader_backing_directory", scratch},
      {"OMPI_MCA_orte_tmpdir_base", scratch},
      {"OMPI_MCA_rmaps_base_oversubscribe", "1"},
      {"OMPI_MCA_hwloc_base_binding_policy", "none"},
      // A waiting rank gives its core away; other gangs and the threads of its neighbours need it.
      {"OMPI_MCA_mpi_yield_when_idle", "1"},
  };
}

std::vector<std::string> PrepareCommand(const AttemptFiles& files, const AttemptSpec& spec) {
  return {spec.worker, "--job", files.Job().string(), "prepare"};
}

std::vector<std::string> GangCommand(const AttemptFiles& files, const AttemptSpec& spec) {
  std::vector<std::string> command = {spec.mpirun,
                                      "--bind-to",
                                      "none",
                                      "--oversubscribe",
                                      "--allow-run-as-root",
                                      "-n",
                                      absl::StrCat(spec.ranks),
                                      spec.worker,
                                      "--job",
                                      files.Job().string(),
                                      "--coordinator",
                                      spec.coordinator,
                                      "--coordinator-file",
                                      files.Address().string(),
                                      "--job-id",
                                      spec.job_id,
                                      "--attempt",
                                      absl::StrCat(spec.attempt),
                                      "--log-dir",
                                      spec.log_dir,
                                      "--output-dir",
                                      spec.output_dir};
  if (spec.resume_latest) command.push_back("--resume-latest");
  return command;
}

// Both stages. What it returns is what exit.json says.
AttemptExit RunStages(const AttemptFiles& files, const AttemptSpec& spec, const std::string& scratch) {
  const auto environment = GangEnvironment(files, spec, scratch);

  Stage stage(spec);
  AttemptExit exit{.phase = "prepare"};
  exit.exit_code = stage.Run(PrepareCommand(files, spec), environment);
  if (exit.exit_code == 0 && stage.terminated()) exit.exit_code = 128 + SIGTERM;
  if (exit.exit_code == 0) {
    exit.phase = "train";
    if (const absl::Status status = WriteFileAtomically(files.Gang(), ""); !status.ok()) {
      LOG_ERROR(std::string(status.message()));
    }
    exit.exit_code = stage.Run(GangCommand(files, spec), environment);
  }
  SweepDescendants();
  RemoveScratch(files);
  exit.time_ms = UnixMillis();
  return exit;
}

absl::Status Supervise(const AttemptFiles& files) {
  const absl::StatusOr<FileLock> lock = FileLock::Acquire(files.Lock());
  if (absl::IsAlreadyExists(lock.status())) return absl::OkStatus();  // another one is at it
  if (!lock.ok()) return lock.status();
  std::error_code error;
  const bool was_one = std::filesystem::exists(files.Supervisor(), error);
  if (error) return absl::UnavailableError(absl::StrCat("cannot look at ", files.dir.string(), ": ", error.message()));
  if (was_one) return absl::OkStatus();
  SIMPO_ASSIGN_OR_RETURN(const AttemptSpec spec, ReadAttemptSpec(files));
  SIMPO_ASSIGN_OR_RETURN(const ProcessIdentity self, IdentifyProcess(getpid()));
  RemoveScratch(files);  // of one that came no further than the next line
  SIMPO_ASSIGN_OR_RETURN(const std::filesystem::path scratch, MakeScratch(files, spec));
  SIMPO_RETURN_IF_ERROR(WriteSupervisor(files, self));
  const AttemptExit exit = RunStages(files, spec, scratch.string());
  LOG_INFO(absl::StrCat("job ", spec.job_id, ", attempt ", spec.attempt, ": ended in ", exit.phase, " with exit code ",
                        exit.exit_code));
  return WriteExit(files, exit);
}

}  // namespace

int RunSupervisor(const std::filesystem::path& attempt_dir) {
  const sigset_t signals = WatchedSignals();
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  prctl(PR_SET_CHILD_SUBREAPER, 1);
  const absl::Status status = Supervise(AttemptFiles{attempt_dir});
  if (status.ok()) return 0;
  LOG_ERROR(absl::StrCat("supervisor of ", attempt_dir.string(), ": ", std::string(status.message())));
  return 1;
}

}  // namespace simpo
