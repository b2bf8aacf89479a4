#ifndef SIMPO_COMMON_METRIC_NAMES_H_
#define SIMPO_COMMON_METRIC_NAMES_H_

#include <span>
#include <string_view>

namespace simpo {

// One metric of a step: what it is called where. Evaluations carry the same keys with the prefix "eval_".
struct MetricName {
  std::string_view key;         // in metrics.jsonl
  std::string_view prometheus;  // the family's name; empty: not exported
  std::string_view response;    // label response="chosen" or "rejected"; empty: no such label
  bool in_eval = false;         // evaluations have it too, so its series carry the label split
  bool is_counter = false;      // grows during a run; otherwise a gauge
  std::string_view unit;        // "" for a plain number
  std::string_view help;        // of the family, one sentence
};

// Every metric, families together.
std::span<const MetricName> MetricNames();

inline constexpr std::string_view kEvalPrefix = "eval_";

}  // namespace simpo

#endif  // SIMPO_COMMON_METRIC_NAMES_H_
