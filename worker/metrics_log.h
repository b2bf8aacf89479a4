#ifndef SIMPO_WORKER_METRICS_LOG_H_
#define SIMPO_WORKER_METRICS_LOG_H_

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "absl/status/statusor.h"

namespace simpo {

// One JSON object per line, keys as in docs/simpo.md, numbers in full precision (they read back as
// the same double); numbers that JSON lacks are the strings "NaN", "Infinity" and "-Infinity".
std::string MetricsLine(int64_t step, const std::map<std::string, double>& values);

// metrics.jsonl or eval_metrics.jsonl of a run, appended to line by line and flushed at each.
class MetricsLog {
 public:
  // Keeps the lines of an earlier run up to `last_step` (a resumed run writes the later ones again)
  // and opens the file for more. last_step < 0: starts an empty file.
  static absl::StatusOr<MetricsLog> Open(const std::filesystem::path& path, int64_t last_step);
  absl::Status Write(int64_t step, const std::map<std::string, double>& values);

 private:
  std::filesystem::path path_;
  std::ofstream file_;
};

}  // namespace simpo

#endif  // SIMPO_WORKER_METRICS_LOG_H_
