#ifndef SIMPO_SIMPOCTL_EXIT_CODES_H_
#define SIMPO_SIMPOCTL_EXIT_CODES_H_

#include <string>

#include "absl/status/status.h"
#include "simpo/v1/job.pb.h"

namespace simpo {

inline constexpr int kExitOk = 0;
inline constexpr int kExitError = 1;
inline constexpr int kExitUsage = 2;
inline constexpr int kExitNotAllowed = 4;
inline constexpr int kExitJobFailed = 100;
inline constexpr int kExitNotFinished = 101;
inline constexpr int kExitNotFound = 102;
inline constexpr int kExitJobCancelled = 103;

// The exit code that tells this error.
int ExitCodeOf(const absl::Status& status);
// The exit code of a command that waited for a job and saw it in this state.
int ExitCodeOf(v1::JobState state);
// The text of `simpoctl help exit-codes`.
std::string ExitCodesHelp();

}  // namespace simpo

#endif  // SIMPO_SIMPOCTL_EXIT_CODES_H_
