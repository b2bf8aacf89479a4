#ifndef SIMPO_WORKER_SHARD_CHECKPOINT_H_
#define SIMPO_WORKER_SHARD_CHECKPOINT_H_

#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/comm/collectives.h"
#include "worker/shard/checkpoint_manifest.h"
#include "worker/shard/sharded_params.h"

namespace simpo {

// Writes checkpoints_dir/step-000120: every rank its shard, then rank 0 the manifest with a SHA-256
// per file; all of it in a folder of another name that is renamed when it is whole and on disk. A
// checkpoint of that step that is already there is replaced. Collective; an error on any rank is an
// error on all. Format: docs/checkpoint_format.md. Returns the folder.
absl::StatusOr<std::filesystem::path> SaveCheckpoint(const std::filesystem::path& checkpoints_dir,
                                                     const ShardedParams& params, const TrainerState& state,
                                                     Collectives& comm);

// The newest whole checkpoint, every file checked against the manifest; nullopt when there is none.
// What was passed over, and why, is added to `skipped` (may be null).
absl::StatusOr<std::optional<std::filesystem::path>> LatestCheckpoint(const std::filesystem::path& checkpoints_dir,
                                                                      std::vector<std::string>* skipped);

// Fills masters, moments and weights from a checkpoint that any number of ranks wrote. Collective.
// INVALID_ARGUMENT names the first tensor that the model and the checkpoint do not share, with both
// shapes; DATA_LOSS names a damaged file. After an error `params` must not be used.
absl::StatusOr<TrainerState> LoadCheckpoint(const std::filesystem::path& path, ShardedParams& params,
                                            Collectives& comm);

// Removes all but the newest `keep` checkpoints (0: removes none), never those of `protect`.
absl::Status PruneCheckpoints(const std::filesystem::path& checkpoints_dir, int keep,
                              std::span<const std::filesystem::path> protect);

}  // namespace simpo

#endif  // SIMPO_WORKER_SHARD_CHECKPOINT_H_
