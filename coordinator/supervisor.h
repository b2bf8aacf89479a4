#ifndef SIMPO_COORDINATOR_SUPERVISOR_H_
#define SIMPO_COORDINATOR_SUPERVISOR_H_

#include <filesystem>

namespace simpo {

// The main function of `simpo-coordinator supervise`: prepares and runs the gang that
// <attempt_dir>/attempt.json describes, sees to it that no process of it is left, and writes
// exit.json. It outlives the coordinator that started it. A second supervisor of the same attempt
// leaves at once. SIGTERM ends the gang: first kindly, then by force. Single-threaded.
// Returns this process's own exit code: 0 when exit.json is written, or when there was nothing to do.
int RunSupervisor(const std::filesystem::path& attempt_dir);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_SUPERVISOR_H_
