#ifndef SIMPO_COORDINATOR_LAUNCHER_H_
#define SIMPO_COORDINATOR_LAUNCHER_H_

#include <chrono>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/attempt_files.h"

namespace simpo {

// One attempt of a job, as the controller wants it started.
struct GangRequest {
  std::string job_id;
  int attempt = 1;
  int ranks = 1;
  int threads_per_rank = 1;
  std::vector<std::string> nodes;  // that the ranks are spread over, evenly
  bool resume_latest = false;
  std::string job_yaml;
  std::filesystem::path log_dir;
  std::filesystem::path output_dir;
};

// What is known of an attempt's processes.
struct GangStatus {
  // kUnknown: it cannot be looked at now, as when too many files are open. It may run.
  enum class Phase { kStarting, kPreparing, kTraining, kEnded, kLost, kUnknown };
  Phase phase = Phase::kStarting;
  AttemptExit exit;    // with kEnded
  std::string reason;  // with kLost and kUnknown
};

// Starts gangs through an engine that exists already. A gang outlives the coordinator: each function
// takes the attempt's name and finds the rest on disk or at the engine. Called by one thread.
class Launcher {
 public:
  virtual ~Launcher() = default;

  // Starts an attempt and returns true, or finds that it has been started: never starts it twice.
  virtual absl::StatusOr<bool> Start(const GangRequest& request) = 0;
  // Cheap enough to be asked several times a second.
  virtual GangStatus Poll(const std::string& job_id, int attempt) = 0;
  // Since when the attempt's processes are there, by a clock that is never set; nothing where that cannot be told.
  virtual std::optional<std::chrono::milliseconds> RunsFor(const std::string& /*job_id*/, int /*attempt*/) {
    return std::nullopt;
  }
  // Ends the gang without waiting for a checkpoint: kindly, or by force. Poll says when it is gone. An error: it may
  // not have heard of it and must be told again.
  virtual absl::Status Terminate(const std::string& job_id, int attempt) = 0;
  virtual absl::Status Kill(const std::string& job_id, int attempt) = 0;
  // What the attempt's ranks must show to report. NOT_FOUND before Start.
  virtual absl::StatusOr<std::string> ReadSecret(const std::string& job_id, int attempt) = 0;
  // The coordinator's address for ranks that connect again.
  virtual absl::Status PublishAddress(const std::string& job_id, int attempt) = 0;
  // Removes what it keeps of a job's attempts, which have all ended; not their logs.
  virtual void Forget(const std::string& /*job_id*/) {}
  // Ends and removes what is left of any job that `is_live` is not true of.
  virtual void Sweep(const std::function<bool(const std::string& job_id)>& /*is_live*/) {}
};

// In an attempt's log_dir: what the engine itself and the checks before the ranks have printed.
inline constexpr char kLauncherLog[] = "launcher.log";

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_LAUNCHER_H_
