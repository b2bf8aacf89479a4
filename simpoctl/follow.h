#ifndef SIMPO_SIMPOCTL_FOLLOW_H_
#define SIMPO_SIMPOCTL_FOLLOW_H_

#include <chrono>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "simpoctl/client.h"

namespace simpo {

struct FollowOptions {
  bool quiet = false;                           // only the end is shown
  std::optional<std::chrono::seconds> timeout;  // none: until the job ends
};

// Follows a job to its end, over restarts of the coordinator: progress to standard error, how it ended
// to standard output. Returns the exit code that tells the end. Ctrl-C and the timeout leave the job
// alone and return kExitNotFinished.
absl::StatusOr<int> FollowJob(Client& client, const std::string& job, const FollowOptions& options);

}  // namespace simpo

#endif  // SIMPO_SIMPOCTL_FOLLOW_H_
