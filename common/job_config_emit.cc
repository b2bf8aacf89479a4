// JobConfig back to a job file.
#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/job_config_yaml.h"
#include "common/job_keys.h"
#include "common/job_values.h"

namespace simpo {
namespace {

constexpr std::string_view kResources = "resources.";
// YAML takes a key of at most 1024 characters before its colon; a longer one stands behind a question mark.
constexpr size_t kMaxSimpleKeyBytes = 1000;

// Values that say "not given" by being empty have no line; false when this is one.
template <typename T>
bool HasLine(const T& value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return true;
  } else {
    return !value.empty();
  }
}

// Text is always quoted, so that no word of it means anything to YAML. The library's emitter asks that of every key
// and value anew and takes most of the time of a submit; what needs more than quotes is left to it.
std::string Quoted(const std::string& text) {
  const bool plain =
      std::all_of(text.begin(), text.end(), [](char c) { return c >= 0x20 && c < 0x7f && c != '"' && c != '\\'; });
  if (plain) return absl::StrCat("\"", text, "\"");
  YAML::Emitter out;
  out << YAML::DoubleQuoted << text;
  return out.c_str();
}

// What follows a key and its colon, with the end of the line. `indent` is that of the key.
std::string ValueText(const std::string& value, int) { return absl::StrCat(" ", Quoted(value), "\n"); }
std::string ValueText(bool value, int) { return value ? " true\n" : " false\n"; }
std::string ValueText(int32_t value, int) { return absl::StrCat(" ", value, "\n"); }
std::string ValueText(int64_t value, int) { return absl::StrCat(" ", value, "\n"); }
std::string ValueText(double value, int) { return absl::StrCat(" ", NumberText(value), "\n"); }
std::string ValueText(const std::vector<std::string>& words, int) {
  return absl::StrCat(
      " [", absl::StrJoin(words, ", ", [](std::string* out, const std::string& word) { *out += Quoted(word); }), "]\n");
}
template <typename Map>
std::string ValueText(const Map& map, int indent) {
  std::string text = "\n";
  for (const auto& [key, value] : map) {
    const std::string spaces(static_cast<size_t>(indent) + 2, ' ');
    const std::string quoted = Quoted(key);
    const bool is_long = quoted.size() > kMaxSimpleKeyBytes;
    absl::StrAppend(&text, spaces, is_long ? "? " : "", quoted, is_long ? "\n" + spaces : "", ":",
                    ValueText(value, indent + 2));
  }
  return text;
}

}  // namespace

std::string JobConfigToYaml(const JobConfig& config) {
  std::string text;
  bool in_resources = false;
  for (const JobKeyRow& row : JobKeyRows()) {
    std::string_view name = row.key.name;
    const bool resource = name.starts_with(kResources);
    if (resource && !in_resources) text += "resources:\n";
    in_resources = resource;
    if (resource) name.remove_prefix(kResources.size());
    const int indent = resource ? 2 : 0;
    std::visit(
        [&](auto field) {
          const auto& value = config.*field;
          if (!HasLine(value)) return;
          absl::StrAppend(&text, resource ? "  " : "", std::string(name), ":", ValueText(value, indent));
        },
        row.field);
  }
  return text;
}

}  // namespace simpo
