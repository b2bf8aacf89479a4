#ifndef SIMPO_COORDINATOR_LAUNCHER_MPIRUN_H_
#define SIMPO_COORDINATOR_LAUNCHER_MPIRUN_H_

#include <filesystem>
#include <map>
#include <string>
#include <utility>

#include "coordinator/launcher.h"

namespace simpo {

// Gangs on this machine: each attempt has a folder under `attempts_dir` and a supervisor process that
// runs `worker prepare` and then mpirun (see supervisor.h).
class MpirunLauncher final : public Launcher {
 public:
  struct Options {
    std::filesystem::path attempts_dir;  // absolute
    std::string supervisor;              // this program; started as `<supervisor> supervise ...`
    std::string worker;
    std::string mpirun = "mpirun";
    std::string coordinator_address;  // HOST:PORT
    int64_t log_limit_bytes = 0;      // of each log file of an attempt; 0: no limit
    std::string ca, tls_name;         // by which ranks check the coordinator (absolute path; name); empty: no TLS
  };
  explicit MpirunLauncher(Options options) : options_(std::move(options)) {}

  absl::StatusOr<bool> Start(const GangRequest& request) override;
  GangStatus Poll(const std::string& job_id, int attempt) override;
  std::optional<std::chrono::milliseconds> RunsFor(const std::string& job_id, int attempt) override;
  absl::Status Terminate(const std::string& job_id, int attempt) override;
  absl::Status Kill(const std::string& job_id, int attempt) override;
  absl::StatusOr<std::string> ReadSecret(const std::string& job_id, int attempt) override;
  absl::Status PublishAddress(const std::string& job_id, int attempt) override;
  void Forget(const std::string& job_id) override;
  void Sweep(const std::function<bool(const std::string& job_id)>& is_live) override;

 private:
  // What ranks read before they connect: address, authority and name, a line each.
  std::string AddressText() const;
  AttemptFiles Files(const std::string& job_id, int attempt) const;
  absl::Status WriteFiles(const AttemptFiles& files, const GangRequest& request) const;
  // As Poll; an error where it cannot be looked at.
  absl::StatusOr<GangStatus> Look(const std::string& job_id, int attempt);
  absl::Status EndAttempts(const std::string& job_id);
  // Whether the supervisor of this attempt is a child of ours that still runs. Reaps it.
  bool ChildRuns(const std::string& job_id, int attempt);

  const Options options_;
  std::map<std::pair<std::string, int>, pid_t> children_;
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_LAUNCHER_MPIRUN_H_
