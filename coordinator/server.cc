#include "coordinator/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/health_check_service_interface.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/host_name.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "coordinator/audit_log.h"
#include "coordinator/controller.h"
#include "coordinator/data_dir.h"
#include "coordinator/exposition.h"
#include "coordinator/guard.h"
#include "coordinator/http_server.h"
#include "coordinator/launcher_mpirun.h"
#include "coordinator/listen_address.h"
#include "coordinator/tls.h"
#include "coordinator/training_service.h"
#include "coordinator/worker_service.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using std::chrono::milliseconds;

constexpr milliseconds kShutdownGrace{2'000};  // for calls that are under way
constexpr double kSecondsOfADay = 86'400;

// What one client may take of the server.
constexpr int kMaxMessageBytes = 2 << 20;  // a job file has 1 MiB at most
constexpr int kMaxMetadataBytes = 16 << 10;
constexpr int kMaxStreamsOfAConnection = 256;
constexpr int kMaxStreamsOfAUser = 200;
constexpr int kHandshakeMs = 10'000;
constexpr int kIdleConnectionMs = 600'000;
// A connection whose other end is gone is noticed within the sum of both; clients may ask as often.
constexpr int kKeepaliveMs = 60'000;
constexpr int kKeepaliveTimeoutMs = 20'000;
constexpr int kLeastPingMs = 10'000;

milliseconds Milliseconds(double seconds) { return milliseconds(static_cast<int64_t>(seconds * 1000)); }

Guard::Options GuardOptions(const ServerOptions& options, AuditLog* audit, AuditLog* refusals) {
  return {.token_file = options.TokenFile(),
          .client_certificates = !options.tls_client_ca.empty(),
          .calls_per_second = options.calls_per_second,
          .streams_per_user = kMaxStreamsOfAUser,
          .audit = audit,
          .refusals = refusals};
}

Dispatcher::Options DispatcherOptions(const ServerOptions& options, const AllowedRoots& roots) {
  Dispatcher::Options result;
  result.slots_total = options.slots;
  result.queue = {.nodes = options.nodes,
                  .user_quotas = options.user_quotas,
                  .label_quotas = options.label_quotas,
                  .preemption = options.preemption,
                  .starvation_ms = static_cast<int64_t>(options.starvation_minutes * 60'000)};
  // Folders of jobs are compared by the names that they have without links.
  const fs::path outputs_dir = fs::path(options.data_dir) / "outputs";
  result.outputs_dir = WithoutLinks(outputs_dir).value_or(outputs_dir);
  result.roots = roots;
  result.liveness.attach = Milliseconds(options.attach_timeout_s);
  result.liveness.heartbeat = Milliseconds(options.heartbeat_timeout_s);
  result.heartbeat_interval = std::min(result.heartbeat_interval, result.liveness.heartbeat / 4);
  result.liveness.prepare = Milliseconds(options.prepare_timeout_s);
  result.liveness.load = Milliseconds(options.load_timeout_s);
  result.liveness.step = Milliseconds(options.step_timeout_s);
  result.liveness.eval = Milliseconds(options.eval_timeout_s);
  result.liveness.checkpoint = Milliseconds(options.checkpoint_timeout_s);
  result.restart.first_pause = Milliseconds(options.restart_pause_s);
  result.restart.longest_pause = Milliseconds(options.restart_pause_max_s);
  result.restart.max_machine_faults = options.max_machine_faults;
  result.restart.exit_codes = options.exit_codes;
  result.max_jobs_per_user = options.max_jobs_per_user;
  result.stop_grace = Milliseconds(options.stop_grace_s);
  result.keep_jobs = Milliseconds(options.history_days * kSecondsOfADay);
  result.keep_points = Milliseconds(options.metrics_full_days * kSecondsOfADay);
  return result;
}

class ServerImpl final : public Server {
 public:
  ServerImpl(const ServerOptions& options, FileLock lock)
      : options_(options),
        lock_(std::move(lock)),
        tls_(options_.Tls()),
        audit_(fs::path(options_.data_dir) / "audit.jsonl"),
        refusals_(fs::path(options_.data_dir) / "audit-refused.jsonl"),
        guard_(GuardOptions(options_, &audit_, &refusals_)),
        roots_(fs::path(options_.data_dir) / "outputs", options_.allowed_roots, [this] { return guard_.asks(); }) {}
  ~ServerImpl() override { Shutdown(); }

  absl::Status Begin(const std::string& version, std::function<void(const absl::Status&)> on_failure) {
    facts_ = {.version = version,
              .start_ms = Moment::Now().unix_ms,
              .data_dir = options_.data_dir,
              .hostname = HostName(),
              .slots_total = options_.slots};
    SIMPO_RETURN_IF_ERROR(CheckTokens());
    SIMPO_RETURN_IF_ERROR(OpenStores());
    dispatcher_.emplace(DispatcherOptions(options_, roots_), *database_, *jobs_, *metrics_, views_);
    views_.SetListener([this] { pump_->Wake(); });
    pump_.emplace();
    // Jobs are there before anybody can ask for them.
    SIMPO_RETURN_IF_ERROR(dispatcher_->Load(Moment::Now()));
    controller_.emplace(*dispatcher_, [this, on_failure](const absl::Status& status) {
      healthy_ = false;
      on_failure(absl::Status(
          status.code(), absl::StrCat("cannot write the database and stops; running gangs go on, start the coordinator "
                                      "again when this is mended: ",
                                      std::string(status.message()))));
    });
    metrics_->SetListener([this] { controller_->Wake(); });
    SIMPO_RETURN_IF_ERROR(StartHttp([on_failure](const absl::Status& status) {
      on_failure(absl::Status(
          status.code(), absl::StrCat("cannot serve HTTP any more and stops; running gangs go on, start the "
                                      "coordinator again, when the machine has open files and memory again if they "
                                      "have run out: ",
                                      std::string(status.message()))));
    }));
    SIMPO_RETURN_IF_ERROR(StartGrpc());
    std::string tls_name;
    if (options_.Tls().on()) {
      const ListenAddress address = *ParseListenAddress("grpc", grpc_address_);
      SIMPO_ASSIGN_OR_RETURN(tls_name, NameToCheck(options_.tls_cert, address.host));
    }
    launcher_.emplace(MpirunLauncher::Options{.attempts_dir = fs::path(options_.data_dir) / "attempts",
                                              .supervisor = options_.program,
                                              .worker = options_.worker,
                                              .mpirun = options_.mpirun,
                                              .coordinator_address = grpc_address_,
                                              .log_limit_bytes = int64_t{options_.log_limit_mb} << 20,
                                              .ca = options_.tls_ca,
                                              .tls_name = tls_name});
    controller_->Start(*launcher_);
    return absl::OkStatus();
  }

  const std::string& grpc_address() const override { return grpc_address_; }
  const std::string& http_address() const override { return facts_.http_address; }

 private:
  // One that has gone keeps nobody out who starts the coordinator: gangs are looked after until it is back.
  absl::Status CheckTokens() {
    const absl::Status status = guard_.tokens_status();
    if (status.ok() && guard_.asks() && options_.allowed_roots.empty()) {
      LOG_WARNING(
          "callers have to say who they are, so jobs may use paths below DATA_DIR/outputs only: set allowed_roots");
    }
    if (status.ok() || absl::IsUnavailable(status)) return absl::OkStatus();
    return absl::FailedPreconditionError(absl::StrCat("cannot check users' tokens: ", std::string(status.message()),
                                                      "; make it a file of this account (", geteuid(),
                                                      ") with mode 600, or restore it from a backup"));
  }

  absl::Status OpenStores() {
    const fs::path dir = options_.data_dir;
    const bool is_new = !fs::exists(dir / kJobsFile);
    SIMPO_ASSIGN_OR_RETURN(database_, Database::Open(dir / kJobsFile));
    SIMPO_ASSIGN_OR_RETURN(jobs_, JobStore::Open(*database_));
    if (!is_new && !fs::exists(dir / kMetricsFile)) {  // that of an older coordinator was moved to it just now
      LOG_WARNING(absl::StrCat("there is ", (dir / kJobsFile).string(), " but no ", kMetricsFile,
                               " beside it: the steps of its jobs are gone. After a restore, stop the coordinator and "
                               "put both copies there"));
    }
    SIMPO_ASSIGN_OR_RETURN(metrics_, MetricStore::Open(dir / kMetricsFile));
    return absl::OkStatus();
  }

  ExpositionSnapshot TakeSnapshot() const {
    return {.now_ms = Moment::Now().unix_ms,
            .jobs = views_.All(),
            .keep_ended_ms = static_cast<int64_t>(options_.keep_ended_minutes * 60'000),
            .stats = controller_->stats(),
            .rpc_durations = rpc_stats_.Get(),
            .slots_total = options_.slots,
            .version = facts_.version};
  }

  std::string Problem() {
    if (draining_) return "the coordinator is stopping";
    return healthy_ ? tls_.Problem() : "the database cannot be written; see the coordinator's log";
  }

  // TLS itself has checked a client's certificate, where they are asked for.
  std::function<absl::Status(const std::string&, const std::string&)> HttpAdmission() {
    return [this](const std::string& authorization, const std::string& peer) {
      return guard_
          .Admit("http/metrics",
                 {.authorization = authorization, .certificate = !options_.tls_client_ca.empty(), .peer = peer}, "")
          .status();
    };
  }

  absl::Status StartHttp(std::function<void(const absl::Status&)> on_failure) {
    SIMPO_ASSIGN_OR_RETURN(const ListenAddress address, ParseListenAddress("--http", options_.http));
    SIMPO_RETURN_IF_ERROR(CheckCanListen(address, "--http"));
    collectable_.emplace([this] { return TakeSnapshot(); });
    const bool open = !address.IsLoopback();
    SIMPO_ASSIGN_OR_RETURN(http_, HttpServer::Start({.host = address.host,
                                                     .port = address.port,
                                                     .title = absl::StrCat("simpo-coordinator ", facts_.version),
                                                     .source = &*collectable_,
                                                     .problem = [this] { return Problem(); },
                                                     .tls = open ? &tls_ : nullptr,
                                                     .admit = open ? HttpAdmission() : nullptr,
                                                     .on_failure = std::move(on_failure)}));
    facts_.http_address = address.Reachable(http_->port());
    return absl::OkStatus();
  }

  absl::Status StartGrpc() {
    SIMPO_ASSIGN_OR_RETURN(const ListenAddress address, ParseListenAddress("--listen", options_.listen));
    SIMPO_RETURN_IF_ERROR(CheckCanListen(address, "--listen"));
    training_.emplace(TrainingService::Parts{.controller = *controller_,
                                             .views = views_,
                                             .jobs = *jobs_,
                                             .metrics = *metrics_,
                                             .pump = *pump_,
                                             .rpc_stats = rpc_stats_,
                                             .facts = facts_,
                                             .guard = guard_,
                                             .roots = roots_});
    workers_.emplace(*controller_, views_);
    grpc::EnableDefaultHealthCheckService(true);
    grpc::reflection::InitProtoReflectionServerBuilderPlugin();
    int port = 0;
    grpc::ServerBuilder builder;
    // Two servers would otherwise share the port in silence.
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
    for (const auto& [argument, value] :
         {std::pair(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes),
          std::pair(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxStreamsOfAConnection),
          std::pair(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, kHandshakeMs),
          std::pair(GRPC_ARG_MAX_CONNECTION_IDLE_MS, kIdleConnectionMs),
          std::pair(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs),
          std::pair(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs),
          std::pair(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1),
          std::pair(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kLeastPingMs)}) {
      builder.AddChannelArgument(argument, value);
    }
    builder.AddListeningPort(address.ToString(), MakeServerCredentials(tls_), &port);
    builder.RegisterService(&*training_);
    builder.RegisterService(&*workers_);
    grpc_ = builder.BuildAndStart();
    if (grpc_ == nullptr || port == 0) {
      return absl::UnavailableError(absl::StrCat("cannot listen for gRPC on ", address.ToString(),
                                                 "; choose another address with --listen (port 0: any free one)"));
    }
    grpc_address_ = address.Reachable(port);
    grpc::HealthCheckServiceInterface& health = *grpc_->GetHealthCheckService();
    for (const char* service : {v1::TrainingService::service_full_name(), v1::WorkerService::service_full_name()}) {
      health.SetServingStatus(service, true);
    }
    return absl::OkStatus();
  }

  // Users and ranks first, so that what they have said is still taken; then the controller.
  void Shutdown() {
    draining_ = true;
    if (grpc_) grpc_->GetHealthCheckService()->Shutdown();
    if (pump_) pump_->Stop();
    if (grpc_) grpc_->Shutdown(std::chrono::system_clock::now() + kShutdownGrace);
    http_.reset();
    if (controller_) controller_->Stop();
    grpc_.reset();
  }

  // In the order of construction; each needs only those above it.
  const ServerOptions options_;
  const FileLock lock_;
  ServerFacts facts_;
  std::atomic<bool> healthy_ = true;
  std::atomic<bool> draining_ = false;
  ServedTls tls_;
  AuditLog audit_;
  AuditLog refusals_;
  Guard guard_;
  const AllowedRoots roots_;
  std::unique_ptr<Database> database_;
  std::unique_ptr<JobStore> jobs_;
  std::unique_ptr<MetricStore> metrics_;
  JobViews views_;
  RpcStats rpc_stats_;
  std::optional<MpirunLauncher> launcher_;
  std::optional<StreamPump> pump_;
  std::optional<Dispatcher> dispatcher_;
  std::optional<Controller> controller_;
  std::optional<CoordinatorCollectable> collectable_;
  std::optional<TrainingService> training_;
  std::optional<WorkerService> workers_;
  std::unique_ptr<grpc::Server> grpc_;
  std::unique_ptr<HttpServer> http_;
  std::string grpc_address_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServerOptions& options, const std::string& version,
                                                      std::function<void(const absl::Status&)> on_failure) {
  SIMPO_RETURN_IF_ERROR(MakeDataDir(options.data_dir));
  SIMPO_ASSIGN_OR_RETURN(FileLock lock, LockDataDir(options.data_dir));
  auto server = std::make_unique<ServerImpl>(options, std::move(lock));
  SIMPO_RETURN_IF_ERROR(server->Begin(version, std::move(on_failure)));
  return server;
}

}  // namespace simpo
