#ifndef SIMPO_COORDINATOR_ALLOWED_ROOTS_H_
#define SIMPO_COORDINATOR_ALLOWED_ROOTS_H_

#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "common/job_config.h"
#include "common/job_config_yaml.h"

namespace simpo {

// The path without symbolic links, dots and slashes at its end; the part that does not exist stays as it is. Nothing:
// it cannot be told, or a link leads to what is not there yet and may be anything later.
std::optional<std::filesystem::path> WithoutLinks(const std::filesystem::path& path);

// The files and folders that there are by a pattern.
std::vector<std::string> MatchesOfGlob(const std::string& pattern);

// The folders below which the paths of jobs must lie. Thread-safe.
class AllowedRoots {
 public:
  AllowedRoots() = default;  // any path is allowed
  // `outputs_dir` is always among them. `restricted` says whether they count now; with `roots` they always do.
  AllowedRoots(const std::filesystem::path& outputs_dir, const std::vector<std::string>& roots,
               std::function<bool()> restricted);

  bool restricted() const { return restricted_ && restricted_(); }

  // Why a job may not read this file, folder or glob, or "": symbolic links are resolved, also those in the folder.
  // What is neither there nor an absolute path is a name of the hub and passes.
  std::string ProblemOfInput(const std::string& value) const;
  // Why a job may not write to this absolute folder, or "".
  std::string ProblemOfOutput(const std::string& folder) const;
  // Both, for every path of a job file that runs.
  std::vector<FieldViolation> Check(const JobConfig& config) const;

 private:
  // Whether what the path stands for lies below a root; `itself`: or is one.
  bool Holds(const std::filesystem::path& path, bool itself) const;
  std::string Outside(const std::string& path) const;

  std::vector<std::filesystem::path> roots_;  // without symbolic links
  std::function<bool()> restricted_;
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_ALLOWED_ROOTS_H_
