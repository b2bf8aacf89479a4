#ifndef SIMPO_COMMON_JOB_ENTRIES_H_
#define SIMPO_COMMON_JOB_ENTRIES_H_

#include <yaml-cpp/yaml.h>

#include <list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "common/job_config_yaml.h"
#include "common/text.h"

namespace simpo {

// One `key: value` of the file or of --set. Its constants keep it from being assigned to: assigning to a
// YAML::Node changes every other handle of the old node too.
struct JobEntry {
  std::string key;  // the table's name of it, nested keys dotted
  YAML::Node value;
  const int line = 0;         // 0: from --set
  const std::string written;  // as the user wrote the key
};

// What is gathered while a job file is read. What is told of it can be shown, whatever the file holds: keys, reasons
// and notes are single lines of bounded length.
struct JobReading {
  static constexpr size_t kMaxViolations = 100;
  static constexpr size_t kMaxKeyBytes = 160;
  static constexpr size_t kMaxTextBytes = 900;

  std::list<JobEntry> entries;
  std::vector<std::string> notes;
  std::vector<FieldViolation> violations;
  int64_t violations_left_out = 0;

  void Violation(std::string_view field, int line, std::string_view description) {
    if (IsFull()) {
      ++violations_left_out;
    } else {
      violations.push_back({OneLine(field, kMaxKeyBytes), line, OneLine(description, kMaxTextBytes)});
    }
  }
  void Note(std::string_view text) {
    if (notes.size() < kMaxViolations) notes.push_back(OneLine(text, kMaxTextBytes));
  }
  bool IsFull() const { return violations.size() >= kMaxViolations; }
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
