#ifndef SIMPO_WORKER_SHARD_CHECKPOINT_WRITER_H_
#define SIMPO_WORKER_SHARD_CHECKPOINT_WRITER_H_

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "worker/comm/collectives.h"
#include "worker/shard/checkpoint_manifest.h"
#include "worker/shard/export_hf.h"
#include "worker/shard/host_snapshot.h"
#include "worker/shard/sharded_params.h"

namespace simpo {

// Writes one checkpoint at a time, of which training sees the copy into host memory only:
//   Begin   every rank copies its shard; a thread of its own writes, hashes and syncs the copy
//   ...     training goes on; at each step the ranks tell each other shard_done()
//   Finish  once it is true of all: rank 0 writes the manifest, with a SHA-256 per file, and renames
//           the folder from step-000120.partial to step-000120
// The thread makes no collective call. Begin and Finish are collective; an error on any rank is an
// error on all, and leaves the checkpoints that were there. Format: docs/checkpoint_format.md.
class CheckpointWriter {
 public:
  struct Options {
    std::filesystem::path checkpoints_dir;
    HfFiles hf_files;  // rank 0's are written beside the shards, for a later export
    std::function<int64_t()> available_memory = AvailableMemory;
  };
  // What a checkpoint has cost this rank.
  struct Report {
    std::filesystem::path path;
    int64_t bytes = 0;           // of this rank's shard
    bool in_background = false;  // as asked, unless memory was short
    double blocked_seconds = 0;  // training stood still
    double writing_seconds = 0;  // writing, hashing and syncing the shard
  };

  CheckpointWriter(Options options, Collectives& comm);  // collective
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;
  ~CheckpointWriter();  // what is under way is given up

  // None may be under way. Without `in_background`, or where memory is short, the shard is written
  // when this returns.
  absl::Status Begin(const ShardedParams& params, const TrainerState& state, bool in_background);
  bool under_way() const { return under_way_; }
  // This rank's shard is written, or has failed: Finish would not wait for it.
  bool shard_done() const { return under_way_ && shard_done_; }
  // Waits for the shards where they are not done.
  absl::StatusOr<Report> Finish();

 private:
  absl::Status StartFolders();
  void WriteFiles();
  absl::Status WriteShard();
  absl::Status Publish(const std::vector<std::string>& digests);

  const Options options_;
  Collectives& comm_;
  const int ranks_on_host_;

  bool under_way_ = false;
  CheckpointManifest manifest_;  // rank 0's thread adds the HF files, Finish the shards
  Report report_;
  NamedTensors tensors_;  // what is being written
  std::thread thread_;
  // The thread's, until it is joined.
  absl::Status shard_status_;
  std::string digest_;
  std::atomic<bool> shard_done_ = false;
  std::atomic<bool> given_up_ = false;
};

}  // namespace simpo

#endif  // SIMPO_WORKER_SHARD_CHECKPOINT_WRITER_H_
