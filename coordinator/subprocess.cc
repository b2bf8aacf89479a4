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
#include <fstream>
#include <set>
#include <sstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

extern char** environ;

namespace simpo {
namespace {

namespace fs = std::filesystem;

struct ProcessStat {
  char state = 0;
  pid_t parent = 0;
  unsigned long long start_time = 0;
};

// Fields 3, 4 and 22 of /proc/<pid>/stat; see proc(5). The name in field 2 may hold anything.
std::optional<ProcessStat> ReadStat(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  // A process that ends in between makes the read fail: getline then has nothing, where an iterator throws.
  std::string line;
  std::getline(file, line, '\0');
  const size_t name_end = line.rfind(')');
  if (name_end == std::string::npos) return std::nullopt;
  std::istringstream fields(line.substr(name_end + 1));
  ProcessStat stat;
  fields >> stat.state >> stat.parent;
  std::string skipped;
  for (int field = 5; field < 22; ++field) fields >> skipped;
  fields >> stat.start_time;
  if (!fields) return std::nullopt;
  return stat;
}

std::vector<pid_t> AllProcesses() {
  std::vector<pid_t> pids;
  std::error_code error;
  for (fs::directory_iterator entry("/proc", error), end; !error && entry != end; entry.increment(error)) {
    pid_t pid = 0;
    if (absl::SimpleAtoi(entry->path().filename().string(), &pid)) pids.push_back(pid);
  }
  return pids;
}

// Holds on to a process, so that what is found out about its number after that is about this process, or it has ended.
class ProcessHandle {
 public:
  explicit ProcessHandle(pid_t pid) : pid_(pid), fd_(static_cast<int>(syscall(SYS_pidfd_open, pid, 0))) {
    // Kernels before 5.3 have no such thing, only the number.
    by_number_ = fd_ < 0 && errno == ENOSYS;
  }
  ~ProcessHandle() {
    if (fd_ >= 0) close(fd_);
  }
  ProcessHandle(const ProcessHandle&) = delete;
  ProcessHandle& operator=(const ProcessHandle&) = delete;
  void Signal(int signal) const {
    if (fd_ >= 0) syscall(SYS_pidfd_send_signal, fd_, signal, nullptr, 0);
    if (by_number_) kill(pid_, signal);
  }

 private:
  const pid_t pid_;
  const int fd_;
  bool by_number_ = false;
};

bool HasInEnvironment(pid_t pid, const std::string& wanted) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/environ"));
  for (std::string variable; std::getline(file, variable, '\0');) {
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

std::string BootId() {
  std::string id;
  std::ifstream("/proc/sys/kernel/random/boot_id") >> id;
  return id;
}

std::optional<ProcessIdentity> IdentifyProcess(pid_t pid) {
  const std::optional<ProcessStat> stat = ReadStat(pid);
  if (!stat || stat->state == 'Z' || stat->state == 'X') return std::nullopt;
  return ProcessIdentity{.pid = pid, .start_time = stat->start_time, .boot_id = BootId()};
}

bool IsAlive(const ProcessIdentity& identity) { return IdentifyProcess(identity.pid) == identity; }

bool SignalProcess(const ProcessIdentity& identity, int signal) {
  const ProcessHandle process(identity.pid);
  if (!IsAlive(identity)) return false;
  process.Signal(signal);
  return true;
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
  posix_spawn_file_actions_addopen(&settings.actions, STDOUT_FILENO, log.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0644);
  posix_spawn_file_actions_adddup2(&settings.actions, STDOUT_FILENO, STDERR_FILENO);
  posix_spawn_file_actions_addclosefrom_np(&settings.actions, STDERR_FILENO + 1);
  posix_spawnattr_setflags(&settings.attributes, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  return Spawn(command, environ, settings);
}

absl::StatusOr<pid_t> SpawnInNewGroup(const std::vector<std::string>& command,
                                      const std::map<std::string, std::string>& environment) {
  std::vector<std::string> variables;
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

std::vector<pid_t> Descendants(pid_t ancestor) {
  std::multimap<pid_t, pid_t> children;  // of each parent
  std::set<pid_t> ended;
  for (pid_t pid : AllProcesses()) {
    const std::optional<ProcessStat> stat = ReadStat(pid);
    if (!stat) continue;
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

std::vector<pid_t> ProcessesWithEnvironment(const std::string& name, const std::string& value) {
  const std::string wanted = absl::StrCat(name, "=", value);
  std::vector<pid_t> found;
  for (pid_t pid : AllProcesses()) {
    if (HasInEnvironment(pid, wanted)) found.push_back(pid);
  }
  return found;
}

void SignalProcessesWithEnvironment(const std::string& name, const std::string& value, int signal) {
  const std::string wanted = absl::StrCat(name, "=", value);
  for (pid_t pid : ProcessesWithEnvironment(name, value)) {
    if (const ProcessHandle process(pid); HasInEnvironment(pid, wanted)) process.Signal(signal);
  }
}

int ExitCodeOfWaitStatus(int status) { return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status); }

}  // namespace simpo
