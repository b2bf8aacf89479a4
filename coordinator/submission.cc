#include "coordinator/submission.h"

#include <limits.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <optional>
#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "common/host_name.h"
#include "common/sha256.h"
#include "common/text.h"
#include "coordinator/placement.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

constexpr size_t kMaxRequestIdBytes = 128;
constexpr size_t kMaxNameBytes = 128;
constexpr size_t kMaxOverrides = 256;
// Of an output folder: the longest path that a worker makes below one still fits.
constexpr size_t kMaxOutputDirBytes = kMaxPathBytes - 256;

bool IsPrintable(const std::string& text) {
  for (unsigned char c : text) {
    if (c < 0x20 || c == 0x7f) return false;
  }
  return true;
}

void CheckName(const char* field, const std::string& value, std::vector<FieldViolation>* violations) {
  if (value.size() > kMaxNameBytes || !IsPrintable(value)) {
    violations->push_back({field, 0, absl::StrCat("must be one line of at most ", kMaxNameBytes, " bytes")});
  }
}

void CheckRequest(const v1::SubmitJobRequest& request, std::vector<FieldViolation>* violations) {
  if (request.request_id().size() > kMaxRequestIdBytes || !IsPrintable(request.request_id())) {
    violations->push_back(
        {"request_id", 0, absl::StrCat("must be one line of at most ", kMaxRequestIdBytes, " bytes")});
  }
  if (request.base_dir().size() > kMaxPathBytes) {
    violations->push_back({"base_dir", 0, absl::StrCat("a path has at most ", kMaxPathBytes, " bytes")});
  } else if (!request.base_dir().empty() && !fs::path(request.base_dir()).is_absolute()) {
    violations->push_back({"base_dir", 0, absl::StrCat("'", request.base_dir(), "' is not an absolute path")});
  }
  if (static_cast<size_t>(request.overrides_size()) > kMaxOverrides) {
    violations->push_back({"overrides", 0, absl::StrCat("at most ", kMaxOverrides, " are taken")});
  }
  CheckName("user", request.user(), violations);
}

// An input that names a local path must be allowed and there; hub names are left to the worker. Of what is not
// allowed nothing is told, not even whether it exists. With `globs` it may be a pattern of such paths.
void CheckInput(const char* field, const std::string& value, const AllowedRoots& roots, Looks* looks,
                std::vector<FieldViolation>* violations, Looks* globs = nullptr) {
  if (std::string problem = roots.ProblemOfInput(value, looks); !problem.empty()) {
    violations->push_back({field, 0, std::move(problem)});
    return;
  }
  if (looks->spent() || value.empty() || value[0] != '/') return;
  if (access(value.c_str(), R_OK) == 0) return;
  if (globs != nullptr && errno == ENOENT && IsGlob(value)) {
    const std::vector<std::string> matches = MatchesOfGlob(value, globs);
    if (matches.empty() && !globs->spent()) {
      violations->push_back({field, 0,
                             absl::StrCat("'", value, "' matches no file on ", HostName(),
                                          "; patterns are looked up on the coordinator's machine")});
    }
    for (const std::string& match : matches) {
      if (access(match.c_str(), R_OK) == 0) continue;
      violations->push_back({field, 0,
                             absl::StrCat("'", match, "', which '", value, "' matches, cannot be read on ", HostName(),
                                          " (", std::strerror(errno), ")")});
      return;
    }
    return;
  }
  const char* problem = errno == ENOENT ? "does not exist" : "cannot be read";
  violations->push_back({field, 0,
                         absl::StrCat("'", value, "' ", problem, " on ", HostName(), " (", std::strerror(errno),
                                      "); paths are those of the coordinator's machine")});
}

void CheckInputs(const JobConfig& config, const AllowedRoots& roots, std::vector<FieldViolation>* violations) {
  Looks looks;
  Looks globs;  // when they are spent, the trainer alone looks at the others
  CheckInput("model_name_or_path", config.model_name_or_path, roots, &looks, violations);
  CheckInput("tokenizer_name_or_path", config.tokenizer_name_or_path, roots, &looks, violations);
  for (const auto& [path, fraction] : config.dataset_mixer) {
    CheckInput("dataset_mixer", path, roots, &looks, violations, &globs);
  }
  for (const auto& [path, fraction] : config.eval_dataset_mixer) {
    CheckInput("eval_dataset_mixer", path, roots, &looks, violations, &globs);
  }
  CheckInput("resume_from_checkpoint", config.resume_from_checkpoint, roots, &looks, violations);
  // A text that is no file is the template itself.
  if (std::string problem = roots.ProblemOfInput(config.chat_template, &looks); !problem.empty()) {
    violations->push_back({"chat_template", 0, std::move(problem)});
  }
}

// A folder has one name from here on: the roots, other users' jobs and those that run are compared by it. Of what is
// not allowed nothing is told.
void ResolveOutputDir(const AllowedRoots& roots, JobConfig* config, std::vector<FieldViolation>* violations) {
  if (!fs::path(config->output_dir).is_absolute()) return;  // it gets a folder of the coordinator's choice
  Looks looks;
  if (std::string problem = roots.ProblemOfOutput(config->output_dir, &looks); !problem.empty()) {
    violations->push_back({"output_dir", 0, std::move(problem)});
    return;
  }
  if (std::string problem = ProblemOfFolder(config->output_dir); !problem.empty()) {
    violations->push_back({"output_dir", 0, std::move(problem)});
    return;
  }
  const std::optional<fs::path> resolved = WithoutLinks(config->output_dir);
  if (!resolved) {
    violations->push_back({"output_dir", 0,
                           absl::StrCat("it cannot be told where '", config->output_dir, "' on ", HostName(),
                                        " leads to; name a folder without symbolic links")});
    return;
  }
  size_t bad = 0;
  if (!IsValidUtf8(resolved->native(), &bad)) {
    violations->push_back({"output_dir", 0,
                           absl::StrCat("'", config->output_dir, "' on ", HostName(), " leads to '",
                                        OneLine(resolved->native()), "', whose name is not UTF-8; rename it")});
    return;
  }
  config->output_dir = resolved->string();
}

void CheckSlots(Submission* submission, int slots_total) {
  const JobConfig& config = submission->config;
  const int ranks = config.Ranks();
  const int threads = ThreadsPerRank(config.threads_per_rank, ranks, slots_total);
  submission->job.set_ranks(ranks);
  submission->job.set_nodes(config.nodes);
  submission->job.set_slots(ranks * threads);
  if (ranks * threads > slots_total) {
    submission->violations.push_back(
        {"resources", 0,
         absl::StrCat(ranks, ranks == 1 ? " rank" : " ranks", " of ", threads, " slots need ", ranks * threads,
                      " slots; ", HostName(), " has ", slots_total,
                      ". Ask for fewer ranks_per_node or threads_per_rank, or restart the coordinator with --slots")});
  } else if (config.threads_per_rank == 0) {
    submission->notes.push_back(absl::StrCat("threads_per_rank is ", threads, ": ", slots_total, " slots over ", ranks,
                                             ranks == 1 ? " rank" : " ranks"));
  }
}

}  // namespace

std::string RequestDigest(const v1::SubmitJobRequest& request) {
  v1::SubmitJobRequest body = request;
  body.clear_request_id();
  body.clear_validate_only();
  // Every field is length-prefixed on the wire, in the order of its number; there is no map in it.
  return Sha256(body.SerializeAsString());
}

Submission CheckSubmission(const v1::SubmitJobRequest& request, int slots_total, const AllowedRoots& roots) {
  Submission submission;
  CheckRequest(request, &submission.violations);
  ParsedJob parsed = ParseJobYaml(request.job_yaml(),
                                  {.file_name = request.file_name().empty() ? "job.yaml" : request.file_name(),
                                   .base_dir = request.base_dir().size() > kMaxPathBytes ? "/" : request.base_dir(),
                                   .overrides = {request.overrides().begin(), request.overrides().end()}});
  submission.violations.insert(submission.violations.end(), parsed.violations.begin(), parsed.violations.end());
  submission.config = std::move(parsed.config);
  submission.notes = std::move(parsed.notes);
  submission.lines = std::move(parsed.lines);
  if (!request.name().empty()) submission.lines.erase("name");  // it wins over the file's
  submission.request_digest = RequestDigest(request);

  JobConfig& config = submission.config;
  if (!request.name().empty()) config.name = request.name();
  if (config.name.empty()) config.name = fs::path(request.file_name()).stem().string();
  if (config.name.empty()) config.name = "job";
  CheckName("name", config.name, &submission.violations);
  CheckInputs(config, roots, &submission.violations);
  ResolveOutputDir(roots, &config, &submission.violations);
  if (!config.output_dir.empty() && config.output_dir[0] != '/') {
    submission.notes.push_back(absl::StrCat("output_dir '", OneLine(config.output_dir, 80),
                                            "' is relative: the results go to DATA_DIR/outputs/NAME-ID of the "
                                            "coordinator; an absolute one is taken as it is"));
  }
  CheckSlots(&submission, slots_total);

  v1::Job& job = submission.job;
  job.set_name(config.name);
  job.set_user(request.user());
  job.set_priority(config.priority);
  job.mutable_labels()->insert(config.labels.begin(), config.labels.end());
  job.set_max_restarts(config.max_restarts);
  return submission;
}

std::string ProblemOfFolder(const std::string& folder) {
  const auto problem = [&](const fs::path& place, const std::string& what) {
    return absl::StrCat("'", place.string(), "' on ", HostName(), " ", what);
  };
  const fs::path path = folder;
  if (folder.size() > kMaxOutputDirBytes) {
    return absl::StrCat("it has ", folder.size(), " bytes; an output folder's path has at most ", kMaxOutputDirBytes);
  }
  for (const fs::path& part : path) {
    if (part.native().size() > NAME_MAX) {
      return absl::StrCat("'", OneLine(part.native(), 80), "' has ", part.native().size(),
                          " bytes; the name of a folder has at most ", NAME_MAX, " bytes");
    }
  }
  // What there is of the path: folders are made in it.
  fs::path there = path;
  std::error_code error;
  while (access(there.c_str(), F_OK) != 0 && (errno == ENOENT || errno == ENOTDIR) && there.has_relative_path()) {
    if (fs::is_symlink(fs::symlink_status(there, error))) {
      return problem(there, "is a link that leads nowhere; make what it leads to, or name another folder");
    }
    there = there.parent_path();
  }
  const fs::file_status status = fs::status(there, error);
  if (fs::exists(status) && !fs::is_directory(status)) return problem(there, "is not a folder; name another one");
  if (access(there.c_str(), W_OK | X_OK) == 0) return "";
  if (errno != EACCES && errno != EROFS && errno != ELOOP) return "";  // it may be better the next time
  return problem(there, absl::StrCat("cannot be written to (", std::strerror(errno),
                                     "); let the coordinator's account write there, or name another folder"));
}

std::string MakeFolder(const std::string& folder) {
  std::error_code error;
  fs::create_directories(folder, error);
  for (const std::errc never :
       {std::errc::permission_denied, std::errc::operation_not_permitted, std::errc::read_only_file_system,
        std::errc::no_such_file_or_directory, std::errc::not_a_directory, std::errc::file_exists,
        std::errc::operation_not_supported, std::errc::function_not_supported}) {
    if (error != never) continue;
    return absl::StrCat("'", folder, "' on ", HostName(), " cannot be made (", error.message(),
                        "); name a folder where the coordinator's account may write");
  }
  return "";
}

std::vector<FieldViolation> CheckOutputDir(const JobConfig& config, const std::string& output_dir) {
  if (std::string problem = ProblemOfFolder(output_dir); !problem.empty()) {
    return {{"output_dir", 0, std::move(problem)}};
  }
  std::error_code error;
  if (!fs::exists(output_dir, error)) return {};
  const bool wanted = config.overwrite_output_dir || config.resume_from_checkpoint == "true";
  if (wanted || fs::is_empty(output_dir, error)) return {};
  return {{"output_dir", 0,
           absl::StrCat("'", output_dir, "' on ", HostName(),
                        " is not empty. To go on from its last checkpoint set resume_from_checkpoint: true; to "
                        "start again set overwrite_output_dir: true; or name another folder")}};
}

bool FoldersOverlap(std::string_view a, std::string_view b) {
  if (a.size() > b.size()) std::swap(a, b);
  return b.starts_with(a) && (a.size() == b.size() || a.ends_with('/') || b[a.size()] == '/');
}

std::string FileNameOf(const std::string& job_name) {
  std::string name;
  for (char c : job_name.substr(0, 64)) {
    const bool plain = absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
    name += plain ? c : '-';
  }
  return !name.empty() && name[0] == '.' ? "job" + name : name;
}

}  // namespace simpo
