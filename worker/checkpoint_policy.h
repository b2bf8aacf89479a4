#ifndef SIMPO_WORKER_CHECKPOINT_POLICY_H_
#define SIMPO_WORKER_CHECKPOINT_POLICY_H_

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "worker/comm/collectives.h"
#include "worker/shard/checkpoint_writer.h"
#include "worker/shard/sharded_params.h"
#include "worker/train.h"

namespace simpo {

// Which checkpoint a run goes on from, which ones it keeps, and which one is its best. All calls but
// RecoveryDue and ShardDone are collective.
class CheckpointPolicy {
 public:
  // Says an event of the run, at a step.
  using Say = std::function<void(std::string_view type, const std::string& message, int64_t step)>;
  enum class Kind {
    kUsers,     // save_strategy says so: stays within save_total_limit; an error ends the run
    kRecovery,  // replaced by the next; an error is said, and the next one tries again
    kStop,      // a recovery checkpoint that the run ends with: written at once; an error ends the run
  };

  // `options` must outlive this.
  static absl::StatusOr<std::unique_ptr<CheckpointPolicy>> Create(const TrainOptions& options,
                                                                  at::ScalarType compute_dtype, Collectives& comm,
                                                                  Say say);

  // Where the run goes on from; nullopt: from the model.
  absl::StatusOr<std::optional<std::filesystem::path>> WhereToResume();
  // After the state of `from` was loaded.
  void Resumed(const std::filesystem::path& from, const TrainerState& state);

  // What this rank brings to the vote at the end of a step: a recovery checkpoint is due by its clock;
  // its shard of the checkpoint under way is done. Once all ranks' are, Finish() costs little.
  bool RecoveryDue() const;
  bool ShardDone() const { return writer_.shard_done(); }

  // Keeps track of the best evaluation, as load_best_model_at_end asks.
  absl::Status Evaluated(int64_t step, const std::map<std::string, double>& metrics);

  // Begins a checkpoint, once the one before is finished.
  absl::Status Save(const ShardedParams& params, TrainerState state, Kind kind);
  // Waits for the checkpoint under way, if any; then clears away what it replaces.
  absl::Status Finish();

  // Loads the best checkpoint where the run's end is not the best itself. What was loaded, in words;
  // empty: `params` stay as they are.
  absl::StatusOr<std::string> LoadBest(int64_t steps_done, ShardedParams& params);
  // The run is done: what was only there to go on from goes.
  void RemoveRecovery();

 private:
  struct Best {
    double metric = 0;
    int64_t step = 0;  // of the evaluation
    // The last checkpoint that was written at a best evaluation; -1: none yet.
    int64_t checkpoint_step = -1;
    std::filesystem::path checkpoint;
  };

  CheckpointPolicy(const TrainOptions& options, HfFiles hf_files, Collectives& comm, Say say);
  bool is_root() const { return comm_.rank() == 0; }
  std::string BestMetricName() const;
  absl::Status Failed(const absl::Status& status);
  void SayIfItStays(const absl::Status& removed);
  void ClearAway(const std::filesystem::path& written);

  const TrainOptions& options_;
  const std::filesystem::path dir_;  // of the checkpoints
  Collectives& comm_;
  const Say say_;
  CheckpointWriter writer_;
  Kind kind_ = Kind::kUsers;  // of the checkpoint under way, and its step
  int64_t step_ = 0;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
  std::filesystem::path recovery_;  // of this run, replaced by the next
  std::optional<Best> best_;
};

}  // namespace simpo

#endif  // SIMPO_WORKER_CHECKPOINT_POLICY_H_
