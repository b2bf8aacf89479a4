#ifndef SIMPO_WORKER_REGISTER_RANK_H_
#define SIMPO_WORKER_REGISTER_RANK_H_

#include <chrono>
#include <string>

#include "absl/status/statusor.h"
#include "worker/coordinator_client.h"

namespace simpo {

// Meets the other ranks of the attempt at the coordinator, which gives each the bytes of rank 0 once all have
// come. A coordinator that is away is tried again until the time is up; the error then says so, or names the
// ranks that are missing.
absl::StatusOr<std::string> RegisterRank(const CoordinatorClient::Options& options, const std::string& of_rank_0,
                                         std::chrono::milliseconds timeout);

}  // namespace simpo

#endif  // SIMPO_WORKER_REGISTER_RANK_H_
