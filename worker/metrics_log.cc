#include "worker/metrics_log.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <vector>

#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

nlohmann::ordered_json Number(double value) {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  // Counts are written as integers.
  if (value == std::floor(value) && std::abs(value) < 9007199254740992.0) return static_cast<int64_t>(value);
  return value;
}

// The lines of `path` whose step is at most last_step; a torn last line is left out.
std::vector<std::string> KeptLines(const std::filesystem::path& path, int64_t last_step) {
  std::vector<std::string> kept;
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    const auto json = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
    if (!json.is_object() || !json.contains("step") || !json["step"].is_number()) continue;
    if (json["step"].get<int64_t>() <= last_step) kept.push_back(line);
  }
  return kept;
}

}  // namespace

std::string MetricsLine(int64_t step, const std::map<std::string, double>& values) {
  nlohmann::ordered_json line;
  line["step"] = step;
  for (const auto& [name, value] : values) line[name] = Number(value);
  return line.dump();
}

absl::StatusOr<MetricsLog> MetricsLog::Open(const std::filesystem::path& path, int64_t last_step) {
  MetricsLog log;
  log.path_ = path;
  const std::vector<std::string> kept = last_step < 0 ? std::vector<std::string>() : KeptLines(path, last_step);
  const std::filesystem::path partial = path.string() + ".partial";
  std::ofstream file(partial, std::ios::trunc);
  for (const std::string& line : kept) file << line << '\n';
  file.close();
  std::error_code error;
  if (file) std::filesystem::rename(partial, path, error);
  log.file_.open(path, std::ios::app);
  if (!file || error || !log.file_) {
    return absl::UnavailableError(
        absl::StrCat("cannot write ", path.string(), ": is the disk full, or the folder read-only?"));
  }
  return log;
}

absl::Status MetricsLog::Write(int64_t step, const std::map<std::string, double>& values) {
  file_ << MetricsLine(step, values) << std::endl;
  if (!file_) return absl::UnavailableError(absl::StrCat("cannot write ", path_.string(), ": is the disk full?"));
  return absl::OkStatus();
}

}  // namespace simpo
