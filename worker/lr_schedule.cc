#include "worker/lr_schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace simpo {

LrSchedule LrSchedule::FromConfig(const JobConfig& config, int64_t total_steps) {
  int64_t warmup = config.warmup_steps;
  if (warmup < 0) warmup = static_cast<int64_t>(std::ceil(config.warmup_ratio * static_cast<double>(total_steps)));
  if (config.lr_scheduler_type == "constant") warmup = 0;
  return {.type = config.lr_scheduler_type, .base = config.learning_rate, .warmup = warmup, .total = total_steps};
}

double LrSchedule::Rate(int64_t update) const {
  const auto k = static_cast<double>(update);
  const auto w = static_cast<double>(warmup);
  const auto t = static_cast<double>(total);
  if (update < warmup) return base * k / std::max(1.0, w);
  if (type == "cosine") {
    const double progress = (k - w) / std::max(1.0, t - w);
    return base * std::max(0.0, 0.5 * (1.0 + std::cos(std::numbers::pi * progress)));
  }
  if (type == "linear") return base * std::max(0.0, (t - k) / std::max(1.0, t - w));
  return base;
}

}  // namespace simpo
