#ifndef SIMPO_COORDINATOR_ATTEMPT_FILES_H_
#define SIMPO_COORDINATOR_ATTEMPT_FILES_H_

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/subprocess.h"

namespace simpo {

// The folder of one attempt: what the coordinator and the supervisor, which may outlive each other,
// tell each other by.
struct AttemptFiles {
  std::filesystem::path dir;

  std::filesystem::path Spec() const { return dir / "attempt.json"; }            // AttemptSpec
  std::filesystem::path Job() const { return dir / "job.yaml"; }                 // the job, every default filled in
  std::filesystem::path Secret() const { return dir / "secret"; }                // 0600; the ranks' right to report
  std::filesystem::path Address() const { return dir / "coordinator_address"; }  // of the coordinator now
  std::filesystem::path Lock() const { return dir / "lock"; }                    // held by the supervisor
  std::filesystem::path Supervisor() const { return dir / "supervisor.json"; }   // ProcessIdentity
  std::filesystem::path Scratch() const { return dir / "scratch"; }              // names the folder; see MakeScratch
  std::filesystem::path Gang() const { return dir / "gang_started"; }            // exists once mpirun runs
  std::filesystem::path Exit() const { return dir / "exit.json"; }               // AttemptExit; the last to be written
};

// What the supervisor is to start.
struct AttemptSpec {
  std::string job_id;
  int attempt = 1;
  int ranks = 1;
  int threads_per_rank = 1;
  bool resume_latest = false;
  std::string worker;  // programs
  std::string mpirun;
  std::string log_dir;          // absolute
  std::string output_dir;       // absolute
  std::string coordinator;      // HOST:PORT
  int64_t log_limit_bytes = 0;  // of each log file; 0: no limit
};

// How an attempt ended.
struct AttemptExit {
  int exit_code = 0;    // 128 + n after signal n
  std::string phase;    // prepare, train
  int64_t time_ms = 0;  // Unix time
};

absl::Status WriteAttemptSpec(const AttemptFiles& files, const AttemptSpec& spec);
absl::StatusOr<AttemptSpec> ReadAttemptSpec(const AttemptFiles& files);
absl::Status WriteSupervisor(const AttemptFiles& files, const ProcessIdentity& identity);
// NOT_FOUND when it is not there yet.
absl::StatusOr<ProcessIdentity> ReadSupervisor(const AttemptFiles& files);
absl::Status WriteExit(const AttemptFiles& files, const AttemptExit& exit);
absl::StatusOr<AttemptExit> ReadExit(const AttemptFiles& files);

// A new folder that only this user may use, where the attempt's processes keep what must not outlive them, such as
// shared memory segments. Nobody can know its name before and lay something of their own there.
absl::StatusOr<std::filesystem::path> MakeScratch(const AttemptFiles& files, const AttemptSpec& spec);
// With all that is in it; also one that an earlier process has made for this attempt.
void RemoveScratch(const AttemptFiles& files);

// The name of the variable by which an attempt's processes are known; its value is Secret().
inline constexpr char kSecretFileVariable[] = "SIMPO_ATTEMPT_SECRET_FILE";

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_ATTEMPT_FILES_H_
