#include "coordinator/server_options.h"

#include <sched.h>
#include <unistd.h>
#include <yaml-cpp/yaml.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdlib>
#include <variant>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "common/atomic_file.h"
#include "common/status_macros.h"
#include "coordinator/listen_address.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

struct Key {
  const char* name;  // in the config file; the flag has - for _
  std::variant<std::string ServerOptions::*, int ServerOptions::*, double ServerOptions::*, bool ServerOptions::*>
      field;
  const char* help;
};

const Key kKeys[] = {
    {"data_dir", &ServerOptions::data_dir, "Folder of the database, attempts and outputs; made when it is missing"},
    {"listen", &ServerOptions::listen, "HOST:PORT for gRPC; port 0: any free one"},
    {"http", &ServerOptions::http, "HOST:PORT for /metrics and /healthz; port 0: any free one"},
    {"slots", &ServerOptions::slots, "Cores to give to jobs; 0: all"},
    {"worker", &ServerOptions::worker, "The trainer; default: simpo-worker beside this program"},
    {"mpirun", &ServerOptions::mpirun, "OpenMPI's launcher: a path, or a name on PATH"},
    {"insecure", &ServerOptions::insecure, "Allow other machines to connect, without encryption or passwords"},
    {"heartbeat_timeout_s", &ServerOptions::heartbeat_timeout_s, "Seconds of silence after which a rank is lost"},
    {"attach_timeout_s", &ServerOptions::attach_timeout_s, "Seconds that ranks have to report after their start"},
    {"stop_grace_s", &ServerOptions::stop_grace_s, "Seconds that a cancelled job has for its last checkpoint"},
    {"restart_pause_s", &ServerOptions::restart_pause_s, "Seconds before the first restart; doubles with each more"},
    {"restart_pause_max_s", &ServerOptions::restart_pause_max_s, "Longest pause before a restart, in seconds"},
    {"keep_ended_minutes", &ServerOptions::keep_ended_minutes, "Minutes that an ended job stays on /metrics"},
    {"history_days", &ServerOptions::history_days, "Days that an ended job is kept with its events; 0: for ever"},
    {"metrics_full_days", &ServerOptions::metrics_full_days,
     "Days that an ended job keeps every metric point; then about 1,000 per split stay; 0: for ever"},
};

std::string FlagOf(const Key& key) { return absl::StrCat("--", absl::StrReplaceAll(key.name, {{"_", "-"}})); }

absl::StatusOr<fs::path> ThisProgram() {
  std::error_code error;
  fs::path path = fs::read_symlink("/proc/self/exe", error);
  if (error) return absl::UnavailableError(absl::StrCat("cannot read /proc/self/exe: ", error.message()));
  return path;
}

int UsableCores() {
  cpu_set_t cores;
  if (sched_getaffinity(0, sizeof(cores), &cores) != 0) return 1;
  return std::max(1, CPU_COUNT(&cores));
}

bool IsProgram(const fs::path& path) {
  std::error_code error;
  return fs::is_regular_file(path, error) && access(path.c_str(), X_OK) == 0;
}

bool IsOnPath(const std::string& program) {
  if (program.find('/') != std::string::npos) return IsProgram(program);
  const char* path = std::getenv("PATH");
  const std::vector<std::string> dirs = absl::StrSplit(path == nullptr ? "" : path, ':');
  return std::any_of(dirs.begin(), dirs.end(),
                     [&](const std::string& dir) { return IsProgram(fs::path(dir) / program); });
}

absl::Status CheckAddress(const std::string& flag, const std::string& text, bool insecure) {
  SIMPO_ASSIGN_OR_RETURN(const ListenAddress address, ParseListenAddress(flag, text));
  if (address.IsLoopback() || insecure) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(flag, " ", text,
                   " can be reached from other machines, and there are neither passwords nor "
                   "encryption yet. Use 127.0.0.1, or add --insecure when the network is yours alone"));
}

// What is wrong with one key of the config file, or nothing.
std::string TakeKey(const CLI::App& app, const std::string& name, const YAML::Node& value, ServerOptions* options) {
  for (const Key& key : kKeys) {
    if (name != key.name) continue;
    if (app.count(FlagOf(key)) > 0) return "";  // the flag wins
    try {
      std::visit([&](auto field) { options->*field = value.as<std::decay_t<decltype(options->*field)>>(); }, key.field);
    } catch (const YAML::Exception&) {
      return absl::StrCat(name, ": the value has the wrong type; ", key.help);
    }
    return "";
  }
  std::vector<std::string> names;
  for (const Key& key : kKeys) names.push_back(key.name);
  return absl::StrCat("unknown key '", name, "'; known are ", absl::StrJoin(names, ", "));
}

}  // namespace

void AddServerFlags(CLI::App& app, ServerOptions* options) {
  for (const Key& key : kKeys) {
    const std::string flag = FlagOf(key);
    if (const auto* boolean = std::get_if<bool ServerOptions::*>(&key.field)) {
      app.add_flag(flag, options->*(*boolean), key.help);
      continue;
    }
    std::visit([&](auto field) { app.add_option(flag, options->*field, key.help)->capture_default_str(); }, key.field);
  }
}

absl::Status ReadServerConfig(const CLI::App& app, const fs::path& file, ServerOptions* options) {
  SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadFile(file, /*max_bytes=*/1 << 20));
  std::vector<std::string> problems;
  try {
    const YAML::Node root = YAML::Load(text);
    if (!root.IsMap() && !root.IsNull())
      return absl::InvalidArgumentError(file.string() + ": must be `key: value` lines");
    for (const auto& entry : root) {
      const std::string problem = TakeKey(app, entry.first.as<std::string>(), entry.second, options);
      if (!problem.empty())
        problems.push_back(absl::StrCat(file.string(), ":", entry.first.Mark().line + 1, ": ", problem));
    }
  } catch (const YAML::Exception& error) {
    problems.push_back(absl::StrCat(file.string(), ":", error.mark.line + 1, ": ", error.msg));
  }
  if (problems.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrJoin(problems, "\n"));
}

absl::Status CompleteServerOptions(ServerOptions* options) {
  if (options->data_dir.empty()) {
    return absl::InvalidArgumentError("--data-dir is missing: name a folder for the database, attempts and outputs");
  }
  options->data_dir = fs::absolute(options->data_dir).lexically_normal().string();
  SIMPO_RETURN_IF_ERROR(CheckAddress("--listen", options->listen, options->insecure));
  SIMPO_RETURN_IF_ERROR(CheckAddress("--http", options->http, options->insecure));
  constexpr int kMaxSlots = 65536;
  if (options->slots < 0 || options->slots > kMaxSlots) {
    return absl::InvalidArgumentError(
        absl::StrCat("--slots is ", options->slots, "; it must be 1 to ", kMaxSlots, ", or 0 for all cores"));
  }
  if (options->slots == 0) options->slots = UsableCores();
  for (const Key& key : kKeys) {
    const auto* field = std::get_if<double ServerOptions::*>(&key.field);
    if (field != nullptr && !(options->*(*field) >= 0 && options->*(*field) <= 1e9)) {
      return absl::InvalidArgumentError(absl::StrCat(FlagOf(key), " must be 0 to 1e9"));
    }
  }
  if (options->program.empty()) {
    SIMPO_ASSIGN_OR_RETURN(const fs::path program, ThisProgram());
    options->program = program.string();
  }
  if (options->worker.empty()) options->worker = (fs::path(options->program).parent_path() / "simpo-worker").string();
  options->worker = fs::absolute(options->worker).string();
  if (!IsProgram(options->worker)) {
    return absl::NotFoundError(
        absl::StrCat("the trainer ", options->worker, " is not there; build it, or say where it is with --worker"));
  }
  if (!IsOnPath(options->mpirun)) {
    return absl::NotFoundError(
        absl::StrCat("cannot find '", options->mpirun,
                     "'; install OpenMPI (deploy/install-deps.sh), or say where it is with --mpirun"));
  }
  return absl::OkStatus();
}

}  // namespace simpo
