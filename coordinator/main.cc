// simpo-coordinator: takes training jobs and sees them through.
//
//   simpo-coordinator --data-dir DIR [--config coordinator.yaml] [flags]
//   simpo-coordinator token create|list|revoke --data-dir DIR     or --config, as for backup
//   simpo-coordinator backup --data-dir DIR --to FOLDER    copies the databases, also while a coordinator runs
//   simpo-coordinator supervise --attempt-dir DIR          what it starts for each attempt of a job
#include <grpc/support/log.h>
#include <signal.h>
#include <sys/resource.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "common/log.h"
#include "coordinator/data_dir.h"
#include "coordinator/listen_address.h"
#include "coordinator/server.h"
#include "coordinator/server_options.h"
#include "coordinator/supervisor.h"
#include "coordinator/token_command.h"

namespace simpo {
namespace {

constexpr int kFailed = 1;
constexpr int kBadUsage = 2;

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "simpo-coordinator: %s\n", std::string(status.message()).c_str());
  return absl::IsInvalidArgument(status) ? kBadUsage : kFailed;
}

sigset_t EndSignals() {
  sigset_t set;
  sigemptyset(&set);
  for (int signal : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&set, signal);
  return set;
}

std::atomic<bool> failed = false;

// Ends this process in order; `what` also says what goes on and what to do.
void StopFailed(const std::string& what) {
  if (failed.exchange(true)) return;
  LOG_ERROR(what);
  kill(getpid(), SIGTERM);
}

// gRPC's own log would repeat what our messages say, but for this: after an error of accept it takes no connection any
// more. Ranks would be cut off one by one, and ended as silent.
void TakeGrpcLog(gpr_log_func_args* args) {
  if (std::getenv("GRPC_VERBOSITY") != nullptr) {
    std::fprintf(stderr, "%s:%d: %s\n", args->file, args->line, args->message);
  }
  if (!absl::StartsWith(args->message, "Failed accept")) return;
  StopFailed(
      absl::StrCat("cannot take connections any more and stops; running gangs go on, start the coordinator again, "
                   "with more open files if they have run out (LimitNOFILE= of the systemd unit): ",
                   args->message));
}

// Every rank and every client is an open file. The usual soft limit of 1,024 is for programs that use select().
void RaiseFileLimit() {
  constexpr rlim_t kMost = 1 << 20, kFew = 8192;
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  if (limit.rlim_cur < std::min(limit.rlim_max, kMost)) {
    limit.rlim_cur = std::min(limit.rlim_max, kMost);
    setrlimit(RLIMIT_NOFILE, &limit);
    getrlimit(RLIMIT_NOFILE, &limit);
  }
  if (limit.rlim_cur >= kFew) return;
  LOG_WARNING(absl::StrCat("this process may open ", limit.rlim_cur,
                           " files, one for each rank and client; for more than about ",
                           limit.rlim_cur - limit.rlim_cur / 10,
                           " of them raise its hard limit (ulimit -Hn; LimitNOFILE= of the systemd unit)"));
}

// Who may call at the port for gRPC; nothing, when it is one of this machine only.
std::string Openness(const ServerOptions& options, const std::string& reachable) {
  const absl::StatusOr<ListenAddress> given = ParseListenAddress("--listen", options.listen);
  const absl::StatusOr<ListenAddress> real = ParseListenAddress("--listen", reachable);
  if (!given.ok() || !real.ok() || given->IsLoopback()) return "";
  std::error_code error;
  std::string how = options.Tls().on() ? "with TLS" : "without TLS";
  if (!options.tls_client_ca.empty()) how += ", asks for certificates";
  if (std::filesystem::exists(options.TokenFile(), error)) how += ", asks for tokens";
  if (options.insecure) how += ", insecure";
  return absl::StrCat("; open to other machines at ", ListenAddress{.host = given->host, .port = real->port}.ToString(),
                      " (", how, ")");
}

int Serve(const ServerOptions& options) {
  RaiseFileLimit();
  // Before any thread exists, so that all inherit it and only sigwait below takes them.
  const sigset_t signals = EndSignals();
  sigprocmask(SIG_BLOCK, &signals, nullptr);
  absl::StatusOr<std::unique_ptr<Server>> server = Server::Start(
      options, SIMPO_VERSION, [](const absl::Status& status) { StopFailed(std::string(status.message())); });
  if (!server.ok()) return Fail(server.status());
  std::printf("simpo-coordinator %s ready: grpc %s, http %s, data %s, %d slots%s\n", SIMPO_VERSION,
              (*server)->grpc_address().c_str(), (*server)->http_address().c_str(), options.data_dir.c_str(),
              options.slots, Openness(options, (*server)->grpc_address()).c_str());
  std::fflush(stdout);
  int signal = 0;
  sigwait(&signals, &signal);
  if (!failed) LOG_INFO("stopping; running gangs go on, and the next coordinator finds them");
  server->reset();
  return failed ? kFailed : 0;
}

int Main(int argc, char** argv) {
  CLI::App app("Takes SimPO training jobs over gRPC and runs them as gangs of workers on this machine.");
  ServerOptions options;
  std::string config;
  std::string attempt_dir;
  std::string backup_to;
  AddServerFlags(app, &options);
  app.add_option("--config", config, "YAML file with the same settings, as data_dir: DIR; flags win");
  app.set_version_flag("--version", "simpo-coordinator " SIMPO_VERSION);
  CLI::App* supervise = app.add_subcommand("supervise", "Run one attempt of a job; the coordinator starts it");
  supervise->add_option("--attempt-dir", attempt_dir, "The attempt's folder")->required();
  std::function<absl::Status(const std::filesystem::path&)> run_token_command;
  AddTokenCommands(app, &run_token_command);
  CLI::App* backup = app.add_subcommand("backup", "Copy the databases, also while a coordinator runs");
  backup->fallthrough();  // --data-dir, --config
  backup->add_option("--to", backup_to, "A folder for the copies: a new or an empty one")->required();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kBadUsage;
  }
  if (supervise->parsed()) return RunSupervisor(attempt_dir);
  // A check of the library's own locks that costs some percent of every call.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  gpr_set_log_function(TakeGrpcLog);
  if (!config.empty()) {
    if (absl::Status status = ReadServerConfig(app, config, &options); !status.ok()) return Fail(status);
  }
  if (backup->parsed()) {
    if (options.data_dir.empty()) return Fail(NoDataDir());
    if (absl::Status status = BackUpDataDir(options.data_dir, backup_to); !status.ok()) return Fail(status);
    std::printf("%s: backed up to %s\n", options.data_dir.c_str(), backup_to.c_str());
    return 0;
  }
  if (run_token_command) {
    if (options.data_dir.empty()) return Fail(NoDataDir());
    std::error_code error;
    if (!std::filesystem::exists(options.data_dir, error)) {
      if (!app.get_subcommand("token")->got_subcommand("create")) {
        return Fail(absl::NotFoundError(
            absl::StrCat("there is no data folder ", options.data_dir, "; name the coordinator's with --data-dir")));
      }
      std::fprintf(stderr, "Making a new data folder: %s\n", options.data_dir.c_str());
    }
    if (absl::Status status = MakeDataDir(options.data_dir); !status.ok()) return Fail(status);
    if (absl::Status status = BecomeOwner(options.data_dir); !status.ok()) return Fail(status);
    const absl::Status status = run_token_command(options.TokenFile());
    return status.ok() ? 0 : Fail(status);
  }
  if (absl::Status status = CompleteServerOptions(&options); !status.ok()) return Fail(status);
  return Serve(options);
}

}  // namespace
}  // namespace simpo

int main(int argc, char** argv) {
  try {
    return simpo::Main(argc, argv);
  } catch (const std::exception& error) {  // no memory, a folder that cannot be looked at
    std::fprintf(stderr, "simpo-coordinator: %s\n", error.what());
    return simpo::kFailed;
  }
}
