#ifndef SIMPO_WORKER_SHARD_HOST_SNAPSHOT_H_
#define SIMPO_WORKER_SHARD_HOST_SNAPSHOT_H_

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/comm/collectives.h"

namespace simpo {

using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

int64_t BytesOf(const NamedTensors& tensors);

// Copies in host memory, which goes back to the system with the last of them.
absl::StatusOr<NamedTensors> CopyToHost(const NamedTensors& tensors);

// Bytes that this host, or this process's control group where that has less, has, and can still give.
int64_t TotalMemory();
int64_t AvailableMemory();

// Ranks that share this rank's host, and so its memory. Collective.
int RanksOnThisHost(Collectives& comm);

}  // namespace simpo

#endif  // SIMPO_WORKER_SHARD_HOST_SNAPSHOT_H_
