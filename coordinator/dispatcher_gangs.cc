// The part of Dispatcher that looks after attempts: their ranks, their ends, and how they are ended.
#include <signal.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "common/text.h"
#include "coordinator/attempt_output.h"
#include "coordinator/dispatcher.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using std::chrono::milliseconds;

constexpr size_t kMaxEventTypeBytes = 32;
constexpr size_t kMaxHostnameBytes = 255;
constexpr size_t kMaxEventMessageBytes = 4096;
constexpr size_t kMaxEventsOfAnAttempt = 10'000;
constexpr size_t kMaxValuesOfAPoint = 256;
constexpr int kTicksOfALimit = 4;  // a pause between ticks of that part of a rank's limit is none of its silence
constexpr double kLatestStepWeight = 0.1;  // in the mean duration of a step

double ValueOr(const v1::MetricPoint& point, const char* name, double fallback) {
  const auto value = point.values().find(name);
  return value == point.values().end() ? fallback : value->second;
}

// Of the years 1 to 9999, which is what may be reckoned with.
bool IsTime(const google::protobuf::Timestamp& time) {
  return time.seconds() >= -62'135'596'800 && time.seconds() <= 253'402'300'799 && time.nanos() >= 0 &&
         time.nanos() < 1'000'000'000;
}

v1::AttachResponse StopCommand(const std::string& reason) {
  v1::AttachResponse response;
  response.mutable_command()->set_kind(v1::COMMAND_KIND_STOP);
  response.mutable_command()->set_reason(reason);
  return response;
}

// For an exit without a word.
std::string ExitText(int exit_code) {
  switch (exit_code) {
    case 75:
      return "a rank gave up, but would try again";
    case 127:
      return "a program could not be started";
    case 128 + SIGKILL:
      return "killed, perhaps for want of memory";
    case 128 + SIGTERM:
      return "ended by SIGTERM, not on our request";
    default:
      return exit_code > 128 ? absl::StrCat("ended by signal ", exit_code - 128) : "ended without a word";
  }
}

bool AllAttached(const Gang& gang) {
  return std::all_of(gang.health.begin(), gang.health.end(), [](const RankHealth& health) { return health.attached; });
}

bool AnyAttached(const Gang& gang) {
  return std::any_of(gang.health.begin(), gang.health.end(), [](const RankHealth& health) { return health.attached; });
}

}  // namespace

v1::AttachResponse CheckpointCommand() {
  v1::AttachResponse response;
  response.mutable_command()->set_kind(v1::COMMAND_KIND_CHECKPOINT);
  response.mutable_command()->set_reason("asked for by a user");
  return response;
}

int64_t RunMillis(const JobRecord& record, int64_t even_ms) {
  return record.run_before_ms + (record.gang ? std::max<int64_t>(0, even_ms - record.started_ms) : 0);
}

void ShowTrainReport(const v1::StepReport& report, v1::JobProgress* progress) {
  const v1::MetricPoint& point = report.point();
  progress->set_step(point.step());
  if (report.steps_planned() > 0) progress->set_steps_planned(report.steps_planned());
  progress->set_epoch(ValueOr(point, "epoch", 0));
  progress->set_step_seconds(ValueOr(point, "step_seconds", 0));
  progress->set_tokens_per_second(ValueOr(point, "tokens_per_second", 0));
  *progress->mutable_metrics() = point.values();
}

std::string EventKey(const std::string& type, const std::string& message) { return absl::StrCat(type, "\n", message); }

void Dispatcher::AdoptGang(JobRecord& record, Moment now) {
  const v1::Job& job = record.job;
  Gang& gang = record.gang.emplace();
  gang.ranks.resize(job.ranks());
  gang.health.resize(job.ranks());
  if (job.state() == v1::JOB_STATE_LAUNCHING) {
    launches_.push_back(&record);  // starts it, or finds that it was started
  } else {
    gang.launched = true;
    // Its ranks had reported; they have as long to be back as they may be silent.
    gang.health.assign(gang.ranks.size(), {.attached = true, .last_heard = now.steady, .last_moved = now.steady});
  }
  gang.address_due = true;
  OpenTo(record);
  for (const char* split : {"train", "eval"}) {
    const absl::StatusOr<std::optional<v1::StepReport>> last =
        metrics_.LastReport(record.sequence, split, job.attempt());
    if (!last.ok()) return Write(last.status());
    if (*last) (*split == 't' ? gang.last_step : gang.last_eval_step) = (*last)->point().step();
  }
  if (gang.last_step > 0) record.attempts.back().set_last_step(gang.last_step);
  // The supervisor's age is not told by a clock that may have been set since.
  if (const auto age = launcher_->RunsFor(job.id(), job.attempt())) {
    record.started_ms = EvenMillis(now) - age->count();
    Queue(record);
  }
  const bool leaves = job.state() == v1::JOB_STATE_CANCELLING || job.state() == v1::JOB_STATE_PREEMPTING;
  if (leaves) gang.stop_asked = now.steady;
  AddEvent(record, "adopted", absl::StrCat("the coordinator was restarted and goes on with attempt ", job.attempt()),
           now.unix_ms);
}

void Dispatcher::OpenTo(JobRecord& record) {
  const v1::Job& job = record.job;
  Gang& gang = *record.gang;
  if (gang.secret.empty()) {
    absl::StatusOr<std::string> secret = launcher_->ReadSecret(job.id(), job.attempt());
    if (absl::IsNotFound(secret.status()) || !Managed(record, secret.status())) return;
    gang.secret = *std::move(secret);
    Changed(record);
  }
  if (gang.address_due) gang.address_due = !Managed(record, launcher_->PublishAddress(job.id(), job.attempt()));
}

bool Dispatcher::Managed(JobRecord& record, const absl::Status& status) {
  if (!status.ok() && record.gang->troubles.insert(std::string(status.message())).second) {
    LOG_WARNING(absl::StrCat("job ", record.job.id(), ", attempt ", record.job.attempt(),
                             ", will be tried again: ", std::string(status.message())));
  }
  return status.ok();
}

Gang* Dispatcher::GangOf(const RankId& rank, JobRecord** record) {
  *record = FindRecord(rank.job_id);
  if (*record == nullptr || !(*record)->gang || (*record)->job.attempt() != rank.attempt) return nullptr;
  Gang& gang = *(*record)->gang;
  return rank.rank >= 0 && static_cast<size_t>(rank.rank) < gang.ranks.size() ? &gang : nullptr;
}

void Dispatcher::Attach(const v1::Hello& hello, const std::shared_ptr<RankChannel>& channel, Moment now) {
  JobRecord* record = nullptr;
  Gang* gang = GangOf({hello.job_id(), hello.attempt(), hello.rank()}, &record);
  if (gang == nullptr || hello.world_size() != static_cast<int>(gang->ranks.size())) {
    return channel->Close(absl::FailedPreconditionError(
        absl::StrCat("job ", hello.job_id(), " has no rank ", hello.rank(), " of ", hello.world_size(),
                     " in an attempt ", hello.attempt(), " that runs")));
  }
  Rank& rank = gang->ranks[hello.rank()];
  if (rank.channel) rank.channel->Close(absl::AbortedError("another stream of this rank took its place"));
  const bool were_all = AllAttached(*gang);
  rank.channel = channel;
  rank.welcomed = false;
  RankHealth& health = gang->health[hello.rank()];
  health.attached = true;
  health.finished = false;
  health.last_heard = health.last_moved = now.steady;
  health.hostname = ToUtf8(hello.hostname(), kMaxHostnameBytes);
  rank.pid = hello.pid();
  rank.last_heard_ms = now.unix_ms;
  v1::JobProgress& progress = *record->job.mutable_progress();
  if (progress.phase().empty()) {
    // On disk, since from now on the output folder holds this job's work; see Launch.
    progress.set_phase("load");
    Write(jobs_.UpdateJob(record->sequence, record->job));
  }
  // What is welcomed as stored must be so.
  const RankId id{hello.job_id(), hello.attempt(), hello.rank()};
  acknowledgements_.push_back([this, id, channel](const absl::Status& status) {
    JobRecord* record = nullptr;
    Gang* gang = GangOf(id, &record);
    const absl::Status ended = absl::UnavailableError("the attempt has ended");
    if (!status.ok() || gang == nullptr) return channel->Close(ended);
    AfterPoints([this, id, channel, ended, step = gang->last_step, eval_step = gang->last_eval_step](
                    const absl::Status& status, Moment) {
      JobRecord* record = nullptr;
      Gang* gang = GangOf(id, &record);
      if (!status.ok() || gang == nullptr) return channel->Close(ended);
      v1::AttachResponse response;
      v1::Welcome& welcome = *response.mutable_welcome();
      welcome.set_last_stored_step(step);
      welcome.set_last_stored_eval_step(eval_step);
      welcome.set_heartbeat_interval_ms(static_cast<int32_t>(options_.heartbeat_interval.count()));
      channel->Send(std::move(response));
      if (gang->stop_asked) {
        channel->Send(StopCommand(record->job.reason()));
      } else if (id.rank == 0 && record->checkpoint_asked) {
        channel->Send(CheckpointCommand());
      }
      if (Rank& rank = gang->ranks[id.rank]; rank.channel == channel) rank.welcomed = true;
    });
  });
  if (!were_all && AllAttached(*gang)) {
    Apply(*record, JobTrigger::kRanksAttached, "running",
          absl::StrCat("attempt ", hello.attempt(), " runs on ", hello.world_size(),
                       hello.world_size() == 1 ? " rank" : " ranks"),
          now);
  }
  Changed(*record, /*for_watchers=*/false);
}

void Dispatcher::Receive(const RankId& from, v1::AttachRequest message, Moment now) {
  JobRecord* record = nullptr;
  Gang* gang = GangOf(from, &record);
  if (gang == nullptr) return;
  Rank& rank = gang->ranks[from.rank];
  RankHealth& health = gang->health[from.rank];
  health.last_heard = now.steady;
  rank.last_heard_ms = now.unix_ms;
  if (!std::exchange(record->heard, true)) heard_.push_back(record);
  if (message.has_heartbeat()) {
    TakeHeartbeat(*record, from, message.heartbeat(), now);
  }
  if (message.has_step()) health.last_moved = now.steady;
  if (message.has_step() && from.rank == 0) TakeReport(*record, std::move(*message.mutable_step()), now);
  if (message.has_event()) TakeWorkerEvent(*record, from, message.event(), now);
}

void Dispatcher::Leave(const RankId& id, const std::shared_ptr<RankChannel>& channel) {
  JobRecord* record = nullptr;
  if (Gang* gang = GangOf(id, &record); gang != nullptr && gang->ranks[id.rank].channel == channel) {
    gang->ranks[id.rank].channel.reset();
  }
  acknowledgements_.push_back([this, channel](const absl::Status& status) {
    if (!status.ok()) return channel->Close(status);
    AfterPoints([channel](const absl::Status& status, Moment) { channel->Close(status); });
  });
}

void Dispatcher::TakeHeartbeat(JobRecord& record, const RankId& from, const v1::Heartbeat& heartbeat, Moment now) {
  const bool well_formed =
      heartbeat.phase().size() <= kMaxEventTypeBytes && heartbeat.collective().verb().size() <= kMaxEventTypeBytes;
  if (!well_formed) return;
  simpo::TakeHeartbeat(heartbeat, now.steady, &record.gang->health[from.rank]);
  if (from.rank != 0 || heartbeat.phase().empty()) return;
  // The step is not taken from here: it goes with its metrics.
  v1::JobProgress& progress = *record.job.mutable_progress();
  if (progress.phase() == heartbeat.phase() && progress.steps_planned() == heartbeat.steps_planned()) return;
  progress.set_phase(heartbeat.phase());
  if (heartbeat.steps_planned() > 0) progress.set_steps_planned(heartbeat.steps_planned());
  Changed(record);
}

void Dispatcher::TakeReport(JobRecord& record, v1::StepReport report, Moment now) {
  Gang& gang = *record.gang;
  v1::MetricPoint& point = *report.mutable_point();
  const bool is_eval = point.split() == "eval";
  if ((!is_eval && point.split() != "train") || point.values_size() > static_cast<int>(kMaxValuesOfAPoint)) {
    LOG_WARNING(absl::StrCat("job ", record.job.id(), ": a report of step ", point.step(), " is malformed; ignored"));
    return;
  }
  AcknowledgeReports(record);
  int64_t& last = is_eval ? gang.last_eval_step : gang.last_step;
  // What an attempt finds in the files from before it began is stored already, or another job's.
  const int64_t first_step = record.attempts.back().first_step();
  if (is_eval ? point.step() < first_step : point.step() <= first_step) {
    last = std::max(last, point.step());
    return;
  }
  point.set_attempt(record.job.attempt());
  if (!point.has_time() || !IsTime(point.time())) *point.mutable_time() = ToTimestamp(now.unix_ms);
  metrics_.Add(record.sequence, report);
  gang.last_point = metrics_.last_sequence();
  if (point.step() <= last) return;  // it came again
  ++stats_.points;
  last = point.step();
  if (!is_eval) {
    const double seconds = ValueOr(point, "step_seconds", 0);
    record.step_seconds.Add(seconds);
    double& mean = record.mean_step_seconds;
    mean = mean == 0 ? seconds : (1 - kLatestStepWeight) * mean + kLatestStepWeight * seconds;
  }
  (is_eval ? gang.unstored_eval : gang.unstored_train) = std::move(report);
}

void Dispatcher::ShowStoredReports(JobRecord& record, const std::optional<v1::StepReport>& train,
                                   const std::optional<v1::StepReport>& eval) {
  v1::JobProgress& progress = *record.job.mutable_progress();
  if (eval) *progress.mutable_eval_metrics() = eval->point().values();
  if (train) {
    record.attempts.back().set_last_step(train->point().step());
    ShowTrainReport(*train, &progress);
    const double steps_left = static_cast<double>(progress.steps_planned()) - static_cast<double>(progress.step());
    progress.set_eta_seconds(std::max<double>(0, steps_left * record.mean_step_seconds));
  }
  if (train || eval) Changed(record);
}

void Dispatcher::AcknowledgeReports(JobRecord& record) {
  if (std::exchange(record.gang->ack_due, true)) return;
  acknowledgements_.push_back(
      [this, id = RankId{record.job.id(), record.job.attempt(), 0}](const absl::Status& status) {
        JobRecord* record = nullptr;
        Gang* gang = GangOf(id, &record);
        if (!status.ok() || gang == nullptr) return;
        gang->ack_due = false;
        v1::AttachResponse response;
        response.mutable_ack()->set_step(gang->last_step);
        response.mutable_ack()->set_eval_step(gang->last_eval_step);
        AfterPoints([this, id, response = std::move(response), train = std::exchange(gang->unstored_train, {}),
                     eval = std::exchange(gang->unstored_eval, {})](const absl::Status& status, Moment now) {
          JobRecord* record = nullptr;
          Gang* gang = GangOf(id, &record);
          if (!status.ok() || gang == nullptr) return;
          ShowStoredReports(*record, train, eval);
          if (const Rank& rank = gang->ranks[0]; rank.channel && rank.welcomed) rank.channel->Send(response);
          if (gang->files_read) TendGang(*record, now);  // its end has waited for this
        });
      });
}

void Dispatcher::TakeWorkerEvent(JobRecord& record, const RankId& from, const v1::WorkerEvent& event, Moment now) {
  Gang& gang = *record.gang;
  if (event.type() == "finished" || event.type() == "error") {
    gang.health[from.rank].finished = true;
    if (event.type() == "finished" || !gang.error.empty()) return;
    gang.error = ToUtf8(event.message(), kMaxEventMessageBytes);
  } else if (from.rank != 0) {
    return;
  }
  const std::string message = ToUtf8(event.message(), kMaxEventMessageBytes);
  const bool well_formed = !event.type().empty() && event.type().size() <= kMaxEventTypeBytes;
  if (!well_formed) return;
  const bool full = record.worker_events.size() >= kMaxEventsOfAnAttempt;
  if (full && event.type() != "checkpoint") return;
  if (!full && !record.worker_events.insert(EventKey(event.type(), message)).second) return;
  const int64_t time_ms = event.has_time() && IsTime(event.time()) ? UnixMillis(event.time()) : now.unix_ms;
  if (event.type() == "checkpoint" && event.step() > 0) {
    record.job.mutable_progress()->set_checkpoint_step(event.step());
    record.checkpoint_ms = time_ms;
    record.checkpoint_asked = false;
  }
  if (event.type() == "resumed") {
    record.attempts.back().set_first_step(std::max<int64_t>(0, event.step()));
    Write(jobs_.PutAttempt(record.sequence, record.attempts.back()));
  }
  if (full) {
    Changed(record);
  } else {
    AddEvent(record, event.type(), message, time_ms);
    if (record.worker_events.size() == kMaxEventsOfAnAttempt) {
      AddEvent(record, "events_left_out",
               absl::StrCat("attempt ", record.job.attempt(), " has told of ", kMaxEventsOfAnAttempt,
                            " events; what else it tells is not kept"),
               now.unix_ms);
    }
  }
  Write(jobs_.UpdateJob(record.sequence, record.job));
}

void Dispatcher::RequestEnd(JobRecord& record, const std::string& why, Moment now) {
  const v1::JobState state = record.job.state();
  if (IsFinal(state) || state == v1::JOB_STATE_CANCELLING) return;
  Apply(record, JobTrigger::kCancelRequested, record.gang ? "cancelling" : "cancelled", why, now);
  if (record.gang) AskToLeave(record, state, now);
}

void Dispatcher::Preempt(JobRecord& record, const std::string& why, Moment now) {
  const v1::JobState state = record.job.state();
  if (Apply(record, JobTrigger::kPreempted, "preempting", why, now)) AskToLeave(record, state, now);
}

void Dispatcher::AskToLeave(JobRecord& record, v1::JobState state, Moment now) {
  // One that was asked already does not get more time by being asked again.
  if (record.gang->stop_asked) return;
  record.gang->stop_asked = now.steady;
  // A command is for keeping work. Without a step since the attempt began there is none.
  if (state == v1::JOB_STATE_RUNNING && record.gang->last_step > 0) {
    SendStop(record);
  } else {
    Terminate(record, now);
  }
}

void Dispatcher::SendStop(JobRecord& record) {
  for (const Rank& rank : record.gang->ranks) {
    if (!rank.channel || !rank.welcomed) continue;  // hears it with its welcome
    acknowledgements_.push_back([channel = rank.channel, why = record.job.reason()](const absl::Status& status) {
      if (status.ok()) channel->Send(StopCommand(why));
    });
  }
}

void Dispatcher::Terminate(JobRecord& record, Moment now) {
  Gang& gang = *record.gang;
  if (!gang.terminated) gang.terminated = now.steady;
  if (gang.termination_heard) return;
  const bool sent = Managed(record, launcher_->Terminate(record.job.id(), record.job.attempt()));
  gang.termination_heard = sent && gang.phase != GangStatus::Phase::kStarting;
}

std::vector<JobRecord*> Dispatcher::WithGang() const {
  std::vector<JobRecord*> result;
  for (const auto& [sequence, running] : queue_.cluster().running()) result.push_back(records_.at(sequence).get());
  return result;
}

void Dispatcher::ExcuseSilence(Moment now, std::chrono::steady_clock::duration since_tick) {
  if (since_tick < options_.liveness.heartbeat / kTicksOfALimit && !metrics_.IsBehind()) return;
  for (JobRecord* record : WithGang()) {
    if (!record->gang) continue;
    Gang& gang = *record->gang;
    if (gang.started) gang.started = std::min(now.steady, *gang.started + since_tick);
    for (RankHealth& health : gang.health) {
      health.last_heard = std::min(now.steady, health.last_heard + since_tick);
      health.last_moved = std::min(now.steady, health.last_moved + since_tick);
    }
  }
}

void Dispatcher::Tick(Moment now) {
  for (JobRecord* record : WithGang()) {
    if (!record->gang) continue;
    if (record->gang->launched) {
      TendGang(*record, now);
    } else {
      launches_.push_back(record);  // could not be looked at, see Launch
    }
  }
  for (JobRecord* record : std::exchange(heard_, {})) {
    record->heard = false;
    Changed(*record, /*for_watchers=*/false);
  }
  KeepHouse(now);
  placement_due_ = true;
  explain_due_ = true;
}

void Dispatcher::TendGang(JobRecord& record, Moment now) {
  const v1::Job& job = record.job;
  Gang& gang = *record.gang;
  OpenTo(record);
  GangStatus status = launcher_->Poll(job.id(), job.attempt());
  if (status.phase == GangStatus::Phase::kEnded || status.phase == GangStatus::Phase::kLost) {
    const bool lost = status.phase == GangStatus::Phase::kLost;
    if (!gang.files_read) {
      // Without its supervisor nothing else ends what may be left of it, and the next attempt must not find it.
      if (lost && !Managed(record, launcher_->Kill(job.id(), job.attempt()))) return;
      gang.files_read = true;
      TakeLeftPoints(record, now);
    }
    // Nobody would send these points again once the attempt has ended.
    if (gang.last_point > metrics_.stored_sequence() || gang.unstored_train || gang.unstored_eval) return;
    const std::optional<int> exit_code = lost ? std::nullopt : std::optional(status.exit.exit_code);
    std::optional<v1::FaultKind> seen;
    if (gang.fault) seen = gang.fault->of_machine ? v1::FAULT_KIND_MACHINE : v1::FAULT_KIND_JOB;
    return EndAttempt(record, {.exit_code = exit_code, .seen = seen}, lost ? status.reason : "",
                      EndOf(record, status, now), now);
  }
  if (status.phase == GangStatus::Phase::kUnknown) {
    Managed(record, absl::UnavailableError(status.reason));
    status.phase = gang.phase;
    // Who can open no file takes no stream of a rank either: this is nobody's silence.
    for (RankHealth& health : gang.health) health.last_heard = health.last_moved = now.steady;
    if (gang.started) gang.started = now.steady;
  } else {
    record.seen_ms = EvenMillis(now);
  }
  if (gang.phase_since == SteadyTime()) gang.phase_since = now.steady;
  if (status.phase != gang.phase) {
    gang.phase = status.phase;
    gang.phase_since = now.steady;
    if (job.state() == v1::JOB_STATE_LAUNCHING) {
      const bool training = status.phase == GangStatus::Phase::kTraining;
      record.job.set_reason(training ? "the ranks are starting" : "checking the model and preparing the data");
      Changed(record);
    }
  }
  if (status.phase == GangStatus::Phase::kTraining && !gang.started) gang.started = now.steady;

  const int64_t limit_ms = record.config->time_limit_s * 1000;
  if (limit_ms > 0 && RunMillis(record, EvenMillis(now)) > limit_ms) {
    RequestEnd(record, absl::StrCat("the time limit of ", record.config->time_limit_s, " s was reached"), now);
  }
  if (!gang.fault && !gang.terminated) LookAtRanks(record, now);
  Escalate(record, now);
}

void Dispatcher::LookAtRanks(JobRecord& record, Moment now) {
  Gang& gang = *record.gang;
  if (gang.phase == GangStatus::Phase::kPreparing && now.steady - gang.phase_since > options_.liveness.prepare) {
    const auto limit = std::chrono::duration_cast<std::chrono::seconds>(options_.liveness.prepare);
    return EndForFault(
        record, {absl::StrCat("model and data were not prepared within ", limit.count(), " s; see launcher.log")}, now);
  }
  if (auto fault = FindHungRank(now.steady, gang.started, gang.health, options_.liveness)) {
    return EndForFault(record, *std::move(fault), now);
  }
  if (const std::optional<std::string> stalled = FindStalledRank(now.steady, gang.health, options_.liveness)) {
    // Once for a step, so that micro-batches that take as long each time are not told of each time.
    const int64_t step = gang.health[0].heartbeat.step();
    if (std::exchange(gang.stall_told, step) != step) AddEvent(record, "rank_stalled", *stalled, now.unix_ms);
  }
  if (const std::optional<Straggler> straggler = FindStraggler(gang.health)) {
    if (gang.stragglers.insert(straggler->rank).second) AddEvent(record, "straggler", straggler->text, now.unix_ms);
  }
}

void Dispatcher::EndForFault(JobRecord& record, HungRank fault, Moment now) {
  AddEvent(record, "rank_lost", absl::StrCat(fault.why, "; ending the attempt"), now.unix_ms);
  record.gang->fault = std::move(fault);
  Terminate(record, now);
}

void Dispatcher::Escalate(JobRecord& record, Moment now) {
  Gang& gang = *record.gang;
  const bool saving = std::any_of(gang.health.begin(), gang.health.end(), [](const RankHealth& health) {
    return !health.finished && health.heartbeat.phase() == "checkpoint";
  });
  const milliseconds grace = saving ? std::max(options_.stop_grace, options_.liveness.checkpoint) : options_.stop_grace;
  if (gang.stop_asked && now.steady - *gang.stop_asked > grace) Terminate(record, now);
  if (!gang.terminated) return;
  Terminate(record, now);
  if (!gang.killed && now.steady - *gang.terminated > options_.term_grace) {
    gang.killed = Managed(record, launcher_->Kill(record.job.id(), record.job.attempt()));
  }
}

std::string Dispatcher::DescribeEnd(const JobRecord& record, std::optional<int> exit_code, const std::string& what) {
  if (record.gang->fault) return record.gang->fault->why;
  if (!exit_code) return what;
  std::string words = record.gang->error;
  if (words.empty()) words = LastWords(record.attempts.back().log_dir(), record.job.ranks());
  if (!words.empty() && words.back() == '.') words.pop_back();
  if (words.empty()) words = ExitText(*exit_code);
  return absl::StrCat(words, " (exit code ", *exit_code, ")");
}

// Points that the ranks could not send any more, as when the gang ended while no coordinator was there.
void Dispatcher::TakeLeftPoints(JobRecord& record, Moment now) {
  Gang& gang = *record.gang;
  // Without a phase the files may be another run's; see Launch.
  if (record.job.progress().phase().empty() || gang.health[0].finished) return;
  const fs::path output_dir = record.job.output_dir();
  const int attempt = record.job.attempt();
  int64_t after = std::max(gang.last_step, record.attempts.back().first_step());
  int64_t after_eval = std::max(gang.last_eval_step, record.attempts.back().first_step() - 1);
  if (!AnyAttached(gang)) {
    // Nobody has said where this attempt began: what earlier ones have stored is not stored again as its own.
    for (const auto& [split, last] : {std::pair("train", &after), std::pair("eval", &after_eval)}) {
      const auto stored = metrics_.LastReport(record.sequence, split, /*attempt=*/0);
      if (!stored.ok()) return Write(stored.status());
      if (*stored) *last = std::max(*last, (*stored)->point().step());
    }
  }
  for (const auto& [file, split, after_step] :
       {std::tuple("metrics.jsonl", "train", after), std::tuple("eval_metrics.jsonl", "eval", after_eval)}) {
    for (v1::MetricPoint& point : ReadMetricsFile(output_dir / file, split, attempt, after_step)) {
      v1::StepReport report;
      report.set_steps_planned(record.job.progress().steps_planned());
      report.mutable_point()->Swap(&point);
      TakeReport(record, std::move(report), now);
    }
  }
}

int64_t Dispatcher::EndOf(const JobRecord& record, const GangStatus& status, Moment now) const {
  const int64_t now_ms = EvenMillis(now);
  const int64_t seen_ms = std::clamp(record.seen_ms, std::min(record.started_ms, now_ms), now_ms);
  // When it was lost is not known, but it ran so long at least.
  if (status.phase == GangStatus::Phase::kLost) return seen_ms;
  if (status.exit.time_ms <= 0) return now_ms;
  // By the calendar, which may have been set since; where this coordinator has seen it run, that counts.
  const bool watched = record.gang->phase_since != SteadyTime();
  const int64_t ago_ms = std::max<int64_t>(0, now.unix_ms - status.exit.time_ms);
  return std::clamp(now_ms - ago_ms, watched ? seen_ms : std::min(record.started_ms, now_ms), now_ms);
}

void Dispatcher::EndAttempt(JobRecord& record, const AttemptEnd& end, const std::string& what, int64_t ended_ms,
                            Moment now) {
  v1::Job& job = record.job;
  v1::Attempt& attempt = record.attempts.back();
  attempt.set_checkpoint_step(job.progress().checkpoint_step());
  const Verdict verdict = Judge(options_.restart, job, record.attempts, end);
  const bool done = verdict.meaning == ExitMeaning::kDone;
  const bool refused = verdict.meaning == ExitMeaning::kRefused;
  const JobTrigger trigger = done            ? JobTrigger::kAttemptSucceeded
                             : refused       ? JobTrigger::kAttemptRefused
                             : verdict.again ? JobTrigger::kAttemptFaulted
                                             : JobTrigger::kRestartsExhausted;
  const bool cancelling = job.state() == v1::JOB_STATE_CANCELLING;
  const bool preempted = job.state() == v1::JOB_STATE_PREEMPTING && !done && !refused;
  const bool asked = cancelling || preempted;
  const std::string why = done ? "done" : asked ? job.reason() : DescribeEnd(record, end.exit_code, what);
  const bool of_machine = verdict.meaning == ExitMeaning::kMachineFault;

  // A clock that was set back does not make the attempt end before it began.
  const int64_t ended_unix_ms = now.unix_ms - (EvenMillis(now) - ended_ms);
  *attempt.mutable_end_time() = ToTimestamp(std::max(ended_unix_ms, UnixMillis(attempt.start_time())));
  record.waiting_since_ms = ended_ms;
  const int64_t run_ms = RunMillis(record, ended_ms);
  attempt.set_run_seconds(static_cast<double>(run_ms - record.run_before_ms) / 1000);
  record.run_before_ms = run_ms;
  record.started_ms = record.waiting_since_ms;
  if (end.exit_code) attempt.set_exit_code(*end.exit_code);
  attempt.set_reason(ToUtf8(why, kMaxReasonBytes));
  attempt.set_preempted(preempted);
  if (!done && !refused && !asked) attempt.set_fault(of_machine ? v1::FAULT_KIND_MACHINE : v1::FAULT_KIND_JOB);
  Write(jobs_.PutAttempt(record.sequence, attempt));
  job.mutable_progress()->set_eta_seconds(0);

  const std::string after = absl::StrCat("after step ", job.progress().step());
  const int64_t checkpoint = attempt.checkpoint_step();
  const std::string goes_on = checkpoint > 0 ? absl::StrCat("after step ", checkpoint) : "from the start";
  if (done) {
    Apply(record, trigger, "succeeded", absl::StrCat("done ", after, "; results are in ", job.output_dir()), now);
  } else if (cancelling) {
    Apply(record, trigger, "cancelled", attempt.last_step() > 0 ? absl::StrCat(why, ", stopped ", after) : why, now);
  } else if (preempted) {
    record.not_before_ms = 0;
    Apply(record, trigger, "preempted",
          absl::StrCat(why, " ", after, "; goes on ", goes_on, " when there is room again"), now);
  } else if (refused) {
    Apply(record, trigger, "failed", why, now);
  } else if (verdict.again) {
    if (of_machine) {
      job.set_machine_faults(job.machine_faults() + 1);
    } else {
      job.set_restarts(job.restarts() + 1);
    }
    const milliseconds pause = PauseBeforeNext(options_.restart, job, record.attempts);
    record.not_before_ms = EvenMillis(now) + pause.count();
    Apply(record, trigger, "restarting",
          absl::StrCat("attempt ", job.attempt(), " was lost", of_machine ? " to a fault of the machine: " : ": ", why,
                       "; the next one begins ", goes_on, " in ", (pause.count() + 999) / 1000, " s"),
          now);
  } else {
    Apply(record, trigger, "failed", absl::StrCat(why, "; ", verdict.why_not), now);
  }
}

}  // namespace simpo
