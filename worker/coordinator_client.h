#ifndef SIMPO_WORKER_COORDINATOR_CLIENT_H_
#define SIMPO_WORKER_COORDINATOR_CLIENT_H_

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "worker/comm/rank_activity.h"

namespace simpo {

namespace v1 {
class Hello;
}

// A rank's line to the coordinator: heartbeats from a thread of its own, step reports, events, and
// commands back. Never blocks training and never fails it: while the coordinator is away, reports
// wait (those of rank 0 are in metrics.jsonl anyway) and are replayed when it is back.
// Thread-safe.
class CoordinatorClient {
 public:
  struct Options {
    std::string address;                 // HOST:PORT, used until address_file says otherwise
    std::filesystem::path address_file;  // see coordinator_channel.h; may be empty
    std::string job_id;
    int attempt = 1;
    std::string secret;  // of the attempt
    int rank = 0;
    int world_size = 1;
    std::filesystem::path metrics_path;       // rank 0: where metrics.jsonl is, for the replay
    std::filesystem::path eval_metrics_path;  // rank 0
    const RankActivity* activity = nullptr;   // what heartbeats tell of this rank; outlives the client
  };
  enum class Command { kCheckpoint, kStop };

  // Who this process is, as the coordinator is told in every form.
  static void FillHello(const Options& options, v1::Hello* hello);

  static std::unique_ptr<CoordinatorClient> Start(Options options);
  virtual ~CoordinatorClient() = default;

  // The state that heartbeats carry.
  virtual void SetPhase(std::string_view phase, int64_t step, int64_t steps_planned) = 0;
  // How long the last step took this rank, and what of it the rank waited for others.
  virtual void SetLastStep(double seconds, double waited_seconds) = 0;
  // One line of metrics.jsonl (split "train") or eval_metrics.jsonl ("eval"), which must be in the
  // file by now: that is where it is sent from. Rank 0 only.
  virtual void ReportStep(std::string_view split, int64_t step, const std::map<std::string, double>& values) = 0;
  // Event types are those of proto WorkerEvent.
  virtual void ReportEvent(std::string_view type, std::string_view message, int64_t step) = 0;
  // The next command that has come, if any.
  virtual std::optional<Command> TakeCommand() = 0;
  // Sends `finished` (or `error`) and waits until all reports are acknowledged, at most
  // `timeout_ms`.
  virtual void Finish(int exit_code, std::string_view message, int timeout_ms) = 0;
};

}  // namespace simpo

#endif  // SIMPO_WORKER_COORDINATOR_CLIENT_H_
