#include "coordinator/allowed_roots.h"

#include <glob.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/text.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxEntries = 20'000;  // of an input folder

// Whether a pattern can match what lies above its fixed part: what is found there would be told by the refusal.
bool MayClimb(const std::string& pattern) {
  if (pattern.find('\\') != std::string::npos) return true;
  const fs::path path = pattern;
  return std::any_of(path.begin(), path.end(), [](const fs::path& part) {
    return part == ".." || (part.native().starts_with('.') && IsGlob(part.native()));
  });
}

}  // namespace

std::optional<fs::path> WithoutLinks(const fs::path& path) {
  std::error_code error;
  const fs::path absolute = fs::absolute(path, error);
  if (error) return std::nullopt;
  fs::path prefix;
  for (const fs::path& part : absolute) {
    prefix /= part;
    const bool dangling = fs::is_symlink(fs::symlink_status(prefix, error)) && !fs::exists(prefix, error);
    if (dangling) return std::nullopt;
  }
  const fs::path resolved = fs::weakly_canonical(absolute, error);
  if (error) return std::nullopt;
  return resolved.has_filename() ? resolved : resolved.parent_path();
}

std::vector<std::string> MatchesOfGlob(const std::string& pattern) {
  glob_t found{};
  const int code = glob(pattern.c_str(), 0, nullptr, &found);
  std::vector<std::string> paths;
  if (code == 0) paths.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
  globfree(&found);
  return paths;
}

AllowedRoots::AllowedRoots(const fs::path& outputs_dir, const std::vector<std::string>& roots,
                           std::function<bool()> restricted)
    : restricted_(std::move(restricted)) {
  if (!roots.empty()) restricted_ = [] { return true; };
  const auto add = [this](const fs::path& root) {
    std::error_code error;
    fs::path resolved = fs::weakly_canonical(root, error);
    if (error) resolved = root.lexically_normal();
    roots_.push_back(resolved.has_filename() ? resolved : resolved.parent_path());
  };
  add(outputs_dir);
  for (const std::string& root : roots) add(root);
}

bool AllowedRoots::Holds(const fs::path& path, bool itself) const {
  const std::optional<fs::path> resolved = WithoutLinks(path);
  if (!resolved) return false;
  return std::any_of(roots_.begin(), roots_.end(), [&](const fs::path& root) {
    const auto [in_root, in_path] = std::mismatch(root.begin(), root.end(), resolved->begin(), resolved->end());
    return in_root == root.end() && (itself || in_path != resolved->end());
  });
}

std::string AllowedRoots::Outside(const std::string& path) const {
  return absl::StrCat(
      "'", path, "' does not lie in a folder that this coordinator allows (",
      absl::StrJoin(roots_, ", ", [](std::string* out, const fs::path& root) { *out += root.string(); }),
      "), links resolved; put it there, or have its folder added to allowed_roots");
}

std::string AllowedRoots::ProblemOfInput(const std::string& value) const {
  if (!restricted() || value.empty() || value.size() > kMaxPathBytes) return "";
  std::error_code error;
  if (value[0] != '/' && !fs::exists(value, error)) return "";
  // The folder of a pattern first: what lies elsewhere is not even looked at.
  if (IsGlob(value) && !fs::exists(value, error)) {
    const std::string fixed = value.substr(0, value.find_first_of("*?["));
    if (!Holds(fs::path(fixed).parent_path(), /*itself=*/true)) return Outside(value);
    if (MayClimb(value)) {
      return absl::StrCat("'", value,
                          "' may lead out of its folder: a pattern here has no backslash, no .., and no *, ? ",
                          "or [ in a name that begins with a dot");
    }
    for (const std::string& match : MatchesOfGlob(value)) {
      if (std::string problem = ProblemOfInput(match); !problem.empty()) return problem;
    }
    return "";
  }
  if (!Holds(value, /*itself=*/true)) return Outside(value);
  if (!fs::is_directory(value, error)) return "";
  int entries = 0;
  for (fs::recursive_directory_iterator entry(value, error), end; !error && entry != end; entry.increment(error)) {
    if (++entries > kMaxEntries) {
      return absl::StrCat("'", value, "' holds more than ", kMaxEntries, " files; name a smaller folder");
    }
    if (entry->is_symlink(error) && !Holds(entry->path(), /*itself=*/true)) return Outside(entry->path().string());
  }
  return error ? absl::StrCat("'", value, "' cannot be read: ", error.message()) : "";
}

std::string AllowedRoots::ProblemOfOutput(const std::string& folder) const {
  return !restricted() || Holds(folder, /*itself=*/false) ? "" : Outside(folder);
}

std::vector<FieldViolation> AllowedRoots::Check(const JobConfig& config) const {
  std::vector<FieldViolation> violations;
  const auto take = [&](const char* field, std::string problem) {
    if (!problem.empty()) violations.push_back({field, 0, std::move(problem)});
  };
  take("model_name_or_path", ProblemOfInput(config.model_name_or_path));
  take("tokenizer_name_or_path", ProblemOfInput(config.tokenizer_name_or_path));
  take("chat_template", ProblemOfInput(config.chat_template));
  for (const auto& [path, fraction] : config.dataset_mixer) take("dataset_mixer", ProblemOfInput(path));
  for (const auto& [path, fraction] : config.eval_dataset_mixer) take("eval_dataset_mixer", ProblemOfInput(path));
  if (config.resume_from_checkpoint != "true") {
    take("resume_from_checkpoint", ProblemOfInput(config.resume_from_checkpoint));
  }
  // A relative one lies under the outputs folder, by a name of the coordinator's choice.
  if (fs::path(config.output_dir).is_absolute()) take("output_dir", ProblemOfOutput(config.output_dir));
  return violations;
}

}  // namespace simpo
