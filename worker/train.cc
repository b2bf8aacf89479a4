#include "worker/train.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/atomic_file.h"
#include "common/job_config_yaml.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "worker/adamw.h"
#include "worker/advice.h"
#include "worker/checkpoint_policy.h"
#include "worker/data/tokenized_dataset.h"
#include "worker/evaluate.h"
#include "worker/find_nonfinite.h"
#include "worker/lr_schedule.h"
#include "worker/metrics_log.h"
#include "worker/model/decoder.h"
#include "worker/pack.h"
#include "worker/run_manifest.h"
#include "worker/sampler.h"
#include "worker/shard/agree_on.h"
#include "worker/shard/checkpoint.h"
#include "worker/shard/export_hf.h"
#include "worker/shard/load_weights.h"
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

// Floating-point operations per second that this rank reaches in a matrix product.
double MeasureGemmPeak(at::ScalarType dtype, at::Device device) {
  const int64_t size = device.is_cpu() ? 768 : 8192;
  const at::Tensor a = at::ones({size, size}, at::TensorOptions().dtype(dtype).device(device));
  at::Tensor c = at::mm(a, a);
  const auto finish = [&] { c[0][0].item(); };  // a device works on its own time
  finish();
  double best = 0;
  for (int i = 0; i < 3; ++i) {
    const auto begin = Clock::now();
    at::mm_out(c, a, a);
    finish();
    const auto n = static_cast<double>(size);
    best = std::max(best, 2.0 * n * n * n / Seconds(begin));
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
  bool shards_done = false;  // of the checkpoint under way, on all ranks
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
  // A checkpoint under way is worth its end even after an error of the run.
  absl::Status FinishCheckpoint() { return checkpoints_ == nullptr ? absl::OkStatus() : checkpoints_->Finish(); }

 private:
  bool is_root() const { return comm_.rank() == 0; }

  absl::Status OpenData();
  absl::Status Resume();
  absl::Status OpenLogs();
  int64_t max_tokens() const {
    return config_.max_tokens_per_micro_batch > 0 ? config_.max_tokens_per_micro_batch : kDefaultMicroBatchTokens;
  }
  std::vector<std::vector<int64_t>> MicroBatchesOf(const std::vector<int64_t>& batch, int rank) const;
  std::vector<PackedBatch> PackMine(const std::vector<int64_t>& batch, GlobalBatchSize* global, int64_t* truncated);
  absl::Status Diverged(int64_t step, double loss, double grad_norm, const std::vector<PackedBatch>& mine);
  void Advise(const std::vector<std::string>& advice) {
    for (const std::string& text : advice) Event("advice", text);
  }
  absl::StatusOr<Metrics> Step(int64_t step);
  Agreement Agree();
  absl::Status RunEvaluation(int64_t steps_done);
  absl::Status Checkpoint(int64_t steps_done, CheckpointPolicy::Kind kind);
  absl::Status AfterStep(int64_t steps_done, const Agreement& agreement);
  absl::Status Finish();
  bool Due(const std::string& strategy, int64_t every, int64_t steps_done) const;
  void Phase(std::string_view phase) {
    if (options_.coordinator != nullptr) options_.coordinator->SetPhase(phase, steps_done_, total_steps_);
  }
  void Event(std::string_view type, const std::string& message) { EventAt(steps_done_, type, message); }
  void EventAt(int64_t step, std::string_view type, const std::string& message) {
    if (!is_root()) return;
    LOG_INFO(message);
    if (options_.coordinator != nullptr) options_.coordinator->ReportEvent(type, message, step);
  }

  const TrainOptions& options_;
  const JobConfig& config_;
  Collectives& comm_;
  const SimpoLoss loss_;
  const AdamWOptions adamw_;

  std::unique_ptr<TokenizedDataset> train_data_, eval_data_;
  std::unique_ptr<ShardedParams> params_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<CheckpointPolicy> checkpoints_;
  std::optional<BatchSampler> sampler_;
  LrSchedule schedule_;
  std::optional<Advisor> advisor_;
  std::optional<MetricsLog> metrics_log_, eval_metrics_log_;

  std::map<std::string, double> resumed_state_;  // TrainerState::extra of the checkpoint
  int64_t global_batch_size_ = 0;
  int64_t total_steps_ = 0;
  int64_t steps_done_ = 0;
  int64_t pairs_seen_ = 0;
  int64_t tokens_seen_ = 0;
  int64_t last_evaluation_ = -1;
  double gemm_peak_ = 0;
};

absl::Status Run::OpenData() {
  SIMPO_ASSIGN_OR_RETURN(train_data_, TokenizedDataset::Open(options_.data.train_cache));
  if (options_.data.eval_cache && config_.do_eval) {
    SIMPO_ASSIGN_OR_RETURN(eval_data_, TokenizedDataset::Open(*options_.data.eval_cache));
  }
  if (config_.load_best_model_at_end && eval_data_ == nullptr) {
    return absl::FailedPreconditionError(
        "load_best_model_at_end: there is no evaluation data to choose by. Leave do_eval true and give the name of an "
        "evaluation split as "
        "the second of dataset_splits, or eval_dataset_mixer, or leave load_best_model_at_end out");
  }
  return absl::OkStatus();
}

absl::Status Run::Load() {
  Phase("load");
  at::globalContext().setDeterministicAlgorithms(config_.deterministic, /*warn_only=*/false);
  SIMPO_RETURN_IF_ERROR(OpenData());
  params_ = std::make_unique<ShardedParams>(options_.model, ShardingOf(config_, options_.model), comm_);
  const at::ScalarType dtype = params_->compute_dtype();
  decoder_ = std::make_unique<Decoder>(options_.model, *params_);
  SIMPO_ASSIGN_OR_RETURN(
      checkpoints_, CheckpointPolicy::Create(options_, dtype, comm_,
                                             [this](std::string_view type, const std::string& message, int64_t step) {
                                               EventAt(step, type, message);
                                             }));
  global_batch_size_ = config_.global_batch_size;
  SIMPO_RETURN_IF_ERROR(Resume());

  sampler_.emplace(train_data_->size(), global_batch_size_, config_.seed, config_.shuffle);
  total_steps_ = config_.max_steps > 0
                     ? config_.max_steps
                     : static_cast<int64_t>(
                           std::ceil(config_.num_train_epochs * static_cast<double>(sampler_->steps_per_epoch())));
  schedule_ = LrSchedule::FromConfig(config_, total_steps_);
  advisor_.emplace(config_, total_steps_);
  advisor_->Restore(resumed_state_);
  gemm_peak_ = MeasureGemmPeak(dtype, params_->options().device);
  SIMPO_RETURN_IF_ERROR(OpenLogs());
  ThrowIfError(WriteRunManifest(options_.output_dir / "run_manifest.json", options_, *params_,
                                {.pairs = train_data_->size(),
                                 .dropped_pairs = train_data_->dropped_pairs(),
                                 .global_batch_size = global_batch_size_,
                                 .steps_planned = total_steps_,
                                 .resumed_after_step = steps_done_},
                                comm_));
  if (is_root()) ThrowIfError(WriteDataReport(options_.data, options_.output_dir));
  Event("data_report",
        absl::StrFormat("%d pairs in %d steps of %d on %d ranks, %s, ZeRO stage %d, %d parameters", train_data_->size(),
                        total_steps_, global_batch_size_, comm_.world_size(), dtype == at::kFloat ? "fp32" : "bf16",
                        config_.zero_stage, options_.model.NumParameters()));
  if (is_root()) Advise(advisor_->BeforeTraining());
  return absl::OkStatus();
}

// Weights from a checkpoint when there is one to go on from, else from the model.
absl::Status Run::Resume() {
  SIMPO_ASSIGN_OR_RETURN(const std::optional<std::filesystem::path> from, checkpoints_->WhereToResume());
  if (!from) {
    SIMPO_ASSIGN_OR_RETURN(const std::unique_ptr<ModelWeightsReader> reader,
                           ModelWeightsReader::Open(options_.model_dir));
    return LoadWeights(*reader, *params_);
  }
  SIMPO_ASSIGN_OR_RETURN(const TrainerState state, LoadCheckpoint(*from, *params_, comm_));
  steps_done_ = state.step;
  resumed_state_ = state.extra;
  pairs_seen_ = state.pairs_seen;
  tokens_seen_ = state.tokens_seen;
  if (auto it = state.extra.find("last_evaluation"); it != state.extra.end()) {
    last_evaluation_ = static_cast<int64_t>(it->second);
  }
  checkpoints_->Resumed(*from, state);
  if (state.seed != config_.seed) {
    Event("resumed",
          absl::StrFormat("the seed is %d, and was %d before: rows may come twice or not at all in this epoch",
                          config_.seed, state.seed));
  }
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

// The pairs of each micro-batch of `rank`.
std::vector<std::vector<int64_t>> Run::MicroBatchesOf(const std::vector<int64_t>& batch, int rank) const {
  std::vector<int64_t> tokens;
  for (int64_t i : batch) {
    tokens.push_back(PackedSize((*train_data_)[i], options_.model.rope.SharedAnglesUpTo()));
  }
  return MicroBatchesOfRank(batch, tokens, max_tokens(), config_.per_device_train_batch_size, rank, comm_.world_size());
}

// This rank's share of a global batch as packed micro-batches, and the whole batch's sizes.
std::vector<PackedBatch> Run::PackMine(const std::vector<int64_t>& batch, GlobalBatchSize* global, int64_t* truncated) {
  *global = {.pairs = static_cast<double>(batch.size()), .chosen_tokens = 0};
  *truncated = 0;
  for (int64_t i : batch) {
    const TokenizedPair pair = (*train_data_)[i];
    global->chosen_tokens += static_cast<double>(pair.chosen.size()) - pair.chosen_prompt_length;
    *truncated += train_data_->truncated(i) ? 1 : 0;
  }
  std::vector<PackedBatch> packed;
  for (const auto& indices : MicroBatchesOf(batch, comm_.rank())) {
    std::vector<TokenizedPair> pairs;
    for (int64_t i : indices) pairs.push_back((*train_data_)[i]);
    packed.push_back(Pack(pairs, options_.model.rope.SharedAnglesUpTo()));
  }
  return packed;
}

// Nothing of the step is kept: says where the first number that is none arose, and what to do.
absl::Status Run::Diverged(int64_t step, double loss, double grad_norm, const std::vector<PackedBatch>& mine) {
  const NonFinite where = FindNonFinite(*decoder_, *params_, mine, loss_, comm_);
  std::string rows;
  if (where.kind == NonFinite::Kind::kActivation) {
    const auto micro_batches = MicroBatchesOf(sampler_->Batch(step), where.rank);
    rows =
        absl::StrCat(" (pairs ", absl::StrJoin(micro_batches[where.micro_batch], ", "), " of the train data, from 0)");
  }
  return absl::InvalidArgumentError(absl::StrFormat(
      "step %d: loss %g, gradient norm %g: the run has diverged; nothing was updated. First not finite: %s%s. Lower "
      "learning_rate (%g)%s",
      step + 1, loss, grad_norm, where.ToString(options_.model.num_layers), rows, config_.learning_rate,
      params_->compute_dtype() == at::kBFloat16 ? ", or set torch_dtype: float32" : ""));
}

// One optimizer step over one global batch.
absl::StatusOr<Metrics> Run::Step(int64_t step) {
  const auto begin = Clock::now();
  const double waited_before = comm_.activity().Now().waited_s;
  GlobalBatchSize global;
  int64_t truncated = 0;
  double flops = 0;
  SimpoStats stats;
  const double head = static_cast<double>(options_.model.vocab_size * options_.model.hidden_size);
  const double body =
      static_cast<double>(options_.model.NumParameters()) - head * (options_.model.tie_word_embeddings ? 1 : 2);
  params_->ZeroGrads();
  const std::vector<PackedBatch> mine = PackMine(sampler_->Batch(step), &global, &truncated);
  for (const PackedBatch& batch : mine) {
    const bool last = &batch == &mine.back();
    stats += ForwardBackward(*decoder_, *params_, batch, loss_, global, config_.gradient_checkpointing, last);
    flops += 6 * (body * static_cast<double>(batch.input_ids_T.numel()) +
                  head * static_cast<double>(batch.head_rows_N.numel()));
    comm_.activity().Moved();
  }
  params_->FinishReduce();
  const double grad_norm = GlobalGradNorm(*params_, comm_);
  const double clip = ClipCoefficient(grad_norm, config_.max_grad_norm);
  const double learning_rate = schedule_.Rate(step);
  stats = AllReduceStats(stats, comm_);
  Metrics metrics = StatsToMetrics(stats, loss_, "");
  if (!std::isfinite(metrics["loss"]) || !std::isfinite(grad_norm)) {
    return Diverged(step, metrics["loss"], grad_norm, mine);
  }
  AdamWStep(*params_, adamw_, learning_rate, clip, step + 1);

  steps_done_ = step + 1;
  pairs_seen_ += static_cast<int64_t>(stats.pairs);
  tokens_seen_ += static_cast<int64_t>(stats.source_tokens);
  const double seconds = Seconds(begin);
  if (options_.coordinator != nullptr) {
    options_.coordinator->SetLastStep(seconds, comm_.activity().Now().waited_s - waited_before);
  }
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
  at::Tensor votes = at::zeros({3}, at::kLong);
  auto* vote = votes.data_ptr<int64_t>();
  if (options_.stop_requested != nullptr && options_.stop_requested->load()) vote[0] = 1;
  while (options_.coordinator != nullptr) {
    const std::optional<CoordinatorClient::Command> command = options_.coordinator->TakeCommand();
    if (!command) break;
    vote[*command == CoordinatorClient::Command::kStop ? 0 : 1] = 1;
  }
  if (checkpoints_->RecoveryDue()) vote[1] = 1;
  if (checkpoints_->ShardDone()) vote[2] = 1;
  comm_.AllReduce(votes);
  return {.stop = vote[0] > 0, .checkpoint = vote[1] > 0, .shards_done = vote[2] == comm_.world_size()};
}

absl::Status Run::RunEvaluation(int64_t steps_done) {
  if (eval_data_ == nullptr || last_evaluation_ == steps_done) return absl::OkStatus();
  Phase("eval");
  const auto begin = Clock::now();
  Metrics metrics =
      Evaluate(*decoder_, *params_, *eval_data_, loss_, max_tokens(), config_.per_device_eval_batch_size, comm_);
  metrics["epoch"] = sampler_->Epoch(steps_done);
  metrics["eval_seconds"] = Seconds(begin);
  last_evaluation_ = steps_done;
  SIMPO_RETURN_IF_ERROR(checkpoints_->Evaluated(steps_done, metrics));
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

absl::Status Run::Checkpoint(int64_t steps_done, CheckpointPolicy::Kind kind) {
  Phase("checkpoint");
  TrainerState state{.step = steps_done,
                     .steps_planned = total_steps_,
                     .global_batch_size = global_batch_size_,
                     .pairs_seen = pairs_seen_,
                     .tokens_seen = tokens_seen_,
                     .seed = config_.seed,
                     .extra = {{"last_evaluation", static_cast<double>(last_evaluation_)}}};
  if (is_root()) state.extra.merge(advisor_->State());
  SIMPO_RETURN_IF_ERROR(checkpoints_->Save(*params_, std::move(state), kind));
  Phase("train");
  return absl::OkStatus();
}

bool Run::Due(const std::string& strategy, int64_t every, int64_t steps_done) const {
  if (strategy == "steps") return every > 0 && steps_done % every == 0;
  if (strategy == "epoch") return steps_done % sampler_->steps_per_epoch() == 0;
  return false;
}

absl::Status Run::AfterStep(int64_t steps_done, const Agreement& agreement) {
  if (agreement.shards_done) SIMPO_RETURN_IF_ERROR(checkpoints_->Finish());
  if (Due(config_.eval_strategy, config_.eval_steps, steps_done)) SIMPO_RETURN_IF_ERROR(RunEvaluation(steps_done));
  using Kind = CheckpointPolicy::Kind;
  if (Due(config_.save_strategy, config_.save_steps, steps_done)) return Checkpoint(steps_done, Kind::kUsers);
  if (agreement.stop) return Checkpoint(steps_done, Kind::kStop);
  return agreement.checkpoint ? Checkpoint(steps_done, Kind::kRecovery) : absl::OkStatus();
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
      Advise(advisor_->AfterStep(steps_done_, metrics));
    }
    Phase("train");
    const Agreement agreement = Agree();
    SIMPO_RETURN_IF_ERROR(AfterStep(steps_done_, agreement));
    if (agreement.stop && steps_done_ < total_steps_) {
      SIMPO_RETURN_IF_ERROR(checkpoints_->Finish());
      Event("stopped", absl::StrCat("stopped on request after step ", steps_done_));
      return TrainOutcome::kStopped;
    }
  }
  SIMPO_RETURN_IF_ERROR(Finish());
  return TrainOutcome::kDone;
}

absl::Status Run::Finish() {
  if (config_.do_eval && config_.eval_strategy != "no") SIMPO_RETURN_IF_ERROR(RunEvaluation(steps_done_));
  SIMPO_RETURN_IF_ERROR(checkpoints_->Finish());
  if (config_.save_strategy != "no") {
    Phase("export");
    const std::filesystem::path final_dir = options_.output_dir / "final";
    SIMPO_ASSIGN_OR_RETURN(const std::string best, checkpoints_->LoadBest(steps_done_, *params_));
    SIMPO_RETURN_IF_ERROR(ExportHf(final_dir, *params_, options_.model, options_.model_dir, options_.tokenizer_dir,
                                   options_.data.chat_template, comm_));
    Event("exported", absl::StrCat("model: ", final_dir.string(), best.empty() ? "" : " is ", best));
  }
  checkpoints_->RemoveRecovery();
  return absl::OkStatus();
}

}  // namespace

ShardingOptions ShardingOf(const JobConfig& config, const ModelConfig& model) {
  return {.compute_dtype = ComputeDtype(config, model),
          .zero_stage = config.zero_stage,
          .reduce_dtype = config.reduce_dtype == "bfloat16" ? at::kBFloat16 : at::kFloat,
          .offload_optimizer = config.offload_optimizer == "cpu",
          .device = at::Device(config.device)};
}

absl::StatusOr<TrainOutcome> Train(const TrainOptions& options, Collectives& comm) {
  Run run(options, comm);
  SIMPO_RETURN_IF_ERROR(run.Load());
  absl::StatusOr<TrainOutcome> outcome = run.Loop();
  const absl::Status finished = run.FinishCheckpoint();
  if (outcome.ok() && !finished.ok()) return finished;
  return outcome;
}

}  // namespace simpo
