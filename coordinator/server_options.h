#ifndef SIMPO_COORDINATOR_SERVER_OPTIONS_H_
#define SIMPO_COORDINATOR_SERVER_OPTIONS_H_

#include <filesystem>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace CLI {
class App;
}

namespace simpo {

// How a coordinator is started. Each is a flag (--data-dir) and a key of the config file (data_dir).
struct ServerOptions {
  std::string data_dir;
  std::string listen = "127.0.0.1:7077";
  std::string http = "127.0.0.1:7078";
  int slots = 0;       // 0: as many as this process may use cores
  std::string worker;  // empty: simpo-worker beside this program
  std::string mpirun = "mpirun";
  bool insecure = false;
  double heartbeat_timeout_s = 30;  // of a rank
  double attach_timeout_s = 600;    // from mpirun's start to a rank's first word
  double stop_grace_s = 120;        // for a checkpoint before a cancelled job is ended by force
  double restart_pause_s = 1;       // before the second attempt; doubles with each further one
  double restart_pause_max_s = 60;
  double keep_ended_minutes = 10;  // how long an ended job stays on the metrics page
  double history_days = 90;        // how long an ended job is kept; 0: for ever
  double metrics_full_days = 30;   // after its end, with every point; 0: for ever
  // No flag: the simpo-coordinator program, which is also each attempt's supervisor. Empty: this one.
  std::string program;
};

// Adds the flags to a command line; their values land in `options` when it is parsed.
void AddServerFlags(CLI::App& app, ServerOptions* options);

// Takes from a YAML file what no flag has set. An unknown key, a wrong type: INVALID_ARGUMENT with every
// one of them, each with its line.
absl::Status ReadServerConfig(const CLI::App& app, const std::filesystem::path& file, ServerOptions* options);

// Fills in what is empty and checks what can be checked before anything is started: ranges, addresses,
// that the programs are there.
absl::Status CompleteServerOptions(ServerOptions* options);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_SERVER_OPTIONS_H_
