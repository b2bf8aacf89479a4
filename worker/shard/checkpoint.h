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

// The three tensors of a bucket's shard.
inline constexpr const char* kCheckpointParts[] = {"master", "exp_avg", "exp_avg_sq"};

// The folder's name: "step-000120".
std::string CheckpointName(int64_t step);

// CheckpointWriter's Begin and Finish without a background. Returns the folder.
absl::StatusOr<std::filesystem::path> SaveCheckpoint(const std::filesystem::path& checkpoints_dir,
                                                     const ShardedParams& params, const TrainerState& state,
                                                     Collectives& comm);

// The newest whole checkpoint, every file checked against the manifest; nullopt when there is none.
// What was passed over, and why, is added to `skipped` (may be null). Collective: the ranks share the
// checking, and all return the same.
absl::StatusOr<std::optional<std::filesystem::path>> LatestCheckpoint(const std::filesystem::path& checkpoints_dir,
                                                                      Collectives& comm,
                                                                      std::vector<std::string>* skipped);
// The same by one process alone.
absl::StatusOr<std::optional<std::filesystem::path>> LatestCheckpoint(const std::filesystem::path& checkpoints_dir,
                                                                      std::vector<std::string>* skipped);

// Removes what runs that were cut off left half-made.
absl::Status RemovePartials(const std::filesystem::path& checkpoints_dir);

// Fills masters, moments and weights from a checkpoint that any number of ranks wrote. Collective.
// INVALID_ARGUMENT names the first tensor that the model and the checkpoint do not share, with both
// shapes; DATA_LOSS names a damaged file. After an error `params` must not be used.
absl::StatusOr<TrainerState> LoadCheckpoint(const std::filesystem::path& path, ShardedParams& params,
                                            Collectives& comm);

// Removes the oldest checkpoints until `keep` are left (0: removes none), never those of `protect`, which
// count among them.
absl::Status PruneCheckpoints(const std::filesystem::path& checkpoints_dir, int keep,
                              std::span<const std::filesystem::path> protect);

}  // namespace simpo

#endif  // SIMPO_WORKER_SHARD_CHECKPOINT_H_
