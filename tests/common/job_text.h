#ifndef SIMPO_TESTS_COMMON_JOB_TEXT_H_
#define SIMPO_TESTS_COMMON_JOB_TEXT_H_

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "common/job_config_yaml.h"

namespace simpo {

// The two lines that every job needs.
inline constexpr char kRequired[] = "model_name_or_path: owner/model\ndataset_mixer: {owner/data: 1.0}\n";

// A folder that does not exist: relative names stay as they are unless they can only be paths.
inline constexpr char kBaseDir[] = "/no/such/folder";

inline ParsedJob Parse(const std::string& yaml, std::vector<std::string> overrides = {}) {
  return ParseJobYaml(yaml, {.file_name = "job.yaml", .base_dir = kBaseDir, .overrides = std::move(overrides)});
}

// kRequired and then `yaml`, whose first line is line 3.
inline ParsedJob ParseWith(const std::string& yaml, std::vector<std::string> overrides = {}) {
  return Parse(kRequired + yaml, std::move(overrides));
}

// "line: field: description" of each violation.
inline std::vector<std::string> Problems(const ParsedJob& job) {
  std::vector<std::string> problems;
  for (const FieldViolation& violation : job.violations) {
    problems.push_back(std::to_string(violation.line) + ": " + violation.field + ": " + violation.description);
  }
  return problems;
}

inline JobConfig ConfigOf(const ParsedJob& job) {
  EXPECT_TRUE(job.violations.empty()) << FormatViolations(job.violations, "job.yaml");
  return job.config;
}

}  // namespace simpo

#endif  // SIMPO_TESTS_COMMON_JOB_TEXT_H_
