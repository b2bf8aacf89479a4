#include "coordinator/subprocess.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <set>
#include <sstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "absl/strings/strip.h"
#include "common/file_system.h"
#include "common/status_macros.h"

extern char** environ;

namespace simpo {
namespace {

namespace fs = std::filesystem;

struct ProcessStat {
  char state = 0;
  pid_t parent = 0;
  unsigned long long start_time = 0;
};

// A file of the kernel's. NOT_FOUND: it has gone, with its process.
absl::StatusOr<std::string> ReadProcFile(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  std::string content;
  ssize_t got = fd < 0 ? -1 : 1;
  while (got > 0) {
    char buffer[4096];
    got = read(fd, buffer, sizeof(buffer));
    if (got > 0) content.append(buffer, static_cast<size_t>(got));
  }
  const int error = got < 0 ? errno : 0;
  if (fd >= 0) close(fd);
  if (error == 0) return content;
  // A process that ends in between lets its file be opened and not be read.
  if (error == ESRCH) return absl::NotFoundError(absl::StrCat(path, " has gone"));
  errno = error;
  return ErrnoStatus("read", path);
}

// Fields 3, 4 and 22 of /proc/<pid>/stat; see proc(5). The name in field 2 may hold anything.
absl::StatusOr<ProcessStat> ReadStat(pid_t pid) {
  SIMPO_ASSIGN_OR_RETURN(const std::string line, ReadProcFile(absl::StrCat("/proc/", pid, "/stat")));
  const size_t name_end = line.rfind(')');
  if (name_end == std::string::npos) return absl::NotFoundError(absl::StrCat("process ", pid, " has gone"));
  std::istringstream fields(line.substr(name_end + 1));
  ProcessStat stat;
  fields >> stat.state >> stat.parent;
  std::string skipped;
  for (int field = 5; field < 22; ++field) fields >> skipped;
  fields >> stat.start_time;
  if (!fields) return absl::InternalError(absl::StrCat("/proc/", pid, "/stat does not have 22 fields"));
  return stat;
}

absl::StatusOr<std::vector<pid_t>> AllProcesses() {
  std::vector<pid_t> pids;
  std::error_code error;
  for (fs::directory_iterator entry("/proc", error), end; !error && entry != end; entry.increment(error)) {
    pid_t pid = 0;
    if (absl::SimpleAtoi(entry->path().filename().string(), &pid)) pids.push_back(pid);
  }
  if (error) return absl::UnavailableError(absl::StrCat("cannot list the processes in /proc: ", error.message()));
  return pids;
}

// Holds on to a process, so that what is found out about its number after that is about this process, or it has ended.
class ProcessHandle {
 public:
  explicit ProcessHandle(pid_t pid) : pid_(pid), fd_(static_cast<int>(syscall(SYS_pidfd_open, pid, 0))) {
    error_ = fd_ < 0 ? errno : 0;
  }
  ~ProcessHandle() {
    if (fd_ >= 0) close(fd_);
  }
  ProcessHandle(const ProcessHandle&) = delete;
  ProcessHandle& operator=(const ProcessHandle&) = delete;
  absl::Status Signal(int signal) const {
    // Kernels before 5.3 have no such thing, and some containers forbid it; there is only the number.
    const bool by_number = error_ == ENOSYS || error_ == EPERM;
    int error = error_;
    if (fd_ >= 0) error = syscall(SYS_pidfd_send_signal, fd_, signal, nullptr, 0) == 0 ? 0 : errno;
    if (by_number) error = kill(pid_, signal) == 0 ? 0 : errno;
    if (error == 0) return absl::OkStatus();
    if (error == ESRCH) return absl::NotFoundError(absl::StrCat("process ", pid_, " has gone"));
    return absl::UnavailableError(absl::StrCat("cannot signal process ", pid_, ": ", std::strerror(error)));
  }

 private:
  const pid_t pid_;
  const int fd_;
  int error_ = 0;
};

absl::StatusOr<bool> HasInEnvironment(pid_t pid, const std::string& wanted) {
  const absl::StatusOr<std::string> text = ReadProcFile(absl::StrCat("/proc/", pid, "/environ"));
  // Those of other users cannot be read.
  if (absl::IsNotFound(text.status()) || absl::IsPermissionDenied(text.status())) return false;
  if (!text.ok()) return text.status();
  for (const absl::string_view variable : absl::StrSplit(*text, '\0')) {
    if (variable == wanted) return true;
  }
  return false;
}

// posix_spawn's settings, released at the end of the scope.
struct SpawnSettings {
  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;
  SpawnSettings() {
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attributes);
    // The caller may block signals; its children begin with none blocked or ignored.
    sigset_t none, all;
    sigemptyset(&none);
    sigfillset(&all);
    posix_spawnattr_setsigmask(&attributes, &none);
    posix_spawnattr_setsigdefault(&attributes, &all);
  }
  ~SpawnSettings() {
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
  }
};

absl::StatusOr<pid_t> Spawn(const std::vector<std::string>& command, char** environment, SpawnSettings& settings) {
  std::vector<char*> argv;
  argv.reserve(command.size() + 1);
  for (const std::string& argument : command) argv.push_back(const_cast<char*>(argument.c_str()));
  argv.push_back(nullptr);
  pid_t pid = 0;
  const int error = posix_spawnp(&pid, argv[0], &settings.actions, &settings.attributes, argv.data(), environment);
  if (error != 0) {
    return absl::UnavailableError(absl::StrCat("cannot start ", command[0], ": ", std::strerror(error)));
  }
  return pid;
}

}  // namespace

absl::StatusOr<std::string> BootId() {
  SIMPO_ASSIGN_OR_RETURN(std::string id, ReadProcFile("/proc/sys/kernel/random/boot_id"));
  absl::StripTrailingAsciiWhitespace(&id);
  return id;
}

absl::StatusOr<ProcessIdentity> IdentifyProcess(pid_t pid) {
  SIMPO_ASSIGN_OR_RETURN(const ProcessStat stat, ReadStat(pid));
  if (stat.state == 'Z' || stat.state == 'X') return absl::NotFoundError(absl::StrCat("process ", pid, " has ended"));
  const absl::StatusOr<std::string> boot_id = BootId();
  if (!boot_id.ok()) return absl::UnavailableError(std::string(boot_id.status().message()));
  return ProcessIdentity{.pid = pid, .start_time = stat.start_time, .boot_id = *boot_id};
}

absl::Status SignalProcess(const ProcessIdentity& identity, int signal) {
  const ProcessHandle process(identity.pid);
  SIMPO_ASSIGN_OR_RETURN(const ProcessIdentity now, IdentifyProcess(identity.pid));
  if (now != identity) return absl::NotFoundError(absl::StrCat("process ", identity.pid, " is a later one"));
  return process.Signal(signal);
}

std::chrono::milliseconds Age(const ProcessIdentity& identity) {
  timespec since_boot = {};
  clock_gettime(CLOCK_BOOTTIME, &since_boot);
  const int64_t now_ms = int64_t{since_boot.tv_sec} * 1000 + since_boot.tv_nsec / 1'000'000;
  const int64_t begun_ms = static_cast<int64_t>(identity.start_time) * 1000 / sysconf(_SC_CLK_TCK);
  return std::chrono::milliseconds(std::max<int64_t>(0, now_ms - begun_ms));
}

absl::StatusOr<pid_t> SpawnInNewSession(const std::vector<std::string>& command, const fs::path& log) {
  SpawnSettings settings;
  posix_spawn_file_actions_addopen(&settings.actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  // A job may have put a link or a pipe in its place: the one is not followed, for the other nobody waits.
  constexpr int kFlags = O_WRONLY | O_CREAT | O_APPEND | O_NOFOLLOW | O_NONBLOCK;
  posix_spawn_file_actions_addopen(&settings.actions, STDOUT_FILENO, log.c_str(), kFlags, 0644);
  posix_spawn_file_actions_adddup2(&settings.actions, STDOUT_FILENO, STDERR_FILENO);
  posix_spawn_file_actions_addclosefrom_np(&settings.actions, STDERR_FILENO + 1);
  posix_spawnattr_setflags(&settings.attributes, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  return Spawn(command, environ, settings);
}

absl::StatusOr<pid_t> SpawnInNewGroup(const std::vector<std::string>& command,
                                      const std::map<std::string, std::string>& environment) {
  std::vector<std::string> variables;
  variables.reserve(environment.size());
  for (const auto& [name, value] : environment) variables.push_back(absl::StrCat(name, "=", value));
  std::vector<char*> envp;
  for (char** variable = environ; *variable != nullptr; ++variable) {
    const std::string text = *variable;
    if (!environment.contains(text.substr(0, text.find('=')))) envp.push_back(*variable);
  }
  for (std::string& variable : variables) envp.push_back(variable.data());
  envp.push_back(nullptr);
  SpawnSettings settings;
  posix_spawnattr_setpgroup(&settings.attributes, 0);
  posix_spawnattr_setflags(&settings.attributes,
                           POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  return Spawn(command, envp.data(), settings);
}

absl::StatusOr<std::vector<pid_t>> Descendants(pid_t ancestor) {
  std::multimap<pid_t, pid_t> children;  // of each parent
  std::set<pid_t> ended;
  SIMPO_ASSIGN_OR_RETURN(const std::vector<pid_t> all, AllProcesses());
  for (pid_t pid : all) {
    const absl::StatusOr<ProcessStat> stat = ReadStat(pid);
    if (absl::IsNotFound(stat.status())) continue;
    if (!stat.ok()) return stat.status();
    children.emplace(stat->parent, pid);
    if (stat->state == 'Z' || stat->state == 'X') ended.insert(pid);
  }
  std::vector<pid_t> found, pending = {ancestor};
  while (!pending.empty()) {
    const pid_t parent = pending.back();
    pending.pop_back();
    for (auto [child, end] = children.equal_range(parent); child != end; ++child) {
      pending.push_back(child->second);
      if (!ended.contains(child->second)) found.push_back(child->second);
    }
  }
  return found;
}

absl::StatusOr<std::vector<pid_t>> ProcessesWithEnvironment(const std::string& name, const std::string& value) {
  const std::string wanted = absl::StrCat(name, "=", value);
  std::vector<pid_t> found;
  SIMPO_ASSIGN_OR_RETURN(const std::vector<pid_t> all, AllProcesses());
  for (pid_t pid : all) {
    SIMPO_ASSIGN_OR_RETURN(const bool has, HasInEnvironment(pid, wanted));
    if (has) found.push_back(pid);
  }
  return found;
}

absl::Status SignalProcessesWithEnvironment(const std::string& name, const std::string& value, int signal) {
  const std::string wanted = absl::StrCat(name, "=", value);
  SIMPO_ASSIGN_OR_RETURN(const std::vector<pid_t> found, ProcessesWithEnvironment(name, value));
  absl::Status result;
  for (pid_t pid : found) {
    const ProcessHandle process(pid);
    const absl::StatusOr<bool> still = HasInEnvironment(pid, wanted);
    const absl::Status status = still.ok() && *still ? process.Signal(signal) : still.status();
    if (!absl::IsNotFound(status)) result.Update(status);
  }
  return result;
}

int ExitCodeOfWaitStatus(int status) { return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status); }

}  // namespace simpo
