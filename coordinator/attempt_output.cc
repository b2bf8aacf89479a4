#include "coordinator/attempt_output.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "common/text.h"
#include "coordinator/launcher.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

constexpr std::streamoff kTailBytes = 64 << 10;
constexpr size_t kMaxMessageBytes = 4000;
constexpr char kWorkerPrefix[] = "simpo-worker: ";
constexpr char kMpirunPrefix[] = "mpirun noticed that ";

std::vector<std::string> TailLines(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  file.seekg(0, std::ios::end);
  const std::streamoff size = file.tellg();
  if (!file || size <= 0) return {};
  file.seekg(std::max<std::streamoff>(0, size - kTailBytes));
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);) lines.push_back(line);
  return lines;
}

// A line of our own log, or one with which mpirun frames its words: no part of an error message.
bool EndsMessage(const std::string& line) {
  const bool dated = line.size() > 10 && absl::ascii_isdigit(line[0]) && line[4] == '-' && line[10] == 'T';
  return line.empty() || dated || line[0] == '{' || absl::StartsWith(line, "-----");
}

// The last message that begins with `prefix`, over all its lines, without the prefix.
std::string LastMessage(const std::vector<std::string>& lines, absl::string_view prefix) {
  const auto last = std::find_if(lines.rbegin(), lines.rend(),
                                 [&](const std::string& line) { return absl::StartsWith(line, prefix); });
  if (last == lines.rend()) return "";
  auto line = std::prev(last.base());
  std::string message = line->substr(prefix.size());
  for (++line; line != lines.end() && !EndsMessage(*line) && message.size() < kMaxMessageBytes; ++line) {
    absl::StrAppend(&message, "\n", *line);
  }
  return ToUtf8(message, kMaxMessageBytes);  // a log may hold anything
}

std::optional<double> ParseValue(const nlohmann::json& json) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (json.is_number()) return json.get<double>();
  if (json == "NaN") return std::numeric_limits<double>::quiet_NaN();
  if (json == "Infinity") return kInfinity;
  if (json == "-Infinity") return -kInfinity;
  return std::nullopt;
}

}  // namespace

std::string LastWords(const fs::path& log_dir) {
  const fs::path launcher = log_dir / kLauncherLog;
  std::set<fs::path> logs = {launcher};
  std::error_code error;
  for (fs::directory_iterator entry(log_dir, error), end; !error && entry != end; entry.increment(error)) {
    if (absl::StartsWith(entry->path().filename().string(), "rank-")) logs.insert(entry->path());
  }
  for (const fs::path& log : logs) {
    if (std::string message = LastMessage(TailLines(log), kWorkerPrefix); !message.empty()) return message;
  }
  return LastMessage(TailLines(launcher), kMpirunPrefix);
}

std::vector<v1::MetricPoint> ReadMetricsFile(const fs::path& path, const std::string& split, int attempt,
                                             int64_t after_step) {
  std::vector<v1::MetricPoint> points;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line) && !file.eof();) {
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!json.is_object() || !json.contains("step") || !json["step"].is_number_integer()) continue;
    const int64_t step = json["step"].get<int64_t>();
    if (step <= after_step) continue;
    v1::MetricPoint& point = points.emplace_back();
    point.set_step(step);
    point.set_attempt(attempt);
    point.set_split(split);
    for (const auto& [name, value] : json.items()) {
      const std::optional<double> number = ParseValue(value);
      if (name != "step" && number) (*point.mutable_values())[name] = *number;
    }
  }
  return points;
}

}  // namespace simpo
