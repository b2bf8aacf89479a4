#include "worker/advice.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "worker/lr_schedule.h"

namespace simpo {
namespace {

// Signs are read from means over this many steps: single batches are noisy.
constexpr size_t kWindow = 10;
// SimPO's published rates lie between 3e-7 and 1e-6 (arXiv 2405.14734, table 7).
constexpr double kHighRate = 1e-5;
// A mean loss this much above the start is no noise.
constexpr double kLossRise = 1.5;
// Nats per token by which *both* responses must have become less likely.
constexpr double kForgottenNats = 1.0;
// A margin that has moved by less than this share of the target margin is flat.
constexpr double kFlatShare = 0.05;
constexpr int64_t kFlatSteps = 50;
constexpr double kFlatRunShare = 0.3;

constexpr const char* kKinds[] = {"rate", "divergence", "forgetting", "flat_margin"};

}  // namespace

Advisor::Advisor(const JobConfig& config, int64_t total_steps)
    : config_(config), total_steps_(total_steps), warmup_steps_(LrSchedule::FromConfig(config, total_steps).warmup) {}

std::vector<std::string> Advisor::BeforeTraining() {
  if (config_.learning_rate < kHighRate || !said_.insert("rate").second) return {};
  return {absl::StrFormat(
      "learning_rate %g is high for SimPO: at 1e-5 and above models often fall apart (answers that repeat or make no "
      "sense) while the loss looks well. The published runs used 3e-7 to 1e-6",
      config_.learning_rate)};
}

Advisor::Means Advisor::RecentMeans() const {
  Means sum;
  for (const Means& step : recent_) {
    sum.loss += step.loss;
    sum.logps_chosen += step.logps_chosen;
    sum.logps_rejected += step.logps_rejected;
    sum.margin += step.margin;
  }
  const auto n = static_cast<double>(recent_.size());
  return {sum.loss / n, sum.logps_chosen / n, sum.logps_rejected / n, sum.margin / n};
}

std::optional<std::string> Advisor::Divergence(const Means& now) const {
  if (!(now.loss > kLossRise * start_->loss)) return std::nullopt;
  return absl::StrFormat(
      "the loss rises: %.4f over the last %d steps, %.4f at the start. Lower learning_rate (%g), to a third for "
      "example, and begin again from an earlier checkpoint",
      now.loss, kWindow, start_->loss, config_.learning_rate);
}

std::optional<std::string> Advisor::Forgetting(const Means& now) const {
  const double chosen = start_->logps_chosen - now.logps_chosen;
  const double rejected = start_->logps_rejected - now.logps_rejected;
  if (!(chosen > std::max(kForgottenNats, -start_->logps_chosen) && rejected > kForgottenNats)) return std::nullopt;
  return absl::StrFormat(
      "the model forgets: the log-probability per token of chosen responses fell from %.3f to %.3f, of rejected ones "
      "from %.3f to %.3f. The margin alone does not show it. Add sft_weight (0.1 for example; now %g) or lower beta "
      "(now %g) or learning_rate (now %g)",
      start_->logps_chosen, now.logps_chosen, start_->logps_rejected, now.logps_rejected, config_.sft_weight,
      config_.beta, config_.learning_rate);
}

std::optional<std::string> Advisor::FlatMargin(const Means& now) const {
  const double target = config_.beta * std::max(config_.gamma_beta_ratio, 0.1);
  if (!(std::abs(now.margin - start_->margin) < kFlatShare * target)) return std::nullopt;
  return absl::StrFormat(
      "the reward margin is flat: %.4f at the start, %.4f now, with a target of %.4f (beta x gamma_beta_ratio). Raise "
      "beta (now %g) or gamma_beta_ratio (now %g), or learning_rate (now %g) if it is below the published ones; and "
      "look whether chosen and rejected differ in more than noise",
      start_->margin, now.margin, config_.beta * config_.gamma_beta_ratio, config_.beta, config_.gamma_beta_ratio,
      config_.learning_rate);
}

std::vector<std::string> Advisor::AfterStep(int64_t step, const std::map<std::string, double>& metrics) {
  recent_.push_back(
      {metrics.at("loss"), metrics.at("logps/chosen"), metrics.at("logps/rejected"), metrics.at("rewards/margins")});
  if (recent_.size() > kWindow) recent_.pop_front();
  if (recent_.size() < kWindow) return {};
  const Means now = RecentMeans();
  if (!start_) {
    start_ = now;
    return {};
  }
  std::vector<std::string> advice;
  const auto say = [&](const char* kind, const std::optional<std::string>& text) {
    if (text && said_.insert(kind).second) advice.push_back(*text);
  };
  say("divergence", Divergence(now));
  say("forgetting", Forgetting(now));
  const bool long_enough = step >= std::max(warmup_steps_ + kFlatSteps,
                                            static_cast<int64_t>(kFlatRunShare * static_cast<double>(total_steps_)));
  if (long_enough) say("flat_margin", FlatMargin(now));
  return advice;
}

std::map<std::string, double> Advisor::State() const {
  std::map<std::string, double> state;
  for (const std::string& kind : said_) state["advice/said/" + kind] = 1;
  if (!start_) return state;
  state["advice/start/loss"] = start_->loss;
  state["advice/start/logps_chosen"] = start_->logps_chosen;
  state["advice/start/logps_rejected"] = start_->logps_rejected;
  state["advice/start/margin"] = start_->margin;
  return state;
}

void Advisor::Restore(const std::map<std::string, double>& state) {
  for (const char* kind : kKinds) {
    if (state.contains(absl::StrCat("advice/said/", kind))) said_.insert(kind);
  }
  const auto value = [&](const char* name) { return state.at(absl::StrCat("advice/start/", name)); };
  if (state.contains("advice/start/loss") && state.contains("advice/start/logps_chosen") &&
      state.contains("advice/start/logps_rejected") && state.contains("advice/start/margin")) {
    start_ = {value("loss"), value("logps_chosen"), value("logps_rejected"), value("margin")};
  }
}

MemoryNeed EstimateMemory(const ModelConfig& model, const ShardingOptions& sharding, int world_size) {
  // Parameters of each bucket, the largest first.
  std::map<int64_t, double> by_layer;
  double psi = 0;
  for (const WeightSpec& weight : ModelWeights(model)) {
    double numel = 1;
    for (int64_t size : weight.shape) numel *= static_cast<double>(size);
    by_layer[weight.layer] += numel;
    psi += numel;
  }
  std::vector<double> buckets;
  buckets.reserve(by_layer.size());
  for (const auto& [layer, numel] : by_layer) buckets.push_back(numel);
  std::sort(buckets.rbegin(), buckets.rend());
  const double two_buckets = buckets[0] + buckets[1];

  const double shard = sharding.zero_stage == 0 ? psi : psi / world_size;
  const double compute_bytes = sharding.compute_dtype == at::kBFloat16 ? 2 : 4;
  const bool separate_master = sharding.compute_dtype != at::kFloat || sharding.offload_optimizer;
  MemoryNeed need{.weights = compute_bytes * (sharding.zero_stage == 3 ? shard : psi),
                  .grads = 4 * (sharding.shards_gradients() ? shard : psi),
                  .optimizer = (separate_master ? 12 : 8) * shard,
                  .in_flight = (sharding.zero_stage == 3 ? compute_bytes * two_buckets : 0) +
                               (sharding.shards_gradients() ? 4 * two_buckets : 0)};
  need.on_host = sharding.device.is_cpu() ? need.total() : sharding.offload_optimizer ? need.grads + need.optimizer : 0;
  need.on_device = need.total() - need.on_host;
  return need;
}

std::optional<std::string> MemoryAdvice(const MemoryNeed& need, const ShardingOptions& sharding, int ranks_here,
                                        double bytes) {
  const double all = need.on_host * ranks_here;
  if (all <= bytes) return std::nullopt;
  std::vector<std::string> remedies;
  if (sharding.zero_stage < 3 && ranks_here > 1) remedies.push_back("set zero_stage: 3");
  if (sharding.compute_dtype == at::kFloat) remedies.push_back("set torch_dtype: bfloat16 (half the weights)");
  remedies.push_back("spread the job over more machines");
  remedies.push_back("take a smaller model");
  return absl::StrFormat(
      "memory does not fit: %.1f GB of weights, %.1f GB of gradients, %.1f GB of optimizer state and %.1f GB for what "
      "is "
      "under way on each of %d ranks are %.1f GB, before any activations; this machine has %.1f GB. What helps: %s",
      need.weights / 1e9, need.grads / 1e9, need.optimizer / 1e9, need.in_flight / 1e9, ranks_here, all / 1e9,
      bytes / 1e9, absl::StrJoin(remedies, "; "));
}

}  // namespace simpo
