#ifndef SIMPO_COORDINATOR_ALLOWED_ROOTS_H_
#define SIMPO_COORDINATOR_ALLOWED_ROOTS_H_

#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "common/job_config.h"
#include "common/job_config_yaml.h"

namespace simpo {

// How often a check of one job still looks at the file system: at an entry of a folder, or a part of a path. Whatever a
// job file names, the check is over soon.
class Looks {
 public:
  bool Take() { return --left_ >= 0; }
  bool spent() const { return left_ < 0; }
  static std::string WhySpent(const std::string& path);

 private:
  int64_t left_ = 100'000;
};

// The path without symbolic links, dots and slashes at its end; the part that does not exist stays as it is. Nothing:
// it cannot be told, it is more than 128 folders deep, or a link leads to what is not there yet and may be anything
// later.
std::optional<std::filesystem::path> WithoutLinks(const std::filesystem::path& path, Looks* looks = nullptr);

// The files and folders that there are by a pattern; not all of them when `looks` are spent.
std::vector<std::string> MatchesOfGlob(const std::string& pattern, Looks* looks);

// The folders below which the paths of jobs must lie. Thread-safe.
class AllowedRoots {
 public:
  AllowedRoots() = default;  // any path is allowed
  // `outputs_dir` is always among them. `restricted` says whether they count now; with `roots` they always do.
  AllowedRoots(const std::filesystem::path& outputs_dir, const std::vector<std::string>& roots,
               std::function<bool()> restricted);

  bool restricted() const { return restricted_ && restricted_(); }

  // Why a job may not read this file, folder or glob, or "": symbolic links are resolved, also those in the folder.
  // What is neither there nor an absolute path is a name of the hub and passes. `looks` are those of all paths of a
  // job: the one for which they are spent is refused, and no other.
  std::string ProblemOfInput(const std::string& value, Looks* looks) const;
  // Why a job may not write to this absolute folder, or "". A link among the files of a job there may not
  // lead out of it.
  std::string ProblemOfOutput(const std::string& folder, Looks* looks) const;
  // Both, for every path of a job file that runs.
  std::vector<FieldViolation> Check(const JobConfig& config) const;

 private:
  // Whether what the path stands for lies below a root; `itself`: or is one.
  bool Holds(const std::filesystem::path& path, bool itself, Looks* looks) const;
  std::string ProblemOfPath(const std::string& path, Looks* looks) const;  // of an input that is no pattern
  std::string Outside(const std::string& path) const;

  std::vector<std::filesystem::path> roots_;  // without symbolic links
  std::function<bool()> restricted_;
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_ALLOWED_ROOTS_H_
