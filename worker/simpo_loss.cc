#include "worker/simpo_loss.h"

#include <algorithm>
#include <cmath>

namespace simpo {
namespace {

double LogSigmoid(double x) { return std::min(x, 0.0) - std::log1p(std::exp(-std::abs(x))); }
double Sigmoid(double x) { return x >= 0 ? 1.0 / (1.0 + std::exp(-x)) : std::exp(x) / (1.0 + std::exp(x)); }

}  // namespace

SimpoLoss SimpoLoss::FromConfig(const JobConfig& config) {
  return {.type = config.loss_type == "hinge" ? Type::kHinge : Type::kSigmoid,
          .beta = config.beta,
          .gamma_beta_ratio = config.gamma_beta_ratio,
          .label_smoothing = config.label_smoothing,
          .sft_weight = config.sft_weight};
}

SimpoLoss::PairLoss SimpoLoss::ForPair(double logp_chosen, double logp_rejected) const {
  const double z = beta * (logp_chosen - logp_rejected - gamma_beta_ratio);
  if (type == Type::kHinge) return {.loss = std::max(0.0, 1.0 - z), .d_chosen = z < 1.0 ? -beta : 0.0};
  const double eps = label_smoothing;
  return {.loss = -(1 - eps) * LogSigmoid(z) - eps * LogSigmoid(-z),
          .d_chosen = -beta * ((1 - eps) * Sigmoid(-z) - eps * Sigmoid(z))};
}

std::array<double, SimpoStats::kFields> SimpoStats::ToArray() const {
  return {pairs,           loss,          logps_chosen,    logps_rejected, accuracy,      logits_chosen,
          logits_rejected, tokens_chosen, tokens_rejected, nll_chosen,     source_tokens, truncated};
}

SimpoStats SimpoStats::FromArray(const std::array<double, kFields>& v) {
  return {.pairs = v[0],
          .loss = v[1],
          .logps_chosen = v[2],
          .logps_rejected = v[3],
          .accuracy = v[4],
          .logits_chosen = v[5],
          .logits_rejected = v[6],
          .tokens_chosen = v[7],
          .tokens_rejected = v[8],
          .nll_chosen = v[9],
          .source_tokens = v[10],
          .truncated = v[11]};
}

SimpoStats& SimpoStats::operator+=(const SimpoStats& other) {
  std::array<double, kFields> sum = ToArray();
  const std::array<double, kFields> more = other.ToArray();
  for (size_t i = 0; i < kFields; ++i) sum[i] += more[i];
  return *this = FromArray(sum);
}

}  // namespace simpo
