#ifndef SIMPO_WORKER_SHARD_AGREE_ON_H_
#define SIMPO_WORKER_SHARD_AGREE_ON_H_

#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "worker/comm/collectives.h"

namespace simpo {

// Makes one rank's error everybody's, so that no rank goes on alone into a collective. OK when
// every rank's `mine` is OK; else each failed rank's own error, and on the others an error of the
// first failed rank's code that names this rank, `what` ("writing the checkpoint") and its reason.
// Collective.
absl::Status AgreeOn(const absl::Status& mine, Collectives& comm, std::string_view what);

// The text that rank `root` holds, on every rank; at most 4096 bytes of it. Collective.
std::string BroadcastText(const std::string& text, int root, Collectives& comm);

}  // namespace simpo

#endif  // SIMPO_WORKER_SHARD_AGREE_ON_H_
