#include <algorithm>
#include <memory>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "simpoctl/commands.h"
#include "simpoctl/exit_codes.h"
#include "simpoctl/follow.h"
#include "simpoctl/format.h"
#include "simpoctl/metrics_text.h"
#include "simpoctl/terminal.h"

namespace simpo {
namespace {

constexpr int kMetricsPage = 2000;

struct FollowCommand {
  std::string job;
  int64_t timeout_s = -1;
};

struct LogsOptions {
  std::string job;
  bool follow = false;
  int rank = 0;
  int attempt = 0;
  int64_t tail = 0;
};

struct MetricsOptions {
  std::string job;
  bool eval = false;
  std::string output = "csv";
};

// Copies the log to standard output, over restarts of the coordinator.
class LogReader {
 public:
  LogReader(Client& client, const LogsOptions& options)
      : client_(client), options_(options), reconnect_(client, interrupt_, PrintErr) {}

  absl::StatusOr<int> Run() {
    while (true) {
      const grpc::Status status = ReadStream();
      SIMPO_RETURN_IF_ERROR(FlushOut());
      if (interrupt_.Requested()) break;
      if (status.ok() && (!options_.follow || JobHasEnded())) return kExitOk;
      const absl::Status next = reconnect_.Next(status);
      if (interrupt_.Requested()) break;
      SIMPO_RETURN_IF_ERROR(next);
    }
    PrintErr(absl::StrCat("\nDetached; the job goes on. Come back with: ", client_.command(), " logs ", options_.job,
                          " --follow\n"));
    return kExitNotFinished;
  }

 private:
  grpc::Status ReadStream() {
    grpc::ClientContext context;
    context.set_deadline(reconnect_.StreamDeadline());
    const Interrupt::Scope scope(interrupt_, context);
    v1::StreamLogsRequest request;
    request.set_job_id(options_.job);
    request.set_attempt(options_.attempt);
    request.set_rank(options_.rank);
    request.set_follow(options_.follow);
    request.set_cursor(cursor_);
    if (cursor_.empty()) request.set_tail_lines(options_.tail);
    const auto stream = client_.stub().StreamLogs(&context, request);
    v1::StreamLogsResponse response;
    while (stream->Read(&response)) {
      reconnect_.Alive();
      if (!response.cursor().empty()) cursor_ = response.cursor();
      if (attempt_ != 0 && response.attempt() != attempt_) {
        PrintErr(absl::StrCat("--- attempt ", response.attempt(), " ---\n"));
      }
      attempt_ = response.attempt();
      PrintOut(response.data());
      if (options_.follow && !FlushOut().ok()) context.TryCancel();
    }
    return stream->Finish();
  }

  // A coordinator that shuts down ends its streams in order too.
  bool JobHasEnded() {
    const absl::StatusOr<v1::GetJobResponse> response = client_.GetJob(options_.job);
    return response.ok() && IsFinal(response->job().state());
  }

  Client& client_;
  const LogsOptions& options_;
  Interrupt interrupt_;
  Reconnect reconnect_;
  std::string cursor_;
  int attempt_ = 0;
};

absl::StatusOr<int> Metrics(Client& client, const MetricsOptions& options) {
  v1::ListMetricsRequest request;
  request.set_job_id(options.job);
  request.set_split(options.eval ? "eval" : "train");
  request.set_after_step(-1);  // an evaluation before the first step has step 0
  request.set_page_size(kMetricsPage);
  std::vector<v1::MetricPoint> points;
  for (bool more = true; more;) {
    SIMPO_ASSIGN_OR_RETURN(v1::ListMetricsResponse response, client.ListMetrics(request));
    more = response.more() && response.points_size() > 0;
    if (points.empty() && response.kept_every() > 1) PrintErr(ThinnedNote(response));
    if (more) request.set_after_step(response.points().rbegin()->step());
    for (v1::MetricPoint& point : *response.mutable_points()) points.push_back(std::move(point));
  }
  if (points.empty()) PrintErr(absl::StrCat("No ", options.eval ? "evaluation" : "step", " is stored yet.\n"));
  PrintOut(options.output == "json" ? MetricsJson(points) : MetricsCsv(points));
  return kExitOk;
}

void AddJobArgument(CLI::App* command, std::string* job) {
  command->add_option("job", *job, "A job's id, a beginning of it, or its name")->required()->type_name("JOB");
}

}  // namespace

void AddWatch(CLI::App& app, CommandLine& line) {
  auto options = std::make_shared<FollowCommand>();
  CLI::App* command = app.add_subcommand("watch", "Show a job's progress until it ends; Ctrl-C leaves it running");
  AddJobArgument(command, &options->job);
  command->callback([&line, options] {
    line.run = [options](Client& client) { return FollowJob(client, options->job, FollowOptions{}); };
  });
}

void AddWait(CLI::App& app, CommandLine& line) {
  auto options = std::make_shared<FollowCommand>();
  CLI::App* command = app.add_subcommand("wait", "Wait until a job ends; the exit code tells how");
  AddJobArgument(command, &options->job);
  command->add_option("--timeout", options->timeout_s, "Seconds to wait at most; exit code 101 when they are over")
      ->check(CLI::Range(int64_t{0}, int64_t{1000000000}));
  command->callback([&line, options] {
    line.run = [options](Client& client) {
      FollowOptions follow{.quiet = true, .timeout = {}};
      if (options->timeout_s >= 0) follow.timeout = std::chrono::seconds(options->timeout_s);
      return FollowJob(client, options->job, follow);
    };
  });
}

void AddLogs(CLI::App& app, CommandLine& line) {
  auto options = std::make_shared<LogsOptions>();
  CLI::App* command = app.add_subcommand("logs", "Print what a rank wrote");
  AddJobArgument(command, &options->job);
  command->add_flag("-f,--follow", options->follow, "Go on until the job ends; Ctrl-C leaves it running");
  command->add_option("--rank", options->rank, "Rank (default 0); -1 is the launcher")->check(CLI::Range(-1, 1000000));
  command->add_option("--attempt", options->attempt, "Attempt, from 1 (default: the last)")
      ->check(CLI::Range(1, 1000000));
  command->add_option("--tail", options->tail, "Only the last lines (default: all)")
      ->check(CLI::Range(int64_t{1}, int64_t{1000000000}));
  command->callback(
      [&line, options] { line.run = [options](Client& client) { return LogReader(client, *options).Run(); }; });
}

void AddMetrics(CLI::App& app, CommandLine& line) {
  auto options = std::make_shared<MetricsOptions>();
  CLI::App* command = app.add_subcommand("metrics", "Print every step's values with every digit");
  AddJobArgument(command, &options->job);
  command->add_flag("--eval", options->eval, "The evaluations in place of the training steps");
  command->add_option("-o,--output", options->output, "csv or json")->check(CLI::IsMember({"csv", "json"}));
  command->callback([&line, options] { line.run = [options](Client& client) { return Metrics(client, *options); }; });
}

}  // namespace simpo
