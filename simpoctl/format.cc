#include "simpoctl/format.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <ctime>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/text.h"

namespace simpo {
namespace {

constexpr double kExactIntegers = 9007199254740992.0;  // 2^53

std::string FormatUtc(int64_t seconds, const char* format) {
  const auto time = static_cast<std::time_t>(seconds);
  std::tm utc{};
  gmtime_r(&time, &utc);
  char text[64];
  text[std::strftime(text, sizeof(text), format, &utc)] = '\0';
  return text;
}

// A count, which is not written as 1e+05. -0 is none: it must read back as -0.
bool IsWhole(double value) {
  return value == std::floor(value) && std::abs(value) < kExactIntegers && (value != 0 || !std::signbit(value));
}

bool IsUnset(const google::protobuf::Timestamp& time) { return time.seconds() == 0 && time.nanos() == 0; }

void Emit(const nlohmann::ordered_json& json, YAML::Emitter& out) {
  if (json.is_object()) {
    out << YAML::BeginMap;
    for (const auto& [key, value] : json.items()) {
      out << YAML::Key << key << YAML::Value;
      Emit(value, out);
    }
    out << YAML::EndMap;
  } else if (json.is_array()) {
    out << YAML::BeginSeq;
    for (const auto& value : json) Emit(value, out);
    out << YAML::EndSeq;
  } else if (json.is_string()) {
    const auto& text = json.get_ref<const std::string&>();
    if (text.find('\n') == std::string::npos) {
      out << YAML::DoubleQuoted << text;
    } else {
      out << YAML::Literal << text;
    }
  } else if (json.is_null()) {
    out << YAML::Null;
  } else {
    out << json.dump();
  }
}

}  // namespace

std::string ExactNumber(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  if (IsWhole(value)) return absl::StrCat(static_cast<int64_t>(value));
  char text[32];
  const std::to_chars_result result = std::to_chars(text, text + sizeof(text), value);
  return std::string(text, result.ptr);
}

nlohmann::ordered_json ExactJson(double value) {
  if (!std::isfinite(value)) return ExactNumber(value);
  if (IsWhole(value)) return static_cast<int64_t>(value);
  return value;
}

std::string ShortNumber(double value) {
  if (!std::isfinite(value)) return ExactNumber(value);
  return absl::StrFormat("%.4g", value);
}

std::string FormatDuration(double seconds) {
  if (!std::isfinite(seconds) || seconds < 0) return "-";
  if (seconds < 9.95) return absl::StrFormat("%.1fs", seconds);
  const auto total = static_cast<int64_t>(std::llround(std::min(seconds, 1e15)));
  if (total < 60) return absl::StrFormat("%ds", total);
  if (total < 3600) return absl::StrFormat("%dm%02ds", total / 60, total % 60);
  if (total < 86400) return absl::StrFormat("%dh%02dm", total / 3600, total % 3600 / 60);
  return absl::StrFormat("%dd%02dh", total / 86400, total % 86400 / 3600);
}

std::string FormatTime(const google::protobuf::Timestamp& time) {
  if (IsUnset(time)) return "";
  std::string text = FormatUtc(time.seconds(), "%Y-%m-%dT%H:%M:%S");
  if (time.nanos() > 0) absl::StrAppendFormat(&text, ".%03d", time.nanos() / 1000000);
  return text + "Z";
}

std::string ShortTime(const google::protobuf::Timestamp& time) {
  return IsUnset(time) ? "-" : FormatUtc(time.seconds(), "%Y-%m-%d %H:%M:%SZ");
}

double SecondsBetween(const google::protobuf::Timestamp& from, const google::protobuf::Timestamp& to) {
  return static_cast<double>(to.seconds() - from.seconds()) + (to.nanos() - from.nanos()) * 1e-9;
}

google::protobuf::Timestamp Now() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  const auto seconds = std::chrono::duration_cast<std::chrono::seconds>(now);
  google::protobuf::Timestamp time;
  time.set_seconds(seconds.count());
  time.set_nanos(static_cast<int32_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(now - seconds).count()));
  return time;
}

std::string StateName(v1::JobState state) {
  const std::string& name = v1::JobState_Name(state);
  if (name.empty()) return absl::StrCat("STATE_", static_cast<int>(state));  // of a newer coordinator
  return name.substr(std::string("JOB_STATE_").size());
}

v1::JobState ParseState(std::string_view name) {
  std::string upper = absl::AsciiStrToUpper(std::string(name));
  if (!absl::StartsWith(upper, "JOB_STATE_")) upper = "JOB_STATE_" + upper;
  v1::JobState state = v1::JOB_STATE_UNSPECIFIED;
  return v1::JobState_Parse(upper, &state) ? state : v1::JOB_STATE_UNSPECIFIED;
}

bool IsFinal(v1::JobState state) {
  return state == v1::JOB_STATE_SUCCEEDED || state == v1::JOB_STATE_FAILED || state == v1::JOB_STATE_CANCELLED;
}

Color StateColor(v1::JobState state) {
  switch (state) {
    case v1::JOB_STATE_SUCCEEDED:
      return Color::kGreen;
    case v1::JOB_STATE_FAILED:
      return Color::kRed;
    case v1::JOB_STATE_RUNNING:
      return Color::kCyan;
    case v1::JOB_STATE_RESTARTING:
    case v1::JOB_STATE_PREEMPTING:
    case v1::JOB_STATE_CANCELLING:
    case v1::JOB_STATE_CANCELLED:
      return Color::kYellow;
    default:
      return Color::kNone;
  }
}

std::string FormatTable(const std::vector<std::vector<std::string>>& rows) {
  std::vector<int> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], DisplayWidth(OneLine(row[i])));
  }
  std::string text;
  for (const auto& row : rows) {
    std::string line;
    for (size_t i = 0; i < row.size(); ++i) {
      const std::string cell = OneLine(row[i]);
      line += cell;
      if (i + 1 < row.size()) line.append(static_cast<size_t>(widths[i] - DisplayWidth(cell) + 2), ' ');
    }
    text += std::string(absl::StripTrailingAsciiWhitespace(line)) + "\n";
  }
  return text;
}

const double* FindMetric(const google::protobuf::Map<std::string, double>& metrics, const std::string& name) {
  const auto found = metrics.find(name);
  return found == metrics.end() ? nullptr : &found->second;
}

std::string MetricSummary(const google::protobuf::Map<std::string, double>& metrics, const std::string& prefix) {
  std::string text;
  auto add = [&](const char* label, const std::string& value) {
    absl::StrAppend(&text, text.empty() ? "" : "  ", label, " ", value);
  };
  if (const double* loss = FindMetric(metrics, prefix + "loss")) add("loss", ShortNumber(*loss));
  if (const double* margin = FindMetric(metrics, prefix + "rewards/margins")) add("margin", ShortNumber(*margin));
  if (const double* accuracy = FindMetric(metrics, prefix + "rewards/accuracies")) {
    add("accuracy", absl::StrFormat("%.1f %%", 100 * *accuracy));
  }
  if (const double* norm = FindMetric(metrics, prefix + "grad_norm")) add("grad norm", ShortNumber(*norm));
  if (const double* rate = FindMetric(metrics, prefix + "learning_rate")) add("rate", ShortNumber(*rate));
  return text;
}

std::string ToYaml(const nlohmann::ordered_json& json) {
  YAML::Emitter out;
  Emit(json, out);
  return std::string(out.c_str()) + "\n";
}

}  // namespace simpo
