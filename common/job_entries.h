#ifndef SIMPO_COMMON_JOB_ENTRIES_H_
#define SIMPO_COMMON_JOB_ENTRIES_H_

#include <yaml-cpp/yaml.h>

#include <list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/job_config_yaml.h"

namespace simpo {

// One `key: value` of the file or of --set. Its constants keep it from being assigned to: assigning to a
// YAML::Node changes every other handle of the old node too.
struct JobEntry {
  std::string key;  // the table's name of it, nested keys dotted
  YAML::Node value;
  const int line = 0;         // 0: from --set
  const std::string written;  // as the user wrote the key
};

// What is gathered while a job file is read.
struct JobReading {
  std::list<JobEntry> entries;
  std::vector<std::string> notes;
  std::vector<FieldViolation> violations;

  void Violation(std::string field, int line, std::string description) {
    violations.push_back({std::move(field), line, std::move(description)});
  }
  void Note(std::string text) { notes.push_back(std::move(text)); }
  // What an entry of another name says in the table's terms, unless --set says otherwise.
  void AddConverted(std::string key, YAML::Node value, const JobEntry& origin) {
    if (const JobEntry* said = Find(key); said != nullptr && said->line == 0 && origin.line > 0) return;
    entries.push_back({std::move(key), std::move(value), origin.line, origin.written});
  }
  // The entry of a key, or nullptr. Valid until entries change.
  JobEntry* Find(std::string_view key);
  // Removes it from the list.
  std::optional<JobEntry> Take(std::string_view key);
  int LineOf(std::string_view key);
};

// The text of a scalar; empty for anything else.
std::string ScalarText(const YAML::Node& value);
// The number that a scalar holds.
std::optional<double> ScalarNumber(const YAML::Node& value);
// null, false, none, 0: a switch that is off.
bool IsOff(const YAML::Node& value);

// Reads the file's entries and those of --set, which replace the file's. False when the text is no
// list of keys at all; then only violations are filled in.
bool ReadJobEntries(std::string_view yaml, const std::vector<std::string>& overrides, JobReading* reading);

// Rewrites the keys and values of TRL, alignment-handbook and transformers into the table's, with a
// note for each that changes more than a name.
void ConvertForeignKeys(JobReading* reading);

}  // namespace simpo

#endif  // SIMPO_COMMON_JOB_ENTRIES_H_
