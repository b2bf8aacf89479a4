#ifndef SIMPO_SIMPOCTL_FORMAT_H_
#define SIMPO_SIMPOCTL_FORMAT_H_

#include <google/protobuf/timestamp.pb.h>

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "simpo/v1/job.pb.h"
#include "simpoctl/terminal.h"

// How single values look: pure functions, one spelling for all commands.
namespace simpo {

// For machines: the shortest text that reads back as the same double; "NaN", "Infinity", "-Infinity".
std::string ExactNumber(double value);
// The same as JSON; the three that JSON lacks are strings, as in metrics.jsonl.
nlohmann::ordered_json ExactJson(double value);
// For people: four significant digits.
std::string ShortNumber(double value);

// "45s", "2m05s", "1h04m", "2d03h".
std::string FormatDuration(double seconds);
// "2026-01-31T12:00:00.250Z"; empty when it is not set. Seconds alone when they are whole.
std::string FormatTime(const google::protobuf::Timestamp& time);
// "2026-01-31 12:00:00Z", for people.
std::string ShortTime(const google::protobuf::Timestamp& time);
double SecondsBetween(const google::protobuf::Timestamp& from, const google::protobuf::Timestamp& to);
google::protobuf::Timestamp Now();

// "RUNNING"; and back, in any case, with or without JOB_STATE_. UNSPECIFIED when it is no state.
std::string StateName(v1::JobState state);
v1::JobState ParseState(std::string_view name);
bool IsFinal(v1::JobState state);
Color StateColor(v1::JobState state);

// Columns of equal width, two spaces between them; the first row is the heading.
std::string FormatTable(const std::vector<std::vector<std::string>>& rows);

// The value of a metric, or nothing when the map lacks it.
const double* FindMetric(const google::protobuf::Map<std::string, double>& metrics, const std::string& name);
// "loss 0.512  margin 0.83  accuracy 78.1 %": what people look at first, of those that are there.
std::string MetricSummary(const google::protobuf::Map<std::string, double>& metrics, const std::string& prefix);

// JSON as YAML for people: block style, long texts as literals.
std::string ToYaml(const nlohmann::ordered_json& json);

}  // namespace simpo

#endif  // SIMPO_SIMPOCTL_FORMAT_H_
