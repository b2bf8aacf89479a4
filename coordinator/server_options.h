#ifndef SIMPO_COORDINATOR_SERVER_OPTIONS_H_
#define SIMPO_COORDINATOR_SERVER_OPTIONS_H_

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/cluster.h"
#include "coordinator/restart_policy.h"
#include "coordinator/tls.h"
#include "coordinator/tokens.h"

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
  std::string tls_cert, tls_key;           // PEM files; empty: no TLS
  std::string tls_client_ca;               // authorities of clients' certificates; empty: none are asked for
  std::string tls_ca;                      // by which ranks know this coordinator; empty: tls_cert
  std::vector<std::string> allowed_roots;  // for the paths of jobs, besides the outputs folder
  double calls_per_second = 100;           // of each user with a token; 0: no limit
  int max_jobs_per_user = 20'000;          // that have not ended; 0: no limit
  double heartbeat_timeout_s = 30;         // of a rank
  double attach_timeout_s = 600;           // from mpirun's start to a rank's first word
  double prepare_timeout_s = 21600;        // for downloads and the token cache
  double load_timeout_s = 1800;            // without getting on, while the model is loaded
  double step_timeout_s = 1800;            // in a step
  double eval_timeout_s = 1800;            // in an evaluation
  double checkpoint_timeout_s = 1800;      // while a checkpoint or the model is written
  double stop_grace_s = 120;               // for a checkpoint before a cancelled job is ended by force
  double restart_pause_s = 1;              // before the second attempt; doubles with each further one
  double restart_pause_max_s = 60;
  int max_machine_faults = 20;     // attempts of a job that may be lost to faults of the machine
  int log_limit_mb = 256;          // of each log file of an attempt; 0: no limit
  double keep_ended_minutes = 10;  // how long an ended job stays on the metrics page
  double history_days = 90;        // how long an ended job is kept; 0: for ever
  double metrics_full_days = 30;   // after its end, with every point; 0: for ever
  bool preemption = false;         // jobs of higher priority may take the slots of running ones
  double starvation_minutes = 60;  // of waiting, after which a job gains priority; 0: never
  // In the config file only. This machine, when none is named; more than one needs a launcher that
  // reaches them.
  std::vector<Node> nodes;
  std::map<std::string, int> user_quotas, label_quotas;  // as in Scheduler::Options
  std::map<int, ExitMeaning> exit_codes;                 // as in RestartPolicy
  TlsConfig Tls() const { return {.cert = tls_cert, .key = tls_key, .client_ca = tls_client_ca, .ca = tls_ca}; }
  // Where `simpo-coordinator token` keeps the tokens.
  std::filesystem::path TokenFile() const { return std::filesystem::path(data_dir) / kTokensFile; }

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

// What is said when data_dir is empty.
absl::Status NoDataDir();

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_SERVER_OPTIONS_H_
