#include "worker/coordinator_client.h"

#include <grpcpp/grpcpp.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <fstream>
#include <mutex>
#include <random>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "common/host_name.h"
#include "common/log.h"
#include "common/metrics_line.h"
#include "common/text.h"
#include "simpo/v1/worker_service.grpc.pb.h"
#include "worker/coordinator_channel.h"

namespace simpo {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;
using Stream = grpc::ClientReaderWriter<v1::AttachRequest, v1::AttachResponse>;

constexpr milliseconds kFirstBackoff{200};
constexpr milliseconds kMaxBackoff{5'000};  // well below heartbeat_timeout: after a cut there must be time to be heard
constexpr milliseconds kWelcomeTimeout{10'000};
constexpr milliseconds kDefaultHeartbeat{2'000};
constexpr milliseconds kMinHeartbeat{50};
constexpr milliseconds kMaxHeartbeat{60'000};
constexpr size_t kMaxEvents = 256;
constexpr size_t kMaxReportTimes = 4096;
constexpr size_t kMaxCommands = 16;
constexpr size_t kPointsPerRead = 64;  // so that heartbeats keep time in a long replay
constexpr int kStoppedExitCode = 143;  // stopped on request, after a checkpoint: not an error

// The two splits; their indices in the arrays below.
enum Split { kTrain = 0, kEval = 1 };
constexpr std::array<const char*, 2> kSplitNames = {"train", "eval"};
constexpr std::array<int64_t, 2> kNothing = {0, -1};  // as in Welcome: an evaluation may be of step 0
using Steps = std::array<int64_t, 2>;

google::protobuf::Timestamp Now() {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  google::protobuf::Timestamp time;
  time.set_seconds(std::chrono::duration_cast<std::chrono::seconds>(now).count());
  time.set_nanos(static_cast<int32_t>((now % std::chrono::seconds(1)).count()));
  return time;
}

// Largest resident memory of this process so far, in bytes.
int64_t PeakMemory() {
  rusage usage = {};
  return getrusage(RUSAGE_SELF, &usage) == 0 ? int64_t{usage.ru_maxrss} * 1024 : 0;
}

void Describe(const RankActivity::State& activity, v1::Heartbeat* heartbeat) {
  heartbeat->set_moves(activity.moves);
  if (activity.collectives == 0) return;
  v1::LastCollective& last = *heartbeat->mutable_collective();
  last.set_number(activity.collectives);
  last.set_verb(activity.verb);
  last.set_bytes(activity.bytes);
  last.set_waiting_seconds(activity.waiting_s);
}

// Reads a metrics file from front to end as it grows.
class MetricsTail {
 public:
  explicit MetricsTail(std::filesystem::path path) : path_(std::move(path)) {}

  // The next points whose step is above `after` and at most `last`; fewer than `max` when the file
  // has no more of them. A line that is not whole yet is read again the next time.
  std::vector<v1::MetricPoint> Read(int64_t after, int64_t last, size_t max) {
    std::vector<v1::MetricPoint> points;
    std::ifstream file(path_);
    file.seekg(offset_);
    for (std::string line; points.size() < max && std::getline(file, line) && !file.eof();) {
      const std::optional<ParsedMetrics> parsed = ParseMetricsLine(line);
      if (parsed && parsed->step > last) break;
      offset_ += static_cast<std::streamoff>(line.size()) + 1;
      if (!parsed) LOG_WARNING(absl::StrCat(path_.string(), ": a line is not a JSON object with step"));
      if (!parsed || parsed->step <= after) continue;
      v1::MetricPoint& point = points.emplace_back();
      point.set_step(parsed->step);
      point.mutable_values()->insert(parsed->values.begin(), parsed->values.end());
    }
    return points;
  }

 private:
  const std::filesystem::path path_;
  std::streamoff offset_ = 0;
};

// All reports of steps go by the file: what is sent live and what is replayed after an outage is
// then the same, and an outage of any length takes no memory.
//
// The client's thread connects, sends, and connects again; in a session a second thread receives.
class Client final : public CoordinatorClient {
 public:
  explicit Client(Options options) : options_(std::move(options)), random_(std::random_device{}()) {
    thread_ = std::thread([this] { Run(); });
  }
  ~Client() override { Stop(); }

  void SetPhase(std::string_view phase, int64_t step, int64_t steps_planned) override;
  void SetLastStep(double seconds, double waited_seconds) override;
  void ReportStep(std::string_view split, int64_t step, const std::map<std::string, double>& values) override;
  void ReportEvent(std::string_view type, std::string_view message, int64_t step) override;
  std::optional<Command> TakeCommand() override;
  void Finish(int exit_code, std::string_view message, int timeout_ms) override;

 private:
  // One connection to one coordinator.
  struct Session {
    Session(const Options& options)
        : tails{MetricsTail(options.metrics_path), MetricsTail(options.eval_metrics_path)} {}
    std::shared_ptr<grpc::Channel> channel;
    grpc::ClientContext context;
    std::unique_ptr<Stream> stream;
    std::array<MetricsTail, 2> tails;
    Steps sent = kNothing;
    Clock::time_point next_heartbeat = Clock::now();
    milliseconds heartbeat_interval = kDefaultHeartbeat;
    // Under the client's mutex.
    bool welcome = false;
    bool closed = false;  // nothing more will be received
  };
  struct Event {
    v1::WorkerEvent event;
    bool sent = false;
    int64_t after_step = 0;  // the last train step that was sent before it
  };

  void Run();
  void Stop();
  // Runs one session to its end. True when it ended because all was said.
  bool RunSession(std::string* address, bool* welcomed, std::string* problem);
  bool Greet(Session& session);
  void Receive(Session& session);
  // Until all is said (true) or the stream is broken (false).
  bool SendReports(Session& session);
  // Each false when the stream is broken.
  bool SendPoints(Session& session, int split);
  bool SendEvents(Session& session);
  bool SendHeartbeat(Session& session);
  // The following want mutex_ held.
  bool PointsWait(const Session& session) const;
  bool EventsWait() const;
  bool AllAcknowledged() const;
  void TakeAck(const Steps& steps);
  void PushEvent(v1::WorkerEvent event);

  const Options options_;
  std::mt19937 random_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::string phase_;
  int64_t step_ = 0;
  int64_t steps_planned_ = 0;
  double last_step_seconds_ = 0, last_step_waited_seconds_ = 0;
  bool phase_changed_ = false;
  Steps reported_ = kNothing;  // last steps whose lines stand in the files
  Steps acked_ = kNothing;     // last steps that the coordinator holds
  // When the lines not yet acknowledged were reported; of lines that an earlier process wrote, and
  // of the oldest ones in a long outage, nothing is known.
  std::array<std::map<int64_t, google::protobuf::Timestamp>, 2> report_times_;
  std::deque<Event> events_;  // not yet sent, or sent and perhaps lost
  std::deque<Command> commands_;
  bool finishing_ = false;  // `finished` is among the events; leave when all is acknowledged
  bool finished_ = false;   // and it has been
  bool stop_ = false;
  Session* session_ = nullptr;  // the current one, for Stop

  std::thread thread_;
};

void Client::SetPhase(std::string_view phase, int64_t step, int64_t steps_planned) {
  const std::lock_guard lock(mutex_);
  phase_changed_ |= phase != phase_;
  phase_ = phase;
  step_ = step;
  steps_planned_ = steps_planned;
  if (phase_changed_) changed_.notify_all();
}

void Client::SetLastStep(double seconds, double waited_seconds) {
  const std::lock_guard lock(mutex_);
  last_step_seconds_ = seconds;
  last_step_waited_seconds_ = waited_seconds;
}

void Client::ReportStep(std::string_view split, int64_t step, const std::map<std::string, double>& /*values*/) {
  const std::lock_guard lock(mutex_);
  const int index = split == kSplitNames[kTrain] ? kTrain : kEval;
  reported_[index] = std::max(reported_[index], step);
  report_times_[index][step] = Now();
  if (report_times_[index].size() > kMaxReportTimes) {
    report_times_[index].erase(report_times_[index].begin());
  }
  changed_.notify_all();
}

void Client::PushEvent(v1::WorkerEvent event) {
  if (events_.size() == kMaxEvents) {
    if (!events_.front().sent) {
      LOG_WARNING(absl::StrCat("too many events wait for the coordinator; dropped: ", events_.front().event.message()));
    }
    events_.pop_front();
  }
  events_.push_back({.event = std::move(event)});
  changed_.notify_all();
}

void Client::ReportEvent(std::string_view type, std::string_view message, int64_t step) {
  v1::WorkerEvent event;
  *event.mutable_time() = Now();
  event.set_type(std::string(type));
  event.set_message(ToUtf8(message));  // it may name a file
  event.set_step(step);
  const std::lock_guard lock(mutex_);
  PushEvent(std::move(event));
}

std::optional<CoordinatorClient::Command> Client::TakeCommand() {
  const std::lock_guard lock(mutex_);
  if (commands_.empty()) return std::nullopt;
  const Command command = commands_.front();
  commands_.pop_front();
  return command;
}

void Client::Finish(int exit_code, std::string_view message, int timeout_ms) {
  {
    std::unique_lock lock(mutex_);
    if (finishing_ || stop_) return;
    v1::WorkerEvent event;
    *event.mutable_time() = Now();
    event.set_type(exit_code == 0 || exit_code == kStoppedExitCode ? "finished" : "error");
    event.set_message(ToUtf8(message));
    event.set_step(step_);
    event.set_exit_code(exit_code);
    PushEvent(std::move(event));
    finishing_ = true;
    changed_.notify_all();
    const bool all = changed_.wait_for(lock, milliseconds(timeout_ms), [&] { return finished_; });
    if (!all) {
      LOG_WARNING(absl::StrCat("the coordinator did not acknowledge the last reports within ", timeout_ms,
                               " ms; they stand in ", options_.metrics_path.string()));
    }
  }
  Stop();
}

void Client::Stop() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    if (session_ != nullptr) session_->context.TryCancel();
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

void Client::Run() {
  milliseconds backoff = kFirstBackoff;
  bool away = false;  // said once per outage
  while (true) {
    std::string address;
    bool welcomed = false;
    std::string problem;
    const bool all_said = RunSession(&address, &welcomed, &problem);
    std::unique_lock lock(mutex_);
    finished_ |= all_said;
    changed_.notify_all();
    if (all_said || stop_) return;
    if (welcomed || !away) {
      LOG_WARNING(absl::StrCat("no connection to the coordinator at ", address, ": ", problem,
                               "; training goes on, reports will follow"));
    }
    away = true;
    if (welcomed) backoff = kFirstBackoff;
    std::uniform_real_distribution<double> jitter(0.5, 1.0);
    const auto pause =
        std::chrono::duration<double, std::milli>(static_cast<double>(backoff.count()) * jitter(random_));
    if (changed_.wait_for(lock, pause, [&] { return stop_; })) return;
    backoff = std::min(backoff * 2, kMaxBackoff);
  }
}

bool Client::RunSession(std::string* address, bool* welcomed, std::string* problem) {
  Session session(options_);
  absl::StatusOr<std::shared_ptr<grpc::Channel>> channel = ConnectToCoordinator(options_, address);
  if (!channel.ok()) {
    *problem = std::string(channel.status().message());
    return false;
  }
  session.channel = *std::move(channel);
  session.context.AddMetadata("simpo-attempt-secret", options_.secret);
  {
    const std::lock_guard lock(mutex_);
    if (stop_) return false;
    session_ = &session;
  }
  session.stream = v1::WorkerService::NewStub(session.channel)->Attach(&session.context);
  std::thread receiver([&] { Receive(session); });
  const bool all_said = Greet(session) && SendReports(session);
  if (all_said) {
    session.stream->WritesDone();
  } else {
    session.context.TryCancel();
  }
  receiver.join();
  const grpc::Status status = session.stream->Finish();
  const std::lock_guard lock(mutex_);
  session_ = nullptr;
  *welcomed = session.welcome;
  *problem = status.ok() ? "it closed the stream" : status.error_message();
  // Its OK comes after it has read everything.
  return all_said && status.ok();
}

bool Client::Greet(Session& session) {
  v1::AttachRequest request;
  FillHello(options_, request.mutable_hello());
  if (!session.stream->Write(request)) return false;
  std::unique_lock lock(mutex_);
  changed_.wait_for(lock, kWelcomeTimeout, [&] { return session.welcome || session.closed || stop_; });
  if (!session.welcome || stop_) return false;
  LOG_INFO(absl::StrCat("reporting to the coordinator from step ", session.sent[kTrain] + 1));
  return true;
}

void Client::Receive(Session& session) {
  v1::AttachResponse response;
  while (session.stream->Read(&response)) {
    const std::lock_guard lock(mutex_);
    if (response.has_welcome() && !session.welcome) {
      const v1::Welcome& welcome = response.welcome();
      acked_ = kNothing;
      // What another session sent and no acknowledgement has confirmed may be lost: once more. The welcome's steps
      // confirm no event: a coordinator that was killed may have stored the steps and not yet the event before them.
      for (Event& event : events_) event.sent = false;
      TakeAck({welcome.last_stored_step(), welcome.last_stored_eval_step()});
      session.sent = acked_;
      if (welcome.heartbeat_interval_ms() > 0) {
        session.heartbeat_interval =
            std::clamp(milliseconds(welcome.heartbeat_interval_ms()), kMinHeartbeat, kMaxHeartbeat);
      }
      session.welcome = true;
    } else if (response.has_ack()) {
      TakeAck({response.ack().step(), response.ack().eval_step()});
    } else if (response.has_command() && commands_.size() < kMaxCommands) {
      const v1::CommandKind kind = response.command().kind();
      LOG_INFO(absl::StrCat("the coordinator says ", v1::CommandKind_Name(kind), ": ", response.command().reason()));
      if (kind == v1::COMMAND_KIND_CHECKPOINT) commands_.push_back(Command::kCheckpoint);
      if (kind == v1::COMMAND_KIND_STOP) commands_.push_back(Command::kStop);
    }
    changed_.notify_all();
  }
  const std::lock_guard lock(mutex_);
  session.closed = true;
  changed_.notify_all();
}

void Client::TakeAck(const Steps& steps) {
  for (int split : {kTrain, kEval}) {
    acked_[split] = std::max(acked_[split], steps[split]);
    auto& times = report_times_[split];
    times.erase(times.begin(), times.upper_bound(acked_[split]));
  }
  // An event has no answer of its own. But a stream keeps its order: a step that was sent after it
  // is there, so the event is.
  while (!events_.empty() && events_.front().sent && events_.front().after_step < acked_[kTrain]) {
    events_.pop_front();
  }
}

bool Client::PointsWait(const Session& session) const {
  return session.sent[kTrain] < reported_[kTrain] || session.sent[kEval] < reported_[kEval];
}

bool Client::EventsWait() const {
  return std::any_of(events_.begin(), events_.end(), [](const Event& event) { return !event.sent; });
}

bool Client::AllAcknowledged() const {
  return !EventsWait() && acked_[kTrain] >= reported_[kTrain] && acked_[kEval] >= reported_[kEval];
}

bool Client::SendReports(Session& session) {
  while (true) {
    {
      std::unique_lock lock(mutex_);
      changed_.wait_until(lock, session.next_heartbeat, [&] {
        return stop_ || session.closed || phase_changed_ || PointsWait(session) || EventsWait() ||
               (finishing_ && AllAcknowledged());
      });
      if (stop_ || session.closed) return false;
      if (finishing_ && AllAcknowledged()) return true;
    }
    const bool sent = SendHeartbeat(session) && SendEvents(session) && SendPoints(session, kTrain) &&
                      SendPoints(session, kEval) && SendEvents(session);
    if (!sent) return false;
  }
}

bool Client::SendHeartbeat(Session& session) {
  v1::AttachRequest request;
  {
    const std::lock_guard lock(mutex_);
    if (!phase_changed_ && Clock::now() < session.next_heartbeat) return true;
    phase_changed_ = false;
    v1::Heartbeat& heartbeat = *request.mutable_heartbeat();
    heartbeat.set_phase(phase_);
    heartbeat.set_step(step_);
    heartbeat.set_steps_planned(steps_planned_);
    heartbeat.set_last_step_seconds(last_step_seconds_);
    heartbeat.set_last_step_wait_seconds(last_step_waited_seconds_);
    heartbeat.set_memory_peak_bytes(PeakMemory());
    if (options_.activity != nullptr) Describe(options_.activity->Now(), &heartbeat);
  }
  session.next_heartbeat = Clock::now() + session.heartbeat_interval;
  return session.stream->Write(request);
}

bool Client::SendPoints(Session& session, int split) {
  int64_t last = 0;
  int64_t steps_planned = 0;
  {
    const std::lock_guard lock(mutex_);
    last = reported_[split];
    steps_planned = steps_planned_;
  }
  if (session.sent[split] >= last) return true;
  std::vector<v1::MetricPoint> points = session.tails[split].Read(session.sent[split], last, kPointsPerRead);
  const bool at_end = points.size() < kPointsPerRead;
  for (v1::MetricPoint& point : points) {
    point.set_attempt(options_.attempt);
    point.set_split(kSplitNames[split]);
    {
      const std::lock_guard lock(mutex_);
      const auto time = report_times_[split].find(point.step());
      if (time != report_times_[split].end()) *point.mutable_time() = time->second;
    }
    session.sent[split] = point.step();
    v1::AttachRequest request;
    request.mutable_step()->set_steps_planned(steps_planned);
    request.mutable_step()->mutable_point()->Swap(&point);
    if (!session.stream->Write(request)) return false;
  }
  if (at_end && session.sent[split] < last) {
    LOG_WARNING(absl::StrCat(kSplitNames[split], " metrics up to step ", last,
                             " were reported, but the file ends after step ", session.sent[split]));
    session.sent[split] = last;
  }
  return true;
}

bool Client::SendEvents(Session& session) {
  while (true) {
    v1::AttachRequest request;
    {
      const std::lock_guard lock(mutex_);
      // Points first: `finished` is the last that a coordinator hears. But which of the files' points are this
      // attempt's, it knows from `resumed` alone, whatever was said before that.
      const bool points_wait = PointsWait(session);
      const auto next = std::find_if(events_.begin(), events_.end(), [&](const Event& event) {
        return !event.sent && (!points_wait || event.event.type() == "resumed");
      });
      if (next == events_.end()) return true;
      next->sent = true;
      next->after_step = session.sent[kTrain];
      *request.mutable_event() = next->event;
    }
    if (!session.stream->Write(request)) return false;
  }
}

}  // namespace

void CoordinatorClient::FillHello(const Options& options, v1::Hello* hello) {
  hello->set_job_id(options.job_id);
  hello->set_attempt(options.attempt);
  hello->set_rank(options.rank);
  hello->set_world_size(options.world_size);
  hello->set_pid(getpid());
  hello->set_hostname(HostName());
}

std::unique_ptr<CoordinatorClient> CoordinatorClient::Start(Options options) {
  return std::make_unique<Client>(std::move(options));
}

}  // namespace simpo
