#ifndef SIMPO_COMMON_METRICS_LINE_H_
#define SIMPO_COMMON_METRICS_LINE_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>

namespace simpo {

// A line of metrics.jsonl or eval_metrics.jsonl, as worker/metrics_log.h writes it.
struct ParsedMetrics {
  int64_t step = 0;
  std::map<std::string, double> values;  // those that are numbers
};

// Nothing: the line is no JSON object with a step.
std::optional<ParsedMetrics> ParseMetricsLine(std::string_view line);

}  // namespace simpo

#endif  // SIMPO_COMMON_METRICS_LINE_H_
