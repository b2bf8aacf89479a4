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
#include "common/host_name.h"
#include "common/job_values.h"
#include "common/status_macros.h"
#include "common/text.h"
#include "coordinator/allowed_roots.h"
#include "coordinator/listen_address.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

constexpr int kMaxSlots = 65536;

struct Key {
  const char* name;  // in the config file; the flag has - for _
  std::variant<std::string ServerOptions::*, int ServerOptions::*, double ServerOptions::*, bool ServerOptions::*,
               std::vector<std::string> ServerOptions::*>
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
    {"tls_cert", &ServerOptions::tls_cert, "This coordinator's certificate, a PEM file; read again when it changes"},
    {"tls_key", &ServerOptions::tls_key, "The certificate's private key, a PEM file"},
    {"tls_client_ca", &ServerOptions::tls_client_ca, "Ask users for a certificate of one of these authorities"},
    {"tls_ca", &ServerOptions::tls_ca, "Authority by which the ranks know this coordinator; default: tls_cert"},
    {"allowed_roots", &ServerOptions::allowed_roots, "Folders below which the paths of jobs must lie"},
    {"calls_per_second", &ServerOptions::calls_per_second, "Calls that a user with a token may make; 0: no limit"},
    {"max_jobs_per_user", &ServerOptions::max_jobs_per_user,
     "Jobs that have not ended that a user may have; 0: no limit"},
    {"heartbeat_timeout_s", &ServerOptions::heartbeat_timeout_s, "Seconds of silence after which a rank is lost"},
    {"attach_timeout_s", &ServerOptions::attach_timeout_s, "Seconds that ranks have to report after their start"},
    {"prepare_timeout_s", &ServerOptions::prepare_timeout_s, "Seconds for downloads and the token cache of an attempt"},
    {"load_timeout_s", &ServerOptions::load_timeout_s, "Seconds that a rank may stand still while the model is loaded"},
    {"step_timeout_s", &ServerOptions::step_timeout_s, "Seconds that a rank may stand still in a step"},
    {"eval_timeout_s", &ServerOptions::eval_timeout_s, "Seconds that a rank may stand still in an evaluation"},
    {"checkpoint_timeout_s", &ServerOptions::checkpoint_timeout_s,
     "Seconds that a rank may stand still while a checkpoint or the model is written"},
    {"stop_grace_s", &ServerOptions::stop_grace_s, "Seconds that a cancelled job has for its last checkpoint"},
    {"restart_pause_s", &ServerOptions::restart_pause_s, "Seconds before the first restart; doubles with each more"},
    {"restart_pause_max_s", &ServerOptions::restart_pause_max_s, "Longest pause before a restart, in seconds"},
    {"max_machine_faults", &ServerOptions::max_machine_faults,
     "Attempts of a job that may be lost to faults of the machine; they do not count as restarts"},
    {"log_limit_mb", &ServerOptions::log_limit_mb, "MiB after which a log file of a job begins anew; 0: no limit"},
    {"keep_ended_minutes", &ServerOptions::keep_ended_minutes, "Minutes that an ended job stays on /metrics"},
    {"preemption", &ServerOptions::preemption, "Let jobs of higher priority take the slots of running ones"},
    {"starvation_minutes", &ServerOptions::starvation_minutes,
     "Minutes of waiting after which a job gains priority; 0: never"},
    {"history_days", &ServerOptions::history_days, "Days that an ended job is kept with its events; 0: for ever"},
    {"metrics_full_days", &ServerOptions::metrics_full_days,
     "Days that an ended job keeps every metric point; then about 1,000 per split stay; 0: for ever"},
};

// What must be above 0, where 0 would end healthy gangs at once; elsewhere 0 has a meaning.
constexpr double ServerOptions::*kAboveZero[] = {
    &ServerOptions::attach_timeout_s, &ServerOptions::prepare_timeout_s, &ServerOptions::load_timeout_s,
    &ServerOptions::step_timeout_s,   &ServerOptions::eval_timeout_s,    &ServerOptions::checkpoint_timeout_s,
};
// Ranks say something every two seconds, or four times within this limit.
constexpr double kLeastHeartbeatS = 1;
constexpr double kMostNumber = 1e9;

// What is wrong with a number of the options, said of `name`, or nothing.
std::string ProblemOfRange(const Key& key, const ServerOptions& options, const std::string& name) {
  const auto* field = std::get_if<double ServerOptions::*>(&key.field);
  if (field == nullptr) return "";
  const double value = options.*(*field);
  const bool above_zero = std::find(std::begin(kAboveZero), std::end(kAboveZero), *field) != std::end(kAboveZero);
  const double least = *field == &ServerOptions::heartbeat_timeout_s ? kLeastHeartbeatS : 0;
  if (value >= least && value <= kMostNumber && (!above_zero || value > 0)) return "";
  return absl::StrCat(name, " must be ", above_zero ? "above 0 and at most 1e9" : absl::StrCat(least, " to 1e9"),
                      ", not ", value, "; ", key.help);
}

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

// One node, this machine: mpirun reaches no other.
absl::Status CompleteNodes(ServerOptions* options) {
  if (options->nodes.size() > 1) {
    return absl::InvalidArgumentError(absl::StrCat("nodes names ", options->nodes.size(),
                                                   " machines, but jobs run on this one only (launcher mpirun)"
                                                   "; name one, or none"));
  }
  if (options->nodes.empty()) {
    if (options->slots == 0) options->slots = UsableCores();
    options->nodes.push_back({.name = HostName(), .slots = options->slots});
  } else if (options->slots != 0 && options->slots != options->nodes[0].slots) {
    return absl::InvalidArgumentError(absl::StrCat("--slots is ", options->slots, ", but nodes gives ",
                                                   options->nodes[0].slots, " to ", options->nodes[0].name,
                                                   "; keep one of both"));
  }
  options->slots = options->nodes[0].slots;
  return absl::OkStatus();
}

// Beyond this machine nobody may listen in, and everybody has to say who they are.
absl::Status CheckAddress(const std::string& flag, const std::string& text, const ServerOptions& options) {
  SIMPO_ASSIGN_OR_RETURN(const ListenAddress address, ParseListenAddress(flag, text));
  if (address.IsLoopback() || options.insecure) return absl::OkStatus();
  std::error_code error;
  const bool asks = !options.tls_client_ca.empty() || fs::exists(options.TokenFile(), error);
  std::vector<std::string> missing;
  if (options.tls_cert.empty()) missing.push_back("encryption (give --tls-cert and --tls-key)");
  if (!asks) {
    missing.push_back(
        "a way to tell who calls (make a token with `simpo-coordinator token create`, or give --tls-client-ca)");
  }
  if (missing.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(flag, " ", text, " can be reached from other machines; that needs ", absl::StrJoin(missing, " and "),
                   ". Or use 127.0.0.1, or add --insecure when the network is yours alone"));
}

// How a value is shown in an error.
std::string Shown(const YAML::Node& value) {
  if (value.IsNull()) return "nothing";
  return value.IsScalar() ? absl::StrCat("'", OneLine(value.Scalar(), 80), "'") : "a list or map";
}

// `nodes: [{name: a, slots: 8, labels: {gpu: h100}}]`. Returns what is wrong with it, or nothing.
std::string TakeNodes(const YAML::Node& value, ServerOptions* options) {
  const char* form = "must be a list, as [{name: a, slots: 8, labels: {rack: r1}}]";
  if (!value.IsSequence()) return absl::StrCat("nodes: ", form);
  for (const YAML::Node& item : value) {
    if (!item.IsMap()) return absl::StrCat("nodes: ", form);
    Node node;
    for (const auto& entry : item) {
      const std::string key = entry.first.as<std::string>();
      if (key == "name") {
        node.name = entry.second.as<std::string>();
      } else if (key == "slots") {
        node.slots = entry.second.as<int>();
      } else if (key == "labels") {
        node.labels = entry.second.as<std::map<std::string, std::string>>();
      } else {
        return absl::StrCat("nodes: unknown key '", key, "'; known are name, slots, labels");
      }
    }
    if (node.name.empty() || node.slots < 1 || node.slots > kMaxSlots) {
      return absl::StrCat("nodes: each needs a name and 1 to ", kMaxSlots, " slots");
    }
    for (const Node& other : options->nodes) {
      if (other.name == node.name) return absl::StrCat("nodes: '", node.name, "' is there twice");
    }
    options->nodes.push_back(std::move(node));
  }
  return "";
}

// `quotas: {users: {alice: 8, "*": 4}, labels: {team=red: 16}}`. Returns what is wrong with it, or nothing.
std::string TakeQuotas(const YAML::Node& value, ServerOptions* options) {
  const char* form = "must be as {users: {alice: 8, \"*\": 4}, labels: {team=red: 16}}";
  if (!value.IsMap()) return absl::StrCat("quotas: ", form);
  for (const auto& entry : value) {
    const std::string kind = entry.first.as<std::string>();
    if (kind != "users" && kind != "labels") return absl::StrCat("quotas: unknown key '", kind, "'; it ", form);
    auto& quotas = kind == "users" ? options->user_quotas : options->label_quotas;
    if (!entry.second.IsMap()) return absl::StrCat("quotas: ", form);
    for (const auto& quota : entry.second) {
      const std::string name = quota.first.as<std::string>();
      const int slots = quota.second.as<int>(-1);
      if (slots < 0) return absl::StrCat("quotas: '", name, "' must be 0 slots or more, not ", Shown(quota.second));
      if (!quotas.emplace(name, slots).second) return absl::StrCat("quotas: '", name, "' is there twice");
      if (kind == "labels" && name.find('=') == std::string::npos) {
        return absl::StrCat("quotas: '", name, "' must be a label and its value, as team=red");
      }
    }
  }
  return "";
}

// `exit_codes: {134: fail, 77: machine}`. Returns what is wrong with it, or nothing.
std::string TakeExitCodes(const YAML::Node& value, ServerOptions* options) {
  const char* form = "must be as {134: fail, 77: machine}; a code is 1 to 255 and means restart, machine or fail";
  if (!value.IsMap()) return absl::StrCat("exit_codes: ", form);
  for (const auto& entry : value) {
    const int code = entry.first.as<int>();
    const std::optional<ExitMeaning> meaning = ParseExitMeaning(entry.second.as<std::string>());
    if (code < 1 || code > 255 || !meaning || meaning == ExitMeaning::kDone) {
      return absl::StrCat("exit_codes: '", entry.first.as<std::string>(), ": ", entry.second.as<std::string>(),
                          "' is wrong; it ", form);
    }
    options->exit_codes[code] = *meaning;
  }
  return "";
}

std::vector<std::string> KnownKeys() {
  std::vector<std::string> names = {"nodes", "quotas", "exit_codes"};
  for (const Key& key : kKeys) names.push_back(key.name);
  return names;
}

std::string UnknownKey(const std::string& name) {
  const std::vector<std::string> known = KnownKeys();
  const std::string meant = absl::StrReplaceAll(name.substr(0, 100), {{"-", "_"}});
  std::string nearest;
  size_t least = std::max<size_t>(2, meant.size() / 3) + 1;
  for (const std::string& key : known) {
    const size_t distance = EditDistance(meant, key);
    if (distance >= least) continue;
    least = distance;
    nearest = key;
  }
  return nearest.empty() ? absl::StrCat("unknown key '", name, "'; known are ", absl::StrJoin(known, ", "))
                         : absl::StrCat("unknown key '", name, "'; did you mean ", nearest, "?");
}

// What a field takes.
const char* TypeName(const std::string&) { return "text"; }
const char* TypeName(int) { return "a whole number"; }
const char* TypeName(double) { return "a number"; }
const char* TypeName(bool) { return "true or false"; }
const char* TypeName(const std::vector<std::string>&) { return "a list"; }

// What is wrong with one key of the config file, or nothing.
std::string TakeKey(const CLI::App& app, const std::string& name, const YAML::Node& value, ServerOptions* options) {
  for (const Key& key : kKeys) {
    if (name != key.name) continue;
    const char* type = std::visit([&](auto field) { return TypeName(options->*field); }, key.field);
    const std::string wrong = absl::StrCat(name, ": must be ", type, ", not ", Shown(value), "; ", key.help);
    if (value.IsNull()) return wrong;
    if (app.count(FlagOf(key)) > 0) return "";  // the flag wins
    try {
      std::visit([&](auto field) { options->*field = value.as<std::decay_t<decltype(options->*field)>>(); }, key.field);
    } catch (const YAML::Exception&) {
      return wrong;
    }
    return ProblemOfRange(key, *options, name);
  }
  try {
    if (name == "nodes") return TakeNodes(value, options);
    if (name == "quotas") return TakeQuotas(value, options);
    if (name == "exit_codes") return TakeExitCodes(value, options);
  } catch (const YAML::Exception&) {
    return absl::StrCat(name, ": a value has the wrong type");
  }
  if (name == "tls") return "tls: must be as {cert: FILE, key: FILE, client_ca: FILE, ca: FILE}";
  return UnknownKey(name);
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
    std::map<std::string, int> lines;
    const auto take = [&](const std::string& name, const YAML::Node& key, const YAML::Node& value) {
      const auto [earlier, is_new] = lines.emplace(name, key.Mark().line + 1);
      const std::string problem =
          is_new ? TakeKey(app, name, value, options)
                 : absl::StrCat(name, " is in line ", earlier->second, " already; keep one of both");
      if (!problem.empty()) problems.push_back(absl::StrCat(file.string(), ":", key.Mark().line + 1, ": ", problem));
    };
    for (const auto& entry : root) {
      const std::string name = entry.first.as<std::string>();
      if (name != "tls" || !entry.second.IsMap()) {
        take(name, entry.first, entry.second);
        continue;
      }
      // `tls: {cert: FILE}` is the same as `tls_cert: FILE`.
      for (const auto& part : entry.second) {
        take(absl::StrCat(name, "_", part.first.as<std::string>()), part.first, part.second);
      }
    }
  } catch (const YAML::Exception& error) {
    problems.push_back(absl::StrCat(file.string(), ":", error.mark.line + 1, ": ", error.msg));
  }
  if (problems.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrJoin(problems, "\n"));
}

absl::Status NoDataDir() {
  return absl::InvalidArgumentError("--data-dir is missing: name a folder for the database, attempts and outputs");
}

absl::Status CompleteServerOptions(ServerOptions* options) {
  if (options->data_dir.empty()) return NoDataDir();
  // By one name whatever it is called: what runs below it is looked for by its path.
  const fs::path data_dir = fs::absolute(options->data_dir);
  options->data_dir = WithoutLinks(data_dir).value_or(data_dir.lexically_normal()).string();
  size_t bad = 0;
  if (!IsValidUtf8(options->data_dir, &bad)) {
    return absl::InvalidArgumentError(
        absl::StrCat("--data-dir: the name of ", ToUtf8(options->data_dir), " is not UTF-8; choose another folder"));
  }
  for (std::string ServerOptions::*file :
       {&ServerOptions::tls_cert, &ServerOptions::tls_key, &ServerOptions::tls_client_ca, &ServerOptions::tls_ca}) {
    if (!(options->*file).empty()) options->*file = fs::absolute(options->*file).lexically_normal().string();
  }
  SIMPO_RETURN_IF_ERROR(CheckTls(options->Tls()));
  if (options->tls_ca.empty()) options->tls_ca = options->tls_cert;
  SIMPO_RETURN_IF_ERROR(CheckAddress("--listen", options->listen, *options));
  SIMPO_RETURN_IF_ERROR(CheckAddress("--http", options->http, *options));
  for (std::string& root : options->allowed_roots) {
    std::error_code error;
    if (!fs::is_directory(root, error)) {
      return absl::InvalidArgumentError(absl::StrCat("--allowed-roots: ", root, " is not a folder"));
    }
    root = fs::absolute(root).lexically_normal().string();
  }
  if (options->slots < 0 || options->slots > kMaxSlots) {
    return absl::InvalidArgumentError(
        absl::StrCat("--slots is ", options->slots, "; it must be 1 to ", kMaxSlots, ", or 0 for all cores"));
  }
  if (options->log_limit_mb < 0) return absl::InvalidArgumentError("--log-limit-mb must be 1 or more, or 0 for none");
  if (options->max_jobs_per_user < 0) {
    return absl::InvalidArgumentError("--max-jobs-per-user must be 1 or more, or 0 for no limit");
  }
  if (options->max_machine_faults < 0) return absl::InvalidArgumentError("--max-machine-faults must be 0 or more");
  SIMPO_RETURN_IF_ERROR(CompleteNodes(options));
  for (const Key& key : kKeys) {
    const std::string problem = ProblemOfRange(key, *options, FlagOf(key));
    if (!problem.empty()) return absl::InvalidArgumentError(problem);
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
