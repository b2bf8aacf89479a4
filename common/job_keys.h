#ifndef SIMPO_COMMON_JOB_KEYS_H_
#define SIMPO_COMMON_JOB_KEYS_H_

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "common/job_config.h"

namespace simpo {

using DatasetMixer = std::vector<std::pair<std::string, double>>;

// Where a key's value lives in JobConfig.
using JobField = std::variant<std::string JobConfig::*, int32_t JobConfig::*, int64_t JobConfig::*, double JobConfig::*,
                              bool JobConfig::*, DatasetMixer JobConfig::*, std::vector<std::string> JobConfig::*,
                              std::map<std::string, std::string> JobConfig::*>;

// One key of a job file: what people read about it and where the parser puts it. `key.range` is also
// what the parser checks: "a | b" (one of), ">= X", "> X", "X to Y", "X to below Y", or free text.
struct JobKeyRow {
  JobKey key;
  JobField field;
  bool is_path = false;  // a relative value starts at the job file's folder
};
std::span<const JobKeyRow> JobKeyRows();

// Other names of a key, as other trainers write it.
struct JobKeyAlias {
  std::string_view alias;
  std::string_view name;
};
std::span<const JobKeyAlias> JobKeyAliases();

// A key of other trainers that says the same in another way (see job_foreign_keys.cc).
struct ConvertedJobKey {
  std::string_view name;
  std::string_view sets;     // the key of the table that it sets; empty when it sets none
  std::string_view becomes;  // how, for people
};
std::span<const ConvertedJobKey> ConvertedJobKeys();

// A key of TRL, transformers or alignment-handbook without effect here, and what happens instead.
struct IgnoredJobKey {
  std::string_view name;  // "ddp_*": every key that begins so
  std::string_view instead;
};
std::span<const IgnoredJobKey> IgnoredJobKeys();

// A key that would change the result and is not built: an error unless its value switches it off.
struct RefusedJobKey {
  std::string_view name;  // "lora_*": every key that begins so
  std::string_view reason;
  std::string_view unless;  // a switch without which the key means nothing; "" when it has none
};
std::span<const RefusedJobKey> RefusedJobKeys();

// Whether `key` is `pattern`, or begins as a pattern that ends in '*' does.
bool MatchesJobKey(std::string_view pattern, std::string_view key);

}  // namespace simpo

#endif  // SIMPO_COMMON_JOB_KEYS_H_
