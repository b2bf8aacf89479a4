#include "common/job_entries.h"

#include <algorithm>
#include <iterator>
#include <set>

#include "absl/strings/str_cat.h"
#include "common/job_keys.h"
#include "common/job_values.h"

namespace simpo {
namespace {

constexpr size_t kMaxFileBytes = 1 << 20;

// The key of the table that this key sets; itself when it is no other name of one.
std::string_view TargetKey(std::string_view key) {
  for (const JobKeyAlias& alias : JobKeyAliases()) {
    if (alias.alias == key) return alias.name;
  }
  for (const ConvertedJobKey& converted : ConvertedJobKeys()) {
    if (converted.name == key && !converted.sets.empty()) return converted.sets;
  }
  return key;
}

void ReadMap(const YAML::Node& map, const std::string& prefix, int override_line, JobReading* reading) {
  std::set<std::string> seen;
  for (const auto& item : map) {
    const int line = override_line >= 0 ? override_line : item.first.Mark().line + 1;
    if (!item.first.IsScalar()) {
      reading->Violation(prefix, line, "a key must be a word");
      continue;
    }
    const std::string key = prefix + item.first.Scalar();
    if (!seen.insert(key).second) {
      reading->Violation(key, line, "the key stands twice; keep one");
    } else if (key == "resources" && item.second.IsMap()) {
      ReadMap(item.second, "resources.", override_line, reading);
    } else if (key == "resources" && !item.second.IsNull()) {
      reading->Violation(key, line, "must be a map, as `resources: {ranks_per_node: 2}`");
    } else if (key != "resources") {
      reading->entries.push_back({key, item.second, line, key});
    }
  }
}

// The text as one YAML map of entries.
bool ReadText(std::string_view yaml, JobReading* reading) {
  if (yaml.size() > kMaxFileBytes) {
    reading->Violation("", 0,
                       absl::StrCat("the file has ", yaml.size(), " bytes; a job file has at most ", kMaxFileBytes));
    return false;
  }
  if (size_t bad = 0; !IsValidUtf8(yaml, &bad)) {
    const auto line = 1 + std::count(yaml.begin(), yaml.begin() + static_cast<std::ptrdiff_t>(bad), '\n');
    reading->Violation("", static_cast<int>(line), "the text is not UTF-8");
    return false;
  }
  const std::vector<YAML::Node> documents = YAML::LoadAll(std::string(yaml));
  if (documents.empty() || documents[0].IsNull()) {
    reading->Violation("", 0, "the file is empty; a job needs at least model_name_or_path and dataset_mixer");
    return false;
  }
  if (documents.size() > 1) {
    reading->Violation("", documents[1].Mark().line + 1, "a second document begins here; a file holds one job");
    return false;
  }
  if (!documents[0].IsMap()) {
    reading->Violation("", documents[0].Mark().line + 1, "a job file is a list of `key: value` lines");
    return false;
  }
  ReadMap(documents[0], "", -1, reading);
  return true;
}

void ReadOverride(const std::string& text, JobReading* reading) {
  const size_t equals = text.find('=');
  if (equals == std::string::npos || equals == 0) {
    reading->Violation(text, 0, "--set takes key=value");
    return;
  }
  const std::string key = text.substr(0, equals);
  if (size_t bad = 0; !IsValidUtf8(text, &bad)) {
    reading->Violation("", 0, "a --set is not UTF-8");
    return;
  }
  try {
    YAML::Node map;
    map[key] = YAML::Load(text.substr(equals + 1));
    ReadMap(map, "", 0, reading);
  } catch (const YAML::Exception& error) {
    reading->Violation(key, 0, absl::StrCat("--set: the value is not valid YAML: ", error.msg));
  }
}

// --set wins over the file, and a later --set over an earlier one. Two keys of the file stay, to be
// refused later.
void DropOverridden(JobReading* reading) {
  std::list<JobEntry>& entries = reading->entries;
  for (auto it = entries.begin(); it != entries.end();) {
    const bool overridden = std::any_of(std::next(it), entries.end(), [&](const JobEntry& later) {
      return later.line == 0 && TargetKey(later.key) == TargetKey(it->key);
    });
    it = overridden ? entries.erase(it) : std::next(it);
  }
}

}  // namespace

JobEntry* JobReading::Find(std::string_view key) {
  for (JobEntry& entry : entries) {
    if (entry.key == key) return &entry;
  }
  return nullptr;
}

std::optional<JobEntry> JobReading::Take(std::string_view key) {
  for (auto it = entries.begin(); it != entries.end(); ++it) {
    if (it->key != key) continue;
    JobEntry entry = *it;
    entries.erase(it);
    return entry;
  }
  return std::nullopt;
}

int JobReading::LineOf(std::string_view key) {
  const JobEntry* entry = Find(key);
  return entry == nullptr ? 0 : entry->line;
}

std::string ScalarText(const YAML::Node& value) { return value.IsScalar() ? value.Scalar() : ""; }

std::optional<double> ScalarNumber(const YAML::Node& value) {
  if (!value.IsScalar()) return std::nullopt;
  return ToNumber(value.Scalar());
}

bool IsOff(const YAML::Node& value) {
  if (value.IsNull()) return true;
  if (!value.IsScalar()) return value.size() == 0;
  const std::string& text = value.Scalar();
  return !ToBool(text).value_or(true) || text == "none" || text == "None" || text.empty() || ToNumber(text) == 0.0;
}

bool ReadJobEntries(std::string_view yaml, const std::vector<std::string>& overrides, JobReading* reading) {
  try {
    if (!ReadText(yaml, reading)) return false;
  } catch (const YAML::Exception& error) {
    reading->Violation("", error.mark.line + 1,
                       absl::StrCat("not valid YAML: ", error.msg, " (column ", error.mark.column + 1, ")"));
    return false;
  }
  for (const std::string& text : overrides) ReadOverride(text, reading);
  DropOverridden(reading);
  return true;
}

}  // namespace simpo
