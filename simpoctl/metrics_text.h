#ifndef SIMPO_SIMPOCTL_METRICS_TEXT_H_
#define SIMPO_SIMPOCTL_METRICS_TEXT_H_

#include <string>
#include <vector>

#include "simpo/v1/job.pb.h"
#include "simpo/v1/training_service.pb.h"

namespace simpo {

// Metric points with every digit: numbers read back as the same doubles.
// CSV: step, attempt, time, then every metric that any point has, by name; empty where a point lacks it.
std::string MetricsCsv(const std::vector<v1::MetricPoint>& points);
// An array of objects, one per line.
std::string MetricsJson(const std::vector<v1::MetricPoint>& points);

// That points of an old job are gone, for people.
std::string ThinnedNote(const v1::ListMetricsResponse& response);

}  // namespace simpo

#endif  // SIMPO_SIMPOCTL_METRICS_TEXT_H_
