#include "tests/worker/golden.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <optional>

#include "tests/worker/io/thread_collectives.h"
#include "worker/model/read_model_config.h"
#include "worker/shard/checkpoint.h"
#include "worker/shard/sharded_params.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

// Asks for a stop once a given step is done.
class StopAfterStep : public CoordinatorClient {
 public:
  explicit StopAfterStep(int64_t step) : step_(step) {}
  void SetPhase(std::string_view, int64_t, int64_t) override {}
  void SetLastStep(double, double) override {}
  void ReportStep(std::string_view split, int64_t step, const Metrics&) override {
    if (split == "train" && step == step_) due_ = true;
  }
  void ReportEvent(std::string_view, std::string_view, int64_t) override {}
  std::optional<Command> TakeCommand() override {
    if (!std::exchange(due_, false)) return std::nullopt;
    return Command::kStop;
  }
  void Finish(int, std::string_view, int) override {}

 private:
  const int64_t step_;
  bool due_ = false;
};

}  // namespace

Golden::Golden(const std::string& name) : dir(fs::path(SIMPO_GOLDENS_DIR) / name) {
  std::ifstream file(dir / "golden.json");
  numbers = Json::parse(file);
  config = ReadModelConfig(dir).value();
  weights = ModelWeightsReader::Open(dir).value();
  tensors = SafetensorsFile::Open(dir / "tensors.safetensors").value();
  for (const Json& pair : numbers["pairs"]) {
    pairs.push_back({.chosen = pair["chosen"],
                     .rejected = pair["rejected"],
                     .chosen_prompt_length = pair["chosen_prompt_length"],
                     .rejected_prompt_length = pair["rejected_prompt_length"]});
  }
}

at::Tensor Golden::Tensor(const std::string& name) const {
  const SafetensorsEntry* entry = tensors->Find(name);
  TORCH_CHECK(entry != nullptr, dir.string(), "/tensors.safetensors has no ", name);
  return tensors->View(*entry).to(at::kDouble);
}

const Json& Golden::Trajectory(const std::string& name) const { return numbers.at("trajectories").at(name); }

std::vector<std::string> GoldenModels() {
  std::vector<std::string> models = GoldenFamilies();
  models.insert(models.begin(), {"untied", "tied"});
  return models;
}

std::vector<std::string> GoldenFamilies() {
  return {"mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "dynamic"};
}

std::vector<std::pair<std::string, std::string>> GoldenTrajectories() {
  return {{"untied", "sigmoid_cosine"},
          {"untied", "hinge_cosine"},
          {"tied", "smoothing_sft_decay_cosine"},
          {"tied", "hinge_sft_linear"}};
}

SimpoLoss LossOf(const Json& loss) {
  return {.type = loss["loss_type"] == "hinge" ? SimpoLoss::Type::kHinge : SimpoLoss::Type::kSigmoid,
          .beta = loss["beta"],
          .gamma_beta_ratio = loss["gamma_beta_ratio"],
          .label_smoothing = loss["label_smoothing"],
          .sft_weight = loss["sft_weight"]};
}

Metrics MetricsOf(const Json& json) {
  Metrics metrics;
  for (const auto& [name, value] : json.items()) metrics[name] = value.get<double>();
  return metrics;
}

std::vector<TokenizedPair> Views(std::span<const OwnedPair> pairs) {
  std::vector<TokenizedPair> views;
  for (const OwnedPair& pair : pairs) {
    views.push_back({pair.chosen, pair.rejected, pair.chosen_prompt_length, pair.rejected_prompt_length});
  }
  return views;
}

double Difference(double a, double b) { return std::abs(a - b) / std::max(1.0, std::abs(b)); }

double LargestDifference(const std::vector<Metrics>& got, const std::vector<Metrics>& want, std::string* worst) {
  EXPECT_EQ(got.size(), want.size());
  double largest = 0;
  for (size_t step = 0; step < std::min(got.size(), want.size()); ++step) {
    for (const auto& [name, value] : want[step]) {
      const auto mine = got[step].find(name);
      const double difference = mine == got[step].end() ? INFINITY : Difference(mine->second, value);
      if (!(difference > largest)) continue;
      largest = difference;
      if (worst != nullptr) *worst = name + " of step " + std::to_string(step + 1);
    }
  }
  return largest;
}

double Distance(const at::Tensor& got, const at::Tensor& want) {
  return ((got.to(at::kDouble) - want.to(at::kDouble)).norm() / want.to(at::kDouble).norm()).item<double>();
}

JobConfig JobOf(const Json& trajectory) {
  const Json& loss = trajectory["loss"];
  const Json& training = trajectory["training"];
  JobConfig config;
  config.name = "golden";
  config.torch_dtype = "float32";
  config.shuffle = false;
  config.loss_type = loss["loss_type"];
  config.beta = loss["beta"];
  config.gamma_beta_ratio = loss["gamma_beta_ratio"];
  config.label_smoothing = loss["label_smoothing"];
  config.sft_weight = loss["sft_weight"];
  config.learning_rate = training["learning_rate"];
  config.lr_scheduler_type = training["lr_scheduler_type"];
  config.warmup_ratio = training["warmup_ratio"];
  config.weight_decay = training["weight_decay"];
  config.max_grad_norm = training["max_grad_norm"];
  config.max_steps = training["steps"];
  config.per_device_train_batch_size = training["micro_batch"];
  config.gradient_accumulation_steps = training["accumulation"];
  config.global_batch_size = config.per_device_train_batch_size * config.gradient_accumulation_steps;
  config.save_strategy = "no";
  config.logging_steps = 1000000;  // nothing on stdout
  return config;
}

std::vector<Metrics> ReadMetrics(const fs::path& path) {
  std::vector<Metrics> steps;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) steps.push_back(MetricsOf(Json::parse(line)));
  return steps;
}

RunResult RunTraining(const Golden& golden, const std::vector<OwnedPair>& pairs, const RunOptions& options,
                      const fs::path& output_dir) {
  fs::create_directories(output_dir);
  TrainOptions train{.config = options.config,
                     .output_dir = output_dir,
                     .model_dir = golden.dir,
                     .tokenizer_dir = golden.dir,
                     .model = golden.config,
                     .resume_latest = options.resume};
  train.data.train_cache = output_dir / "train.tokens";
  EXPECT_TRUE(WriteTokenizedDataset(train.data.train_cache, pairs, /*dropped_pairs=*/0).ok());
  StopAfterStep stop(options.stop_after_step);
  std::vector<absl::StatusOr<TrainOutcome>> outcomes(options.ranks);
  ThreadWorld::Run(options.ranks, [&](Collectives& comm) {
    at::set_num_threads(1);
    TrainOptions mine = train;
    if (options.stop_after_step > 0 && comm.rank() == 0) mine.coordinator = &stop;
    outcomes[comm.rank()] = Train(mine, comm);
  });
  for (const auto& outcome : outcomes) {
    EXPECT_TRUE(outcome.ok()) << outcome.status();
    if (!outcome.ok()) return {};
    EXPECT_EQ(*outcome, *outcomes[0]);
  }
  return {*outcomes[0], ReadMetrics(output_dir / "metrics.jsonl")};
}

std::map<std::string, at::Tensor> Updates(const Golden& golden, const fs::path& output_dir) {
  const auto path = LatestCheckpoint(output_dir / "checkpoints", nullptr).value();
  TORCH_CHECK(path.has_value(), "no checkpoint in ", output_dir.string());
  const std::unique_ptr<Collectives> comm = MakeSingleRankCollectives();
  // In fp32 the weights are the masters.
  ShardedParams params(golden.config, {.zero_stage = 0}, *comm);
  const auto state = LoadCheckpoint(*path, params, *comm);
  TORCH_CHECK(state.ok(), std::string(state.status().message()));
  std::map<std::string, at::Tensor> updates;
  for (const Bucket& bucket : params.buckets()) {
    for (const ParamSlot& slot : bucket.slots) {
      const at::Tensor start = golden.weights->Get(slot.spec.name, slot.spec.shape).value();
      updates[slot.spec.name] = SlotOf(bucket.weights, slot).to(at::kDouble) - start.to(at::kDouble);
    }
  }
  return updates;
}

}  // namespace simpo
