// JobConfig back to a job file.
#include <yaml-cpp/yaml.h>

#include <type_traits>

#include "common/job_config_yaml.h"
#include "common/job_keys.h"
#include "common/job_values.h"

namespace simpo {
namespace {

constexpr std::string_view kResources = "resources.";

// Values that say "not given" by being empty have no line; false when this is one.
template <typename T>
bool HasLine(const T& value) {
  if constexpr (std::is_arithmetic_v<T>) {
    return true;
  } else {
    return !value.empty();
  }
}

void EmitValue(YAML::Emitter& out, const std::string& value) { out << YAML::DoubleQuoted << value; }
void EmitValue(YAML::Emitter& out, bool value) { out << (value ? "true" : "false"); }
void EmitValue(YAML::Emitter& out, int32_t value) { out << value; }
void EmitValue(YAML::Emitter& out, int64_t value) { out << value; }
void EmitValue(YAML::Emitter& out, double value) { out << NumberText(value); }
void EmitValue(YAML::Emitter& out, const std::vector<std::string>& words) {
  out << YAML::Flow << YAML::BeginSeq;
  for (const std::string& word : words) EmitValue(out, word);
  out << YAML::EndSeq;
}
template <typename Map>
void EmitValue(YAML::Emitter& out, const Map& map) {
  out << YAML::BeginMap;
  for (const auto& [key, value] : map) {
    out << YAML::Key << YAML::DoubleQuoted << key << YAML::Value;
    EmitValue(out, value);
  }
  out << YAML::EndMap;
}

}  // namespace

std::string JobConfigToYaml(const JobConfig& config) {
  YAML::Emitter out;
  out << YAML::BeginMap;
  bool in_resources = false;
  for (const JobKeyRow& row : JobKeyRows()) {
    std::string_view name = row.key.name;
    const bool resource = name.starts_with(kResources);
    if (resource && !in_resources) out << YAML::Key << "resources" << YAML::Value << YAML::BeginMap;
    if (!resource && in_resources) out << YAML::EndMap;
    in_resources = resource;
    if (resource) name.remove_prefix(kResources.size());
    std::visit(
        [&](auto field) {
          const auto& value = config.*field;
          if (!HasLine(value)) return;
          out << YAML::Key << std::string(name) << YAML::Value;
          EmitValue(out, value);
        },
        row.field);
  }
  if (in_resources) out << YAML::EndMap;
  out << YAML::EndMap;
  return std::string(out.c_str()) + "\n";
}

}  // namespace simpo
