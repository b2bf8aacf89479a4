#include "common/metrics_line.h"

#include <limits>
#include <nlohmann/json.hpp>

namespace simpo {
namespace {

// JSON has no number for the non-finite ones.
std::optional<double> ParseValue(const nlohmann::json& json) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (json.is_number()) return json.get<double>();
  if (json == "NaN") return std::numeric_limits<double>::quiet_NaN();
  if (json == "Infinity") return kInfinity;
  if (json == "-Infinity") return -kInfinity;
  return std::nullopt;
}

}  // namespace

std::optional<ParsedMetrics> ParseMetricsLine(std::string_view line) {
  const auto json = nlohmann::json::parse(line.begin(), line.end(), nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer()) return std::nullopt;
  ParsedMetrics metrics{.step = json["step"].get<int64_t>()};
  for (const auto& [name, value] : json.items()) {
    const std::optional<double> number = ParseValue(value);
    if (name != "step" && number) metrics.values[name] = *number;
  }
  return metrics;
}

}  // namespace simpo
