#include "simpoctl/metrics_text.h"

#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "absl/strings/str_cat.h"
#include "simpoctl/format.h"

namespace simpo {
namespace {

// A field of CSV (RFC 4180): quoted when it must be.
std::string CsvField(const std::string& text) {
  if (text.find_first_of(",\"\r\n") == std::string::npos) return text;
  std::string quoted = "\"";
  for (const char c : text) {
    if (c == '"') quoted += '"';
    quoted += c;
  }
  return quoted + '"';
}

// The columns that every point has.
bool IsFixed(const std::string& name) { return name == "step" || name == "attempt" || name == "time"; }

}  // namespace

std::string MetricsCsv(const std::vector<v1::MetricPoint>& points) {
  std::set<std::string> names;
  for (const v1::MetricPoint& point : points) {
    for (const auto& [name, value] : point.values()) {
      if (!IsFixed(name)) names.insert(name);
    }
  }
  std::string text = "step,attempt,time";
  for (const std::string& name : names) absl::StrAppend(&text, ",", CsvField(name));
  text += '\n';
  for (const v1::MetricPoint& point : points) {
    absl::StrAppend(&text, point.step(), ",", point.attempt(), ",", FormatTime(point.time()));
    for (const std::string& name : names) {
      const double* value = FindMetric(point.values(), name);
      absl::StrAppend(&text, ",", value == nullptr ? "" : ExactNumber(*value));
    }
    text += '\n';
  }
  return text;
}

std::string MetricsJson(const std::vector<v1::MetricPoint>& points) {
  std::string text = "[";
  for (const v1::MetricPoint& point : points) {
    nlohmann::ordered_json line = {
        {"step", point.step()}, {"attempt", point.attempt()}, {"time", FormatTime(point.time())}};
    for (const auto& [name, value] : std::map<std::string, double>(point.values().begin(), point.values().end())) {
      if (!IsFixed(name)) line[name] = ExactJson(value);
    }
    absl::StrAppend(&text, text.size() > 1 ? ",\n" : "\n", line.dump());
  }
  return text + (points.empty() ? "]\n" : "\n]\n");
}

std::string ThinnedNote(const v1::ListMetricsResponse& response) {
  return absl::StrCat("The job ended long ago: since ", ShortTime(response.thinned_time()), " one of every ",
                      response.kept_every(), " steps is kept, and the first and the last (metrics_full_days).\n");
}

}  // namespace simpo
