#ifndef SIMPO_COMMON_JOB_CONFIG_YAML_H_
#define SIMPO_COMMON_JOB_CONFIG_YAML_H_

#include <cstddef>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "common/job_config.h"

namespace simpo {

constexpr size_t kMaxJobFileBytes = 1 << 20;
constexpr size_t kMaxPathBytes = 4096;  // of Linux

// One thing that is wrong with a job file.
struct FieldViolation {
  std::string field;        // the key, dotted when nested; empty for the file as a whole
  int line = 0;             // from 1; 0 when it came from --set or is missing
  std::string description;  // what is wrong and what to write instead
};

struct JobParseOptions {
  std::string file_name = "job.yaml";  // for messages
  std::string base_dir;                // absolute; relative input paths start here. Empty: the working directory
  std::vector<std::string> overrides;  // key=value, as of --set; win over the file
};

struct ParsedJob {
  JobConfig config;
  std::vector<std::string> notes;          // filled-in values, conversions, keys without effect here
  std::vector<FieldViolation> violations;  // empty: the job may run
  std::map<std::string, int> lines;        // of the file's keys and of `resources`, for what is found wrong later
};

// Parses and checks a job file. Never stops at the first mistake: every violation is reported,
// each with its line and, for an unknown key, the nearest known one. Reads only `yaml`
// (and looks which input paths exist). Thread-safe.
ParsedJob ParseJobYaml(std::string_view yaml, const JobParseOptions& options);

// As ParseJobYaml, with violations turned into one INVALID_ARGUMENT whose message lists them all,
// one per line as "file:line: key: description".
absl::StatusOr<ParsedJob> ParseJobYamlOrStatus(std::string_view yaml, const JobParseOptions& options);

// "file:line: key: description" lines for people.
std::string FormatViolations(const std::vector<FieldViolation>& violations, std::string_view file_name);

// The whole config as a job file with every default filled in; parses back to an equal config.
std::string JobConfigToYaml(const JobConfig& config);

}  // namespace simpo

#endif  // SIMPO_COMMON_JOB_CONFIG_YAML_H_
