#ifndef SIMPO_COORDINATOR_SUBPROCESS_H_
#define SIMPO_COORDINATOR_SUBPROCESS_H_

#include <sys/types.h>

#include <chrono>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace simpo {

// A process that cannot be mistaken for a later one with the same number.
struct ProcessIdentity {
  pid_t pid = 0;
  unsigned long long start_time = 0;  // clock ticks after boot, from /proc/<pid>/stat
  std::string boot_id;                // of the machine's current run
  bool operator==(const ProcessIdentity&) const = default;
};

// In what follows NOT_FOUND means that there is no such process any more (it may wait to be reaped), and any other
// error that this cannot be told at the moment, as when too many files are open.
absl::StatusOr<std::string> BootId();
absl::StatusOr<ProcessIdentity> IdentifyProcess(pid_t pid);
// Since its start, of a process of the machine's current run.
std::chrono::milliseconds Age(const ProcessIdentity& identity);

// Sends a signal to a process, and never to a later one with the same number.
absl::Status SignalProcess(const ProcessIdentity& identity, int signal);

// Starts a program in a session of its own, with its output appended to `log`, no input, and no
// other open files. Returns its pid; it becomes a child of the caller.
absl::StatusOr<pid_t> SpawnInNewSession(const std::vector<std::string>& command, const std::filesystem::path& log);

// Starts a program in a process group of its own, with the caller's output and these additions to
// its environment.
absl::StatusOr<pid_t> SpawnInNewGroup(const std::vector<std::string>& command,
                                      const std::map<std::string, std::string>& environment);

// Children, their children and so on, of a process; without those that have ended.
absl::StatusOr<std::vector<pid_t>> Descendants(pid_t ancestor);

// Processes of this user whose environment holds name=value.
absl::StatusOr<std::vector<pid_t>> ProcessesWithEnvironment(const std::string& name, const std::string& value);

// Sends a signal to each of them, and never to a later process with the same number. An error: some may not have got
// it.
absl::Status SignalProcessesWithEnvironment(const std::string& name, const std::string& value, int signal);

// As a shell says it: the exit code, or 128 + n after signal n. `status` is from waitpid.
int ExitCodeOfWaitStatus(int status);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_SUBPROCESS_H_
