// JobConfig back to a job file.
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
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

// Text is always quoted, so that no word of it means anything to YAML. Not by the library's emitter: that takes most of
// the time of a submit, and replaces what Unicode calls no character, as U+FFFF. Escaped is what readers of YAML 1.1
// take for control characters, ends of lines or marks.
std::string Quoted(const std::string& text) {
  std::string quoted = "\"";
  for (size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const unsigned char next = i + 1 < text.size() ? static_cast<unsigned char>(text[i + 1]) : 0;
    if (byte == '"' || byte == '\\') {
      absl::StrAppend(&quoted, "\\", text.substr(i, 1));
    } else if (byte < 0x20 || byte == 0x7f) {
      absl::StrAppend(&quoted, "\\x", absl::Hex(byte, absl::kZeroPad2));
    } else if (byte == 0xc2 && next >= 0x80 && next <= 0xa0) {  // U+0080 to U+00A0
      absl::StrAppend(&quoted, "\\u", absl::Hex(next, absl::kZeroPad4));
      ++i;
    } else {
      quoted += text[i];
    }
  }
  quoted += '"';
  return absl::StrReplaceAll(quoted, {{"\u2028", "\\u2028"}, {"\u2029", "\\u2029"}, {"\ufeff", "\\ufeff"}});
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
