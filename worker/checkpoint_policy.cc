#include "worker/checkpoint_policy.h"

#include <array>
#include <span>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/metric_names.h"
#include "common/status_macros.h"
#include "worker/shard/agree_on.h"
#include "worker/shard/checkpoint.h"
#include "worker/shard/replace_folder.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

// Keys of TrainerState::extra.
constexpr const char* kRecovery = "recovery";
constexpr const char* kBestMetric = "best_metric";
constexpr const char* kBestStep = "best_step";
constexpr const char* kBestCheckpointStep = "best_checkpoint_step";

std::string InWords(int64_t step, const CheckpointWriter::Report& report) {
  return absl::StrFormat(
      "checkpoint after step %d: %s (training stood still for %.3f s; %.1f MB per rank written in %.3f s%s)", step,
      report.path.string(), report.blocked_seconds, static_cast<double>(report.bytes) / 1e6, report.writing_seconds,
      report.in_background ? " in the background" : "");
}

}  // namespace

absl::StatusOr<std::unique_ptr<CheckpointPolicy>> CheckpointPolicy::Create(const TrainOptions& options,
                                                                           at::ScalarType compute_dtype,
                                                                           Collectives& comm, Say say) {
  // Read now: a model folder that goes away during the run takes no checkpoint with it.
  absl::StatusOr<HfFiles> files = HfFiles();
  if (comm.rank() == 0) {
    files = ReadHfFiles(options.model_dir, options.tokenizer_dir, options.data.chat_template, compute_dtype);
  }
  SIMPO_RETURN_IF_ERROR(AgreeOn(files.status(), comm, "reading the model's small files"));
  return std::unique_ptr<CheckpointPolicy>(new CheckpointPolicy(options, *std::move(files), comm, std::move(say)));
}

CheckpointPolicy::CheckpointPolicy(const TrainOptions& options, HfFiles hf_files, Collectives& comm, Say say)
    : options_(options),
      dir_(options.output_dir / "checkpoints"),
      comm_(comm),
      say_(std::move(say)),
      writer_({.checkpoints_dir = dir_, .hf_files = std::move(hf_files)}, comm) {}

absl::StatusOr<std::optional<fs::path>> CheckpointPolicy::WhereToResume() {
  const std::string& given = options_.config.resume_from_checkpoint;
  std::optional<fs::path> from;
  if (options_.resume_latest || given == "true") {
    std::vector<std::string> skipped;
    SIMPO_ASSIGN_OR_RETURN(from, LatestCheckpoint(dir_, comm_, &skipped));
    for (const std::string& reason : skipped) say_("checkpoint", absl::StrCat("skipped ", reason), 0);
  }
  // An attempt that left no checkpoint of its own is followed by one that begins where it began.
  if (!from && !given.empty() && given != "true") from = given;
  return from;
}

void CheckpointPolicy::Resumed(const fs::path& from, const TrainerState& state) {
  // Another run's checkpoint is not this run's to remove.
  const fs::path folder = fs::absolute(from).lexically_normal().parent_path();
  if (folder == dir_.lexically_normal() && state.extra.contains(kRecovery)) recovery_ = from;
  const auto metric = state.extra.find(kBestMetric);
  const auto step = state.extra.find(kBestStep);
  if (!options_.config.load_best_model_at_end || metric == state.extra.end() || step == state.extra.end()) return;
  best_ = {.metric = metric->second, .step = static_cast<int64_t>(step->second)};
  const auto saved = state.extra.find(kBestCheckpointStep);
  if (saved == state.extra.end()) return;
  const auto checkpoint_step = static_cast<int64_t>(saved->second);
  const fs::path checkpoint = folder / CheckpointName(checkpoint_step);
  std::error_code error;
  const bool there = !BroadcastText(fs::exists(checkpoint, error) ? "yes" : "", 0, comm_).empty();
  if (!there) {
    say_("checkpoint_failed", absl::StrCat("the best checkpoint so far, ", checkpoint.string(), ", is gone"), 0);
    return;
  }
  best_->checkpoint_step = checkpoint_step;
  best_->checkpoint = checkpoint;
}

bool CheckpointPolicy::RecoveryDue() const {
  const double minutes = options_.config.recovery_minutes;
  return is_root() && minutes > 0 && !writer_.under_way() &&
         Clock::now() - last_ > std::chrono::duration<double>(minutes * 60);
}

std::string CheckpointPolicy::BestMetricName() const {
  const std::string& name = options_.config.metric_for_best_model;
  return name.starts_with(kEvalPrefix) ? name : absl::StrCat(std::string(kEvalPrefix), name);
}

// By the rules of transformers' Trainer.
absl::Status CheckpointPolicy::Evaluated(int64_t step, const std::map<std::string, double>& metrics) {
  const JobConfig& config = options_.config;
  if (!config.load_best_model_at_end) return absl::OkStatus();
  const std::string name = BestMetricName();
  const auto it = metrics.find(name);
  if (it == metrics.end()) {
    return absl::FailedPreconditionError(
        absl::StrCat("metric_for_best_model: evaluations have no ", name, "; they have ",
                     absl::StrJoin(metrics, ", ", [](std::string* out, const auto& item) { *out += item.first; })));
  }
  const bool greater = config.greater_is_better.empty() ? !name.ends_with("loss") : config.greater_is_better == "true";
  const double value = it->second;
  const bool first = !best_.has_value() && value == value;
  const bool better = best_.has_value() && (greater ? value > best_->metric : value < best_->metric);
  if (!first && !better) return absl::OkStatus();
  if (first) best_ = Best();
  best_->metric = value;
  best_->step = step;
  return absl::OkStatus();
}

absl::Status CheckpointPolicy::Save(const ShardedParams& params, TrainerState state, Kind kind) {
  SIMPO_RETURN_IF_ERROR(Finish());
  kind_ = kind;
  step_ = state.step;
  last_ = Clock::now();
  if (kind != Kind::kUsers) state.extra[kRecovery] = 1;
  if (best_) {
    const bool is_best = kind == Kind::kUsers && best_->step == state.step;
    const int64_t checkpoint_step = is_best ? state.step : best_->checkpoint_step;
    state.extra[kBestMetric] = best_->metric;
    state.extra[kBestStep] = static_cast<double>(best_->step);
    if (checkpoint_step >= 0) state.extra[kBestCheckpointStep] = static_cast<double>(checkpoint_step);
  }
  if (absl::Status status = writer_.Begin(params, state, kind != Kind::kStop); !status.ok()) return Failed(status);
  return kind == Kind::kStop ? Finish() : absl::OkStatus();
}

absl::Status CheckpointPolicy::Finish() {
  if (!writer_.under_way()) return absl::OkStatus();
  const absl::StatusOr<CheckpointWriter::Report> report = writer_.Finish();
  if (!report.ok()) return Failed(report.status());
  if (kind_ == Kind::kUsers && best_ && best_->step == step_) {
    best_->checkpoint_step = step_;
    best_->checkpoint = report->path;
  }
  if (is_root()) ClearAway(report->path);
  recovery_ = kind_ == Kind::kUsers ? fs::path() : report->path;
  say_("checkpoint", InWords(step_, *report), step_);
  return absl::OkStatus();
}

absl::Status CheckpointPolicy::Failed(const absl::Status& status) {
  const std::string problem =
      absl::StrCat("the checkpoint after step ", step_, " failed: ", std::string(status.message()));
  if (kind_ != Kind::kRecovery) {
    return absl::Status(status.code(), absl::StrCat(problem, ". Earlier checkpoints are as they were"));
  }
  say_("checkpoint_failed",
       absl::StrFormat("%s. It was for recovery only: training goes on, and in %g minutes another is tried", problem,
                       options_.config.recovery_minutes),
       step_);
  return absl::OkStatus();
}

// The recovery checkpoint rolls; the user's own stay within save_total_limit. What cannot be removed is
// no reason to end a run.
void CheckpointPolicy::ClearAway(const fs::path& written) {
  absl::Status status;
  if (!recovery_.empty() && recovery_ != written) status = RemoveFolder(recovery_);
  if (kind_ == Kind::kUsers && status.ok()) {
    const std::array<fs::path, 2> protect = {written, best_ ? best_->checkpoint : fs::path()};
    status =
        PruneCheckpoints(dir_, options_.config.save_total_limit, std::span(protect).first(protect[1].empty() ? 1 : 2));
  }
  SayIfItStays(status);
}

void CheckpointPolicy::SayIfItStays(const absl::Status& removed) {
  if (removed.ok()) return;
  say_("checkpoint_failed", absl::StrCat("an old checkpoint stays: ", std::string(removed.message())), step_);
}

absl::StatusOr<std::string> CheckpointPolicy::LoadBest(int64_t steps_done, ShardedParams& params) {
  if (!best_ || best_->step == steps_done || best_->checkpoint.empty()) return "";
  SIMPO_ASSIGN_OR_RETURN(const TrainerState state, LoadCheckpoint(best_->checkpoint, params, comm_));
  const auto metric = state.extra.find(kBestMetric);
  return absl::StrFormat("the best checkpoint, after step %d, %s %g", state.step, BestMetricName(),
                         metric == state.extra.end() ? best_->metric : metric->second);
}

void CheckpointPolicy::RemoveRecovery() {
  if (!is_root() || recovery_.empty()) return;
  SayIfItStays(RemoveFolder(recovery_));
}

}  // namespace simpo
