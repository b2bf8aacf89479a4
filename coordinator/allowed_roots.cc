#include "coordinator/allowed_roots.h"

#include <dirent.h>
#include <glob.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/text.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxDepth = 128;
constexpr int kMaxLinks = 40;  // as the kernel has it

thread_local Looks* t_looks = nullptr;  // glob() hands nothing on to what it calls

bool Look() {
  errno = ENOENT;
  return t_looks->Take();
}

// Whether a pattern can match what lies above its fixed part: what is found there would be told by the refusal.
bool MayClimb(const std::string& pattern) {
  if (pattern.find('\\') != std::string::npos) return true;
  const fs::path path = pattern;
  return std::any_of(path.begin(), path.end(), [](const fs::path& part) {
    return part == ".." || (part.native().starts_with('.') && IsGlob(part.native()));
  });
}

// Whether a path is below the folder, or is it; both without links.
bool IsWithin(const fs::path& folder, const fs::path& path, bool itself) {
  const auto [in_folder, in_path] = std::mismatch(folder.begin(), folder.end(), path.begin(), path.end());
  return in_folder == folder.end() && (itself || in_path != path.end());
}

// What a job writes, or removes as too old, goes through links among its files: none may lead out of the folder.
std::string ProblemOfLinksIn(const fs::path& folder, Looks* looks) {
  const std::optional<fs::path> real = WithoutLinks(folder, looks);
  for (const char* part : {"", "logs", "checkpoints", "final"}) {
    std::error_code error;
    for (fs::directory_iterator entry(folder / part, error), end; !error && entry != end; entry.increment(error)) {
      if (!looks->Take()) return Looks::WhySpent(folder);
      if (!entry->is_symlink(error)) continue;
      const std::optional<fs::path> target = WithoutLinks(entry->path(), looks);
      if (real && target && IsWithin(*real, *target, /*itself=*/true)) continue;
      return absl::StrCat("the link '", entry->path().string(),
                          "' leads out of the output folder, or to nothing; remove it, or name another folder");
    }
    if (error && error != std::errc::no_such_file_or_directory && error != std::errc::not_a_directory) {
      return absl::StrCat("'", (folder / part).string(), "' cannot be read: ", error.message(),
                          "; name another folder");
    }
  }
  return "";
}

}  // namespace

std::string Looks::WhySpent(const std::string& path) {
  return absl::StrCat("'", path, "': with it the paths of this job stand for too many files to look at; name fewer, ",
                      "or folders with fewer files");
}

std::optional<fs::path> WithoutLinks(const fs::path& path, Looks* looks) {
  Looks own;
  if (looks == nullptr) looks = &own;
  std::error_code error;
  const fs::path absolute = fs::absolute(path, error);
  if (error) return std::nullopt;
  std::vector<fs::path> rest;  // what comes next is last
  const auto go_through = [&rest](const fs::path& more) {
    const size_t size = rest.size();
    rest.insert(rest.end(), more.begin(), more.end());
    std::reverse(rest.begin() + static_cast<std::ptrdiff_t>(size), rest.end());
  };
  go_through(absolute);
  size_t own_parts = rest.size();  // beyond them come those of a link
  int depth = 0, links = 0;
  fs::path resolved;
  while (!rest.empty()) {
    const fs::path part = std::move(rest.back());
    rest.pop_back();
    const bool of_link = rest.size() >= own_parts;
    own_parts = std::min(own_parts, rest.size());
    if (part.empty() || part == ".") continue;
    if (part == "/" || part == "..") {
      resolved = part == "/" ? part : resolved.parent_path();
      depth = part == "/" ? 0 : std::max(0, depth - 1);
      continue;
    }
    fs::path next = resolved / part;
    if (++depth > kMaxDepth || !looks->Take()) return std::nullopt;
    const fs::file_type type = fs::symlink_status(next, error).type();
    if (type == fs::file_type::none || (type == fs::file_type::not_found && of_link)) return std::nullopt;
    if (type != fs::file_type::symlink) {
      resolved = std::move(next);
      continue;
    }
    const fs::path target = fs::read_symlink(next, error);
    if (error || ++links > kMaxLinks) return std::nullopt;
    --depth;
    go_through(target);
  }
  return resolved;
}

std::vector<std::string> MatchesOfGlob(const std::string& pattern, Looks* looks) {
  t_looks = looks;
  glob_t found{};
  found.gl_opendir = [](const char* path) -> void* { return Look() ? opendir(path) : nullptr; };
  found.gl_readdir = [](void* folder) { return Look() ? readdir(static_cast<DIR*>(folder)) : nullptr; };
  found.gl_closedir = [](void* folder) { closedir(static_cast<DIR*>(folder)); };
  found.gl_stat = [](const char* path, struct stat* info) { return Look() ? stat(path, info) : -1; };
  found.gl_lstat = [](const char* path, struct stat* info) { return Look() ? lstat(path, info) : -1; };
  const int code = glob(pattern.c_str(), GLOB_ALTDIRFUNC, nullptr, &found);
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

bool AllowedRoots::Holds(const fs::path& path, bool itself, Looks* looks) const {
  const std::optional<fs::path> resolved = WithoutLinks(path, looks);
  return resolved && std::any_of(roots_.begin(), roots_.end(),
                                 [&](const fs::path& root) { return IsWithin(root, *resolved, itself); });
}

std::string AllowedRoots::Outside(const std::string& path) const {
  return absl::StrCat(
      "'", path, "' does not lie in a folder that this coordinator allows (",
      absl::StrJoin(roots_, ", ", [](std::string* out, const fs::path& root) { *out += root.string(); }),
      "), links resolved; put it there, or have its folder added to allowed_roots");
}

std::string AllowedRoots::ProblemOfInput(const std::string& value, Looks* looks) const {
  if (looks->spent() || !restricted() || value.empty() || value.size() > kMaxPathBytes) return "";
  std::error_code error;
  if (value[0] != '/' && !fs::exists(value, error)) return "";
  std::string problem;
  // The folder of a pattern first: what lies elsewhere is not even looked at.
  if (IsGlob(value) && !fs::exists(value, error)) {
    const std::string fixed = value.substr(0, value.find_first_of("*?["));
    if (!Holds(fs::path(fixed).parent_path(), /*itself=*/true, looks)) {
      problem = Outside(value);
    } else if (MayClimb(value)) {
      problem =
          absl::StrCat("'", value, "' may lead out of its folder: a pattern here has no backslash, no .., and no *, ? ",
                       "or [ in a name that begins with a dot");
    } else {
      for (const std::string& match : MatchesOfGlob(value, looks)) {
        if (problem = ProblemOfPath(match, looks); !problem.empty()) break;
      }
    }
  } else {
    problem = ProblemOfPath(value, looks);
  }
  return looks->spent() ? Looks::WhySpent(value) : problem;
}

std::string AllowedRoots::ProblemOfPath(const std::string& path, Looks* looks) const {
  if (!Holds(path, /*itself=*/true, looks)) return Outside(path);
  std::error_code error;
  if (!fs::is_directory(path, error)) return "";
  for (fs::recursive_directory_iterator entry(path, error), end; !error && entry != end; entry.increment(error)) {
    if (!looks->Take()) return Looks::WhySpent(path);
    if (entry->is_symlink(error) && !Holds(entry->path(), /*itself=*/true, looks)) {
      return Outside(entry->path().string());
    }
  }
  return error ? absl::StrCat("'", path, "' cannot be read: ", error.message()) : "";
}

std::string AllowedRoots::ProblemOfOutput(const std::string& folder, Looks* looks) const {
  if (!restricted()) return "";
  return Holds(folder, /*itself=*/false, looks) ? ProblemOfLinksIn(folder, looks) : Outside(folder);
}

std::vector<FieldViolation> AllowedRoots::Check(const JobConfig& config) const {
  std::vector<FieldViolation> violations;
  Looks looks, looks_of_output;
  const auto take = [&](const char* field, std::string problem) {
    if (!problem.empty()) violations.push_back({field, 0, std::move(problem)});
  };
  take("model_name_or_path", ProblemOfInput(config.model_name_or_path, &looks));
  take("tokenizer_name_or_path", ProblemOfInput(config.tokenizer_name_or_path, &looks));
  take("chat_template", ProblemOfInput(config.chat_template, &looks));
  for (const auto& [path, fraction] : config.dataset_mixer) take("dataset_mixer", ProblemOfInput(path, &looks));
  for (const auto& [path, fraction] : config.eval_dataset_mixer)
    take("eval_dataset_mixer", ProblemOfInput(path, &looks));
  if (config.resume_from_checkpoint != "true") {
    take("resume_from_checkpoint", ProblemOfInput(config.resume_from_checkpoint, &looks));
  }
  // A relative one lies under the outputs folder, by a name of the coordinator's choice.
  if (fs::path(config.output_dir).is_absolute())
    take("output_dir", ProblemOfOutput(config.output_dir, &looks_of_output));
  return violations;
}

}  // namespace simpo
