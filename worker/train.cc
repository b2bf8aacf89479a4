#include "worker/train.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <stdexcept>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/atomic_file.h"
#include "common/job_config_yaml.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "worker/adamw.h"
#include "worker/data/tokenized_dataset.h"
#include "worker/evaluate.h"
#include "worker/lr_schedule.h"
#include "worker/metrics_log.h"
#include "worker/model/decoder.h"
#include "worker/pack.h"
#include "worker/sampler.h"
#include "worker/shard/agree_on.h"
#include "worker/shard/checkpoint.h"
#include "worker/shard/export_hf.h"
#include "worker/shard/sharded_params.h"
#include "worker/train_step.h"

namespace simpo {
namespace {

using Clock = std::chrono::steady_clock;
using Metrics = std::map<std::string, double>;

// Tokens of a micro-batch when the job does not say: enough to keep the matrix products efficient,
// few enough for the activations of a small model on a host.
constexpr int64_t kDefaultMicroBatchTokens = 1024;

double Seconds(Clock::time_point since) { return std::chrono::duration<double>(Clock::now() - since).count(); }

at::ScalarType ComputeDtype(const JobConfig& config, const ModelConfig& model) {
  const std::string& name = config.torch_dtype == "auto" ? model.dtype : config.torch_dtype;
  if (config.torch_dtype == "auto") return config.device == "cuda" ? at::kBFloat16 : at::kFloat;
  return name == "bfloat16" ? at::kBFloat16 : at::kFloat;
}

// Floating-point operations per second that this rank's threads reach in a matrix product.
double MeasureGemmPeak(at::ScalarType dtype) {
  constexpr int64_t kSize = 768;
  const at::Tensor a = at::ones({kSize, kSize}, dtype);
  at::Tensor c = at::mm(a, a);
  double best = 0;
  for (int i = 0; i < 3; ++i) {
    const auto begin = Clock::now();
    at::mm_out(c, a, a);
    best = std::max(best, 2.0 * kSize * kSize * kSize / Seconds(begin));
  }
  return best;
}

// An error that this rank alone has met: it must not leave its peers waiting in a collective.
void ThrowIfError(const absl::Status& status) {
  if (!status.ok()) throw std::runtime_error(std::string(status.message()));
}

// What ranks agree on at the end of each step.
struct Agreement {
  bool stop = false;
  bool checkpoint = false;
};

// One run of one job: the state that the step needs, built once.
class Run {
 public:
  Run(const TrainOptions& options, Collectives& comm)
      : options_(options),
        config_(options.config),
        comm_(comm),
        loss_(SimpoLoss::FromConfig(options.config)),
        adamw_(AdamWOptions::FromConfig(options.config)) {}

  absl::Status Load();
  absl::StatusOr<TrainOutcome> Loop();

 private:
  bool is_root() const { return comm_.rank() == 0; }
  std::filesystem::path checkpoints_dir() const { return options_.output_dir / "checkpoints"; }

  absl::Status OpenData();
  absl::Status Resume();
  absl::Status OpenLogs();
  void WriteManifest();
  std::vector<PackedBatch> PackMine(const std::vector<int64_t>& batch, GlobalBatchSize* global, int64_t* truncated);
  absl::StatusOr<Metrics> Step(int64_t step);
  Agreement Agree();
  absl::Status RunEvaluation(int64_t steps_done);
  absl::Status Checkpoint(int64_t steps_done, bool for_recovery);
  absl::Status AfterStep(int64_t steps_done, const Agreement& agreement);
  absl::Status Finish();
  bool Due(const std::string& strategy, int64_t every, int64_t steps_done) const;
  void Phase(std::string_view phase) {
    if (options_.coordinator != nullptr) options_.coordinator->SetPhase(phase, steps_done_, total_steps_);
  }
  void Event(std::string_view type, const std::string& message) {
    if (!is_root()) return;
    LOG_INFO(message);
    if (options_.coordinator != nullptr) options_.coordinator->ReportEvent(type, message, steps_done_);
  }

  const TrainOptions& options_;
  const JobConfig& config_;
  Collectives& comm_;
  const SimpoLoss loss_;
  const AdamWOptions adamw_;

  std::unique_ptr<TokenizedDataset> train_data_, eval_data_;
  std::unique_ptr<ShardedParams> params_;
  std::unique_ptr<Decoder> decoder_;
  std::optional<BatchSampler> sampler_;
  LrSchedule schedule_;
  std::optional<MetricsLog> metrics_log_, eval_metrics_log_;

  int64_t global_batch_size_ = 0;
  int64_t total_steps_ = 0;
  int64_t steps_done_ = 0;
  int64_t pairs_seen_ = 0;
  int64_t tokens_seen_ = 0;
  int64_t last_evaluation_ = -1;
  double gemm_peak_ = 0;
  Clock::time_point last_checkpoint_ = Clock::now();
  std::filesystem::path recovery_checkpoint_;  // of this run, replaced by the next
};

absl::Status Run::OpenData() {
  SIMPO_ASSIGN_OR_RETURN(train_data_, TokenizedDataset::Open(options_.data.train_cache));
  if (options_.data.eval_cache && config_.do_eval) {
    SIMPO_ASSIGN_OR_RETURN(eval_data_, TokenizedDataset::Open(*options_.data.eval_cache));
  }
  return absl::OkStatus();
}

absl::Status Run::Load() {
  Phase("load");
  SIMPO_RETURN_IF_ERROR(OpenData());
  const at::ScalarType dtype = ComputeDtype(config_, options_.model);
  params_ = std::make_unique<ShardedParams>(
      options_.model,
      ShardingOptions{.compute_dtype = dtype,
                      .zero_stage = config_.zero_stage,
                      .reduce_dtype = config_.reduce_dtype == "bfloat16" ? at::kBFloat16 : at::kFloat,
                      .offload_optimizer = config_.offload_optimizer == "cpu",
                      .device = at::Device(config_.device)},
      comm_);
  decoder_ = std::make_unique<Decoder>(options_.model, *params_);
  global_batch_size_ = config_.global_batch_size;
  SIMPO_RETURN_IF_ERROR(Resume());

  sampler_.emplace(train_data_->size(), global_batch_size_, config_.seed, config_.shuffle);
  total_steps_ = config_.max_steps > 0
                     ? config_.max_steps
                     : static_cast<int64_t>(
                           std::ceil(config_.num_train_epochs * static_cast<double>(sampler_->steps_per_epoch())));
  schedule_ = LrSchedule::FromConfig(config_, total_steps_);
  gemm_peak_ = MeasureGemmPeak(dtype);
  SIMPO_RETURN_IF_ERROR(OpenLogs());
  WriteManifest();
  Event("data_report",
        absl::StrFormat("%d pairs in %d steps of %d on %d ranks, %s, ZeRO stage %d, %d parameters", train_data_->size(),
                        total_steps_, global_batch_size_, comm_.world_size(), dtype == at::kFloat ? "fp32" : "bf16",
                        config_.zero_stage, options_.model.NumParameters()));
  return absl::OkStatus();
}

// Weights from a checkpoint when there is one to go on from, else from the model.
absl::Status Run::Resume() {
  std::optional<std::filesystem::path> from;
  if (options_.resume_latest || config_.resume_from_checkpoint == "true") {
    std::vector<std::string> skipped;
    SIMPO_ASSIGN_OR_RETURN(from, LatestCheckpoint(checkpoints_dir(), &skipped));
    for (const std::string& reason : skipped) Event("checkpoint", absl::StrCat("skipped ", reason));
  }
  // An attempt that left no checkpoint of its own is followed by one that begins where it began.
  const std::string& given = config_.resume_from_checkpoint;
  if (!from && !given.empty() && given != "true") from = given;
  if (!from) {
    SIMPO_ASSIGN_OR_RETURN(const std::unique_ptr<ModelWeightsReader> reader,
                           ModelWeightsReader::Open(options_.model_dir));
    return params_->LoadWeights(*reader);
  }
  SIMPO_ASSIGN_OR_RETURN(const TrainerState state, LoadCheckpoint(*from, *params_, comm_));
  steps_done_ = state.step;
  pairs_seen_ = state.pairs_seen;
  tokens_seen_ = state.tokens_seen;
  if (auto it = state.extra.find("last_evaluation"); it != state.extra.end()) {
    last_evaluation_ = static_cast<int64_t>(it->second);
  }
  // Another run's checkpoint is not this run's to remove.
  const std::filesystem::path folder = std::filesystem::absolute(*from).lexically_normal().parent_path();
  const bool own = folder == checkpoints_dir().lexically_normal();
  if (own && state.extra.contains("recovery")) recovery_checkpoint_ = *from;
  if (state.global_batch_size != global_batch_size_) {
    Event("resumed", absl::StrFormat("the global batch size stays %d, as the run began, not %d",
                                     state.global_batch_size, global_batch_size_));
    global_batch_size_ = state.global_batch_size;
  }
  Event("resumed", absl::StrCat("resumed from ", from->string(), " after step ", steps_done_));
  return absl::OkStatus();
}

absl::Status Run::OpenLogs() {
  absl::Status status;
  if (is_root()) {
    const int64_t keep = steps_done_ > 0 ? steps_done_ : -1;
    auto open = [&](const char* name, std::optional<MetricsLog>& log) -> absl::Status {
      SIMPO_ASSIGN_OR_RETURN(log, MetricsLog::Open(options_.output_dir / name, keep));
      return absl::OkStatus();
    };
    status = open("metrics.jsonl", metrics_log_);
    if (status.ok()) status = open("eval_metrics.jsonl", eval_metrics_log_);
  }
  return AgreeOn(status, comm_, "opening the metrics files");
}

// run_manifest.json: what ran, and what each rank holds.
void Run::WriteManifest() {
  const ShardedParams::Bytes bytes = params_->MemoryBytes();
  at::Tensor per_rank = at::zeros({comm_.world_size(), 3}, at::kLong);
  per_rank[comm_.rank()][0] = bytes.weights;
  per_rank[comm_.rank()][1] = bytes.grads;
  per_rank[comm_.rank()][2] = bytes.optimizer;
  comm_.AllReduce(per_rank);
  if (!is_root()) return;
  nlohmann::ordered_json manifest;
  manifest["job"] = JobConfigToYaml(config_);
  manifest["model"] = {{"path", options_.model_dir.string()},
                       {"model_type", options_.model.model_type},
                       {"parameters", options_.model.NumParameters()}};
  manifest["data"] = {{"train", options_.data.train_cache.string()},
                      {"pairs", train_data_->size()},
                      {"dropped_pairs", train_data_->dropped_pairs()},
                      {"chat_template", options_.data.chat_template_source}};
  manifest["compute_dtype"] = params_->compute_dtype() == at::kFloat ? "float32" : "bfloat16";
  manifest["global_batch_size"] = global_batch_size_;
  manifest["steps_planned"] = total_steps_;
  manifest["resumed_after_step"] = steps_done_;
  manifest["world_size"] = comm_.world_size();
  for (int rank = 0; rank < comm_.world_size(); ++rank) {
    manifest["ranks"].push_back({{"rank", rank},
                                 {"weight_bytes", per_rank[rank][0].item<int64_t>()},
                                 {"gradient_bytes", per_rank[rank][1].item<int64_t>()},
                                 {"optimizer_bytes", per_rank[rank][2].item<int64_t>()}});
  }
  ThrowIfError(WriteFileAtomically(options_.output_dir / "run_manifest.json", manifest.dump(2) + "\n"));
}

// This rank's share of a global batch as packed micro-batches, and the whole batch's sizes.
std::vector<PackedBatch> Run::PackMine(const std::vector<int64_t>& batch, GlobalBatchSize* global, int64_t* truncated) {
  std::vector<int64_t> tokens;
  *global = {.pairs = static_cast<double>(batch.size()), .chosen_tokens = 0};
  *truncated = 0;
  for (int64_t i : batch) {
    const TokenizedPair pair = (*train_data_)[i];
    tokens.push_back(PackedSize(pair));
    global->chosen_tokens += static_cast<double>(pair.chosen.size()) - pair.chosen_prompt_length;
    *truncated += train_data_->truncated(i) ? 1 : 0;
  }
  const int64_t max_tokens =
      config_.max_tokens_per_micro_batch > 0 ? config_.max_tokens_per_micro_batch : kDefaultMicroBatchTokens;
  std::vector<PackedBatch> packed;
  for (const auto& indices : MicroBatchesOfRank(batch, tokens, max_tokens, config_.per_device_train_batch_size,
                                                comm_.rank(), comm_.world_size())) {
    std::vector<TokenizedPair> pairs;
    for (int64_t i : indices) pairs.push_back((*train_data_)[i]);
    packed.push_back(Pack(pairs));
  }
  return packed;
}

// One optimizer step over one global batch.
absl::StatusOr<Metrics> Run::Step(int64_t step) {
  const auto begin = Clock::now();
  GlobalBatchSize global;
  int64_t truncated = 0;
  double flops = 0;
  SimpoStats stats;
  params_->ZeroGrads();
  const std::vector<PackedBatch> mine = PackMine(sampler_->Batch(step), &global, &truncated);
  for (const PackedBatch& batch : mine) {
    const bool last = &batch == &mine.back();
    stats += ForwardBackward(*decoder_, *params_, batch, loss_, global, config_.gradient_checkpointing, last);
    const double head = static_cast<double>(options_.model.vocab_size * options_.model.hidden_size);
    const double body =
        static_cast<double>(options_.model.NumParameters()) - head * (options_.model.tie_word_embeddings ? 1 : 2);
    flops += 6 * (body * static_cast<double>(batch.input_ids_T.numel()) +
                  head * static_cast<double>(batch.head_rows_N.numel()));
  }
  params_->FinishReduce();
  const double grad_norm = GlobalGradNorm(*params_, comm_);
  const double clip = ClipCoefficient(grad_norm, config_.max_grad_norm);
  const double learning_rate = schedule_.Rate(step);
  stats = AllReduceStats(stats, comm_);
  Metrics metrics = StatsToMetrics(stats, loss_, "");
  if (!std::isfinite(metrics["loss"]) || !std::isfinite(grad_norm)) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "step %d: loss %g, gradient norm %g: the run has diverged; nothing was updated. Lower learning_rate (%g)%s",
        step + 1, metrics["loss"], grad_norm, config_.learning_rate,
        config_.torch_dtype == "bfloat16" ? ", or set torch_dtype: float32" : ""));
  }
  AdamWStep(*params_, adamw_, learning_rate, clip, step + 1);

  steps_done_ = step + 1;
  pairs_seen_ += static_cast<int64_t>(stats.pairs);
  tokens_seen_ += static_cast<int64_t>(stats.source_tokens);
  const double seconds = Seconds(begin);
  metrics["grad_norm"] = grad_norm;
  metrics["clip_coefficient"] = clip;
  metrics["learning_rate"] = learning_rate;
  metrics["epoch"] = sampler_->Epoch(steps_done_);
  metrics["num_input_tokens_seen"] = static_cast<double>(tokens_seen_);
  metrics["tokens_per_second"] = stats.source_tokens / seconds;
  metrics["step_seconds"] = seconds;
  metrics["mfu"] = flops / seconds / gemm_peak_;
  metrics["truncated_pairs"] = static_cast<double>(truncated);
  metrics["dropped_pairs"] = static_cast<double>(train_data_->dropped_pairs());
  return metrics;
}

// A stop or a checkpoint that any rank was asked for, or that is due by rank 0's clock.
Agreement Run::Agree() {
  at::Tensor votes = at::zeros({2}, at::kLong);
  auto* vote = votes.data_ptr<int64_t>();
  if (options_.stop_requested != nullptr && options_.stop_requested->load()) vote[0] = 1;
  while (options_.coordinator != nullptr) {
    const std::optional<CoordinatorClient::Command> command = options_.coordinator->TakeCommand();
    if (!command) break;
    vote[*command == CoordinatorClient::Command::kStop ? 0 : 1] = 1;
  }
  if (is_root() && config_.recovery_minutes > 0 && Seconds(last_checkpoint_) > config_.recovery_minutes * 60)
    vote[1] = 1;
  comm_.AllReduce(votes);
  return {.stop = vote[0] > 0, .checkpoint = vote[1] > 0};
}

absl::Status Run::RunEvaluation(int64_t steps_done) {
  if (eval_data_ == nullptr || last_evaluation_ == steps_done) return absl::OkStatus();
  Phase("eval");
  const auto begin = Clock::now();
  const int64_t max_tokens =
      config_.max_tokens_per_micro_batch > 0 ? config_.max_tokens_per_micro_batch : kDefaultMicroBatchTokens;
  Metrics metrics =
      Evaluate(*decoder_, *params_, *eval_data_, loss_, max_tokens, config_.per_device_eval_batch_size, comm_);
  metrics["epoch"] = sampler_->Epoch(steps_done);
  metrics["eval_seconds"] = Seconds(begin);
  last_evaluation_ = steps_done;
  if (is_root()) {
    ThrowIfError(eval_metrics_log_->Write(steps_done, metrics));
    if (options_.coordinator != nullptr) options_.coordinator->ReportStep("eval", steps_done, metrics);
    LOG_INFO(absl::StrFormat("evaluation after step %d: accuracy %.4f, margin %.4f, loss %.4f", steps_done,
                             metrics["eval_rewards/accuracies"], metrics["eval_rewards/margins"],
                             metrics["eval_loss"]));
  }
  Phase("train");
  return absl::OkStatus();
}

absl::Status Run::Checkpoint(int64_t steps_done, bool for_recovery) {
  Phase("checkpoint");
  TrainerState state{.step = steps_done,
                     .steps_planned = total_steps_,
                     .global_batch_size = global_batch_size_,
                     .pairs_seen = pairs_seen_,
                     .tokens_seen = tokens_seen_,
                     .seed = config_.seed,
                     .extra = {{"last_evaluation", static_cast<double>(last_evaluation_)}}};
  if (for_recovery) state.extra["recovery"] = 1;
  SIMPO_ASSIGN_OR_RETURN(const std::filesystem::path path, SaveCheckpoint(checkpoints_dir(), *params_, state, comm_));
  last_checkpoint_ = Clock::now();
  if (is_root()) {
    // The recovery checkpoint rolls; the user's own stay within save_total_limit.
    if (!recovery_checkpoint_.empty() && recovery_checkpoint_ != path)
      std::filesystem::remove_all(recovery_checkpoint_);
    recovery_checkpoint_ = for_recovery ? path : std::filesystem::path();
    if (!for_recovery) {
      ThrowIfError(PruneCheckpoints(checkpoints_dir(), config_.save_total_limit, std::span(&path, 1)));
    }
  }
  Event("checkpoint", absl::StrCat("checkpoint after step ", steps_done, ": ", path.string()));
  Phase("train");
  return absl::OkStatus();
}

bool Run::Due(const std::string& strategy, int64_t every, int64_t steps_done) const {
  if (strategy == "steps") return every > 0 && steps_done % every == 0;
  if (strategy == "epoch") return steps_done % sampler_->steps_per_epoch() == 0;
  return false;
}

absl::Status Run::AfterStep(int64_t steps_done, const Agreement& agreement) {
  if (Due(config_.eval_strategy, config_.eval_steps, steps_done)) SIMPO_RETURN_IF_ERROR(RunEvaluation(steps_done));
  if (Due(config_.save_strategy, config_.save_steps, steps_done)) return Checkpoint(steps_done, /*for_recovery=*/false);
  if (agreement.stop || agreement.checkpoint) return Checkpoint(steps_done, /*for_recovery=*/true);
  return absl::OkStatus();
}

absl::StatusOr<TrainOutcome> Run::Loop() {
  if (config_.eval_on_start && steps_done_ == 0) SIMPO_RETURN_IF_ERROR(RunEvaluation(0));
  Phase("train");
  for (int64_t step = steps_done_; step < total_steps_; ++step) {
    SIMPO_ASSIGN_OR_RETURN(const Metrics metrics, Step(step));
    if (is_root()) {
      ThrowIfError(metrics_log_->Write(steps_done_, metrics));
      if (steps_done_ % config_.logging_steps == 0) std::puts(MetricsLine(steps_done_, metrics).c_str());
      std::fflush(stdout);
      if (options_.coordinator != nullptr) options_.coordinator->ReportStep("train", steps_done_, metrics);
    }
    Phase("train");
    const Agreement agreement = Agree();
    SIMPO_RETURN_IF_ERROR(AfterStep(steps_done_, agreement));
    if (agreement.stop && steps_done_ < total_steps_) {
      Event("stopped", absl::StrCat("stopped on request after step ", steps_done_));
      return TrainOutcome::kStopped;
    }
  }
  SIMPO_RETURN_IF_ERROR(Finish());
  return TrainOutcome::kDone;
}

absl::Status Run::Finish() {
  if (config_.do_eval && config_.eval_strategy != "no") SIMPO_RETURN_IF_ERROR(RunEvaluation(steps_done_));
  if (config_.save_strategy != "no") {
    Phase("export");
    const std::filesystem::path final_dir = options_.output_dir / "final";
    SIMPO_RETURN_IF_ERROR(ExportHf(final_dir, *params_, options_.model, options_.model_dir, options_.tokenizer_dir,
                                   options_.data.chat_template, comm_));
    Event("exported", absl::StrCat("model: ", final_dir.string()));
  }
  if (is_root() && !recovery_checkpoint_.empty()) std::filesystem::remove_all(recovery_checkpoint_);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<TrainOutcome> Train(const TrainOptions& options, Collectives& comm) {
  Run run(options, comm);
  SIMPO_RETURN_IF_ERROR(run.Load());
  return run.Loop();
}

}  // namespace simpo
