#include "coordinator/attempt_output.h"

#include <algorithm>
#include <iterator>
#include <optional>
#include <string_view>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/string_view.h"
#include "common/log.h"
#include "common/metrics_line.h"
#include "common/text.h"
#include "coordinator/launcher.h"
#include "coordinator/log_reader.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kTailBytes = 64 << 10;
constexpr int64_t kMaxMetricsBytes = 32 << 20;
constexpr size_t kMaxPoints = 50'000;
constexpr size_t kMaxMessageBytes = 4000;
constexpr char kWorkerPrefix[] = "simpo-worker: ";
constexpr char kMpirunPrefix[] = "mpirun noticed that ";

std::vector<std::string> TailLines(const fs::path& path) {
  const RegularFile file(path);
  if (file.size() == 0) return {};
  const std::string text = file.Read(std::max<int64_t>(0, file.size() - kTailBytes), kTailBytes);
  return absl::StrSplit(text, '\n');
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

}  // namespace

std::string LastWords(const fs::path& log_dir, int ranks) {
  const std::vector<std::string> launcher = TailLines(log_dir / kLauncherLog);
  std::string message = LastMessage(launcher, kWorkerPrefix);
  for (int rank = 0; rank < ranks && message.empty(); ++rank) {
    message = LastMessage(TailLines(log_dir / absl::StrCat("rank-", rank, ".log")), kWorkerPrefix);
  }
  return message.empty() ? LastMessage(launcher, kMpirunPrefix) : message;
}

std::vector<v1::MetricPoint> ReadMetricsFile(const fs::path& path, const std::string& split, int attempt,
                                             int64_t after_step) {
  const RegularFile file(path);
  std::vector<v1::MetricPoint> points;
  // Few are new as a rule: a larger part is read when a smaller one has new ones only.
  for (int64_t bytes = kTailBytes;; bytes *= 8) {
    bytes = std::min({bytes, kMaxMetricsBytes, file.size()});
    const std::string text = file.Read(file.size() - bytes, bytes);
    points.clear();
    bool reached = bytes == file.size();
    size_t end = text.rfind('\n');  // what follows the last one is not whole
    while (end != std::string::npos && points.size() < kMaxPoints) {
      const size_t before = end == 0 ? std::string::npos : text.rfind('\n', end - 1);
      if (before == std::string::npos && bytes < file.size()) break;  // its begin is missing
      const size_t begin = before == std::string::npos ? 0 : before + 1;
      const std::optional<ParsedMetrics> line = ParseMetricsLine(std::string_view(text).substr(begin, end - begin));
      end = before;
      if (!line) continue;
      if (line->step <= after_step) {
        reached = true;
        break;
      }
      v1::MetricPoint& point = points.emplace_back();
      point.set_step(line->step);
      point.set_attempt(attempt);
      point.set_split(split);
      point.mutable_values()->insert(line->values.begin(), line->values.end());
    }
    const bool too_many = points.size() == kMaxPoints || (!reached && bytes == kMaxMetricsBytes);
    if (too_many) LOG_WARNING(absl::StrCat(path.string(), ": only the last ", points.size(), " points are taken"));
    if (!reached && !too_many) continue;
    std::reverse(points.begin(), points.end());
    return points;
  }
}

}  // namespace simpo
