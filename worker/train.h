#ifndef SIMPO_WORKER_TRAIN_H_
#define SIMPO_WORKER_TRAIN_H_

#include <atomic>
#include <filesystem>

#include "absl/status/statusor.h"
#include "common/job_config.h"
#include "worker/comm/collectives.h"
#include "worker/coordinator_client.h"
#include "worker/data/prepare.h"
#include "worker/model/model_config.h"
#include "worker/shard/sharded_params.h"

namespace simpo {

// Everything that a run needs, checked and in place before the first collective.
struct TrainOptions {
  JobConfig config;
  std::filesystem::path output_dir;     // absolute
  std::filesystem::path model_dir;      // HF folder
  std::string model_source;             // the folder, or "owner/name, revision main, commit ..." of the hub
  std::filesystem::path tokenizer_dir;  // HF folder
  ModelConfig model;
  PreparedData data;
  bool resume_latest = false;                         // go on from the newest checkpoint of output_dir, if there is one
  const std::atomic<bool>* stop_requested = nullptr;  // set by a signal
  CoordinatorClient* coordinator = nullptr;           // may be null
};

// How the job's parameters are held.
ShardingOptions ShardingOf(const JobConfig& config, const ModelConfig& model);

enum class TrainOutcome { kDone, kStopped };

// Runs the job to its end, or to a stop that was asked for, after a checkpoint. Collective: every
// rank calls it, and all return the same outcome. A Status is a mistake in the job, model or
// checkpoint (the same on every rank); a lost peer or a broken library throws.
absl::StatusOr<TrainOutcome> Train(const TrainOptions& options, Collectives& comm);

}  // namespace simpo

#endif  // SIMPO_WORKER_TRAIN_H_
