#ifndef SIMPO_TESTS_WORKER_GOLDEN_H_
#define SIMPO_TESTS_WORKER_GOLDEN_H_

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/job_config.h"
#include "worker/data/tokenized_dataset.h"
#include "worker/model/model_config.h"
#include "worker/model/safetensors.h"
#include "worker/simpo_loss.h"
#include "worker/train.h"

namespace simpo {

using Metrics = std::map<std::string, double>;

// One model of tests/goldens and the numbers that training it must give.
struct Golden {
  std::filesystem::path dir;  // an HF folder, with golden.json and tensors.safetensors beside the weights
  nlohmann::json numbers;
  ModelConfig config;
  std::vector<OwnedPair> pairs;
  std::unique_ptr<ModelWeightsReader> weights;
  std::unique_ptr<SafetensorsFile> tensors;  // "gradient/VARIANT/NAME", "update/TRAJECTORY/NAME"

  explicit Golden(const std::string& name);
  at::Tensor Tensor(const std::string& name) const;  // fp64
  const nlohmann::json& Trajectory(const std::string& name) const;
};

// All models; those of other families than Llama, with one trajectory "five_steps" each; and the
// trajectories of 20 steps as (model, trajectory).
std::vector<std::string> GoldenModels();
std::vector<std::string> GoldenFamilies();
std::vector<std::pair<std::string, std::string>> GoldenTrajectories();

SimpoLoss LossOf(const nlohmann::json& loss);
Metrics MetricsOf(const nlohmann::json& json);

// Views of owned pairs, which must outlive them.
std::vector<TokenizedPair> Views(std::span<const OwnedPair> pairs);

// |a - b| / max(1, |b|)
double Difference(double a, double b);
// Its largest value over the steps and the metrics of `want`; `worst` (may be null) says where.
double LargestDifference(const std::vector<Metrics>& got, const std::vector<Metrics>& want,
                         std::string* worst = nullptr);
// ||got - want|| / ||want||
double Distance(const at::Tensor& got, const at::Tensor& want);

// The job of a golden trajectory: the same pairs in the same batches.
JobConfig JobOf(const nlohmann::json& trajectory);

// The lines of a metrics.jsonl.
std::vector<Metrics> ReadMetrics(const std::filesystem::path& path);

// A run of Train() on `ranks` threads, one rank each.
struct RunOptions {
  JobConfig config;
  int ranks = 1;
  bool resume = false;
  int64_t stop_after_step = 0;  // 0: runs to its end
};
struct RunResult {
  TrainOutcome outcome = TrainOutcome::kDone;
  std::vector<Metrics> steps;  // of metrics.jsonl
};
// A failed Status on any rank is a test failure and gives an empty result.
RunResult RunTraining(const Golden& golden, const std::vector<OwnedPair>& pairs, const RunOptions& options,
                      const std::filesystem::path& output_dir);

// fp32 masters of the newest checkpoint in output_dir, minus the model's weights: what training added.
std::map<std::string, at::Tensor> Updates(const Golden& golden, const std::filesystem::path& output_dir);

}  // namespace simpo

#endif  // SIMPO_TESTS_WORKER_GOLDEN_H_
