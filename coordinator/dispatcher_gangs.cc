// The part of Dispatcher that looks after attempts: their ranks, their ends, and how they are ended.
#include <signal.h>

#include <algorithm>
#include <cmath>
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
constexpr size_t kMaxEventMessageBytes = 4096;
constexpr size_t kMaxEventsOfAnAttempt = 10'000;
constexpr size_t kMaxValuesOfAPoint = 256;
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
  return std::all_of(gang.ranks.begin(), gang.ranks.end(), [](const Rank& rank) { return rank.health.attached; });
}

bool AnyAttached(const Gang& gang) {
  return std::any_of(gang.ranks.begin(), gang.ranks.end(), [](const Rank& rank) { return rank.health.attached; });
}

}  // namespace

int64_t RunMillis(const JobRecord& record, int64_t now_ms) {
  int64_t run_ms = 0;
  for (const v1::Attempt& attempt : record.attempts) {
    const int64_t end_ms = attempt.has_end_time() ? UnixMillis(attempt.end_time()) : now_ms;
    run_ms += std::max<int64_t>(0, end_ms - UnixMillis(attempt.start_time()));
  }
  return run_ms;
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
  if (job.state() == v1::JOB_STATE_LAUNCHING) {
    launches_.push_back(&record);  // starts it, or finds that it was started
  } else {
    gang.launched = true;
    // Its ranks had reported; they have as long to be back as they may be silent.
    for (Rank& rank : gang.ranks) rank.health = {.attached = true, .last_heard = now.steady};
  }
  absl::StatusOr<std::string> secret = launcher_->ReadSecret(job.id(), job.attempt());
  if (secret.ok()) {
    gang.secret = *std::move(secret);
    const absl::Status status = launcher_->PublishAddress(job.id(), job.attempt());
    if (!status.ok()) LOG_ERROR(absl::StrCat("job ", job.id(), ": ", std::string(status.message())));
  }
  for (const char* split : {"train", "eval"}) {
    const absl::StatusOr<std::optional<v1::StepReport>> last =
        metrics_.LastReport(record.sequence, split, job.attempt());
    if (!last.ok()) return Write(last.status());
    if (*last) (*split == 't' ? gang.last_step : gang.last_eval_step) = (*last)->point().step();
  }
  if (gang.last_step > 0) record.attempts.back().set_last_step(gang.last_step);
  const bool leaves = job.state() == v1::JOB_STATE_CANCELLING || job.state() == v1::JOB_STATE_PREEMPTING;
  if (leaves) gang.stop_asked = now.steady;
  AddEvent(record, "adopted", absl::StrCat("the coordinator was restarted and goes on with attempt ", job.attempt()),
           now.unix_ms);
}

Gang* Dispatcher::GangOf(const RankId& rank, JobRecord** record) {
  *record = FindRecord(rank.job_id);
  if (*record == nullptr || !(*record)->gang || (*record)->job.attempt() != rank.attempt) return nullptr;
  Gang& gang = *(*record)->gang;
  return rank.rank >= 0 && static_cast<size_t>(rank.rank) < gang.ranks.size() ? &gang : nullptr;
}

void Dispatcher::Attach(const v1::Hello& hello, std::shared_ptr<RankChannel> channel, Moment now) {
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
  rank.health = {.attached = true, .last_heard = now.steady};
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
      if (gang->stop_asked) channel->Send(StopCommand(record->job.reason()));
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

void Dispatcher::Receive(const RankId& from, const v1::AttachRequest& message, Moment now) {
  JobRecord* record = nullptr;
  Gang* gang = GangOf(from, &record);
  if (gang == nullptr) return;
  Rank& rank = gang->ranks[from.rank];
  rank.health.last_heard = now.steady;
  rank.last_heard_ms = now.unix_ms;
  Changed(*record, /*for_watchers=*/false);
  if (message.has_heartbeat()) TakeHeartbeat(*record, from, message.heartbeat());
  if (message.has_step() && from.rank == 0) TakeReport(*record, message.step(), now);
  if (message.has_event()) TakeWorkerEvent(*record, from, message.event(), now);
}

void Dispatcher::Leave(const RankId& id, std::shared_ptr<RankChannel> channel) {
  JobRecord* record = nullptr;
  if (Gang* gang = GangOf(id, &record); gang != nullptr && gang->ranks[id.rank].channel == channel) {
    gang->ranks[id.rank].channel.reset();
  }
  acknowledgements_.push_back([this, channel](const absl::Status& status) {
    if (!status.ok()) return channel->Close(status);
    AfterPoints([channel](const absl::Status& status, Moment) { channel->Close(status); });
  });
}

void Dispatcher::TakeHeartbeat(JobRecord& record, const RankId& from, const v1::Heartbeat& heartbeat) {
  if (from.rank != 0 || heartbeat.phase().empty() || heartbeat.phase().size() > kMaxEventTypeBytes) return;
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
    gang.ranks[from.rank].health.finished = true;
    if (event.type() == "finished" || !gang.error.empty()) return;
    gang.error = ToUtf8(event.message(), kMaxEventMessageBytes);
  } else if (from.rank != 0) {
    return;
  }
  const std::string message = ToUtf8(event.message(), kMaxEventMessageBytes);
  const bool well_formed = !event.type().empty() && event.type().size() <= kMaxEventTypeBytes;
  if (!well_formed || record.worker_events.size() >= kMaxEventsOfAnAttempt) return;
  if (!record.worker_events.insert(EventKey(event.type(), message)).second) return;
  const int64_t time_ms = event.has_time() && IsTime(event.time()) ? UnixMillis(event.time()) : now.unix_ms;
  if (event.type() == "checkpoint" && event.step() > 0) {
    record.job.mutable_progress()->set_checkpoint_step(event.step());
    record.checkpoint_ms = time_ms;
  }
  if (event.type() == "resumed") {
    record.attempts.back().set_first_step(std::max<int64_t>(0, event.step()));
    Write(jobs_.PutAttempt(record.sequence, record.attempts.back()));
  }
  AddEvent(record, event.type(), message, time_ms);
  Write(jobs_.UpdateJob(record.sequence, record.job));
}

void Dispatcher::RequestEnd(JobRecord& record, const std::string& why, Moment now) {
  const v1::JobState state = record.job.state();
  if (IsFinal(state) || state == v1::JOB_STATE_CANCELLING) return;
  Apply(record, JobTrigger::kCancelRequested, record.gang ? "cancelling" : "cancelled", why, now);
  if (record.gang) AskToLeave(record, state, now);
}

void Dispatcher::Preempt(JobRecord& record, const JobRecord& winner, Moment now) {
  const v1::JobState state = record.job.state();
  const std::string why =
      absl::StrCat("pre-empted by job ", winner.job.id(), " (priority ", winner.job.priority(), ")");
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
  launcher_->Terminate(record.job.id(), record.job.attempt());
  gang.termination_heard = gang.phase != GangStatus::Phase::kStarting;
}

void Dispatcher::Tick(Moment now) {
  std::vector<JobRecord*> with_gang;
  for (const auto& [sequence, record] : live_) {
    if (record->gang && record->gang->launched) with_gang.push_back(record);
  }
  for (JobRecord* record : with_gang) TendGang(*record, now);
  KeepHouse(now);
  placement_due_ = true;
  explain_due_ = true;
}

void Dispatcher::TendGang(JobRecord& record, Moment now) {
  const v1::Job& job = record.job;
  Gang& gang = *record.gang;
  const GangStatus status = launcher_->Poll(job.id(), job.attempt());
  if (status.phase == GangStatus::Phase::kEnded || status.phase == GangStatus::Phase::kLost) {
    const bool lost = status.phase == GangStatus::Phase::kLost;
    if (!std::exchange(gang.files_read, true)) {
      // Without its supervisor nothing else ends what may be left of it.
      if (lost) launcher_->Kill(job.id(), job.attempt());
      TakeLeftPoints(record, now);
    }
    // Nobody would send these points again once the attempt has ended.
    if (gang.last_point > metrics_.stored_sequence() || gang.unstored_train || gang.unstored_eval) return;
    return EndAttempt(record, lost ? std::nullopt : std::optional(status.exit.exit_code), lost ? status.reason : "",
                      now);
  }
  if (status.phase != gang.phase) {
    gang.phase = status.phase;
    if (job.state() == v1::JOB_STATE_LAUNCHING) {
      const bool training = status.phase == GangStatus::Phase::kTraining;
      record.job.set_reason(training ? "the ranks are starting" : "checking the model and preparing the data");
      Changed(record);
    }
  }
  if (status.phase == GangStatus::Phase::kTraining && !gang.started) gang.started = now.steady;

  const int64_t limit_ms = record.config.time_limit_s * 1000;
  if (limit_ms > 0 && RunMillis(record, now.unix_ms) > limit_ms) {
    RequestEnd(record, absl::StrCat("the time limit of ", record.config.time_limit_s, " s was reached"), now);
  }
  if (gang.fault.empty() && !gang.terminated) {
    std::vector<RankHealth> ranks;
    for (const Rank& rank : gang.ranks) ranks.push_back(rank.health);
    if (const auto fault = FindHungRank(now.steady, gang.started, ranks, options_.liveness)) {
      gang.fault = *fault;
      AddEvent(record, "rank_lost", absl::StrCat(*fault, "; ending the attempt"), now.unix_ms);
      Terminate(record, now);
    }
  }
  Escalate(record, now);
}

void Dispatcher::Escalate(JobRecord& record, Moment now) {
  Gang& gang = *record.gang;
  if (gang.stop_asked && now.steady - *gang.stop_asked > options_.stop_grace) Terminate(record, now);
  if (!gang.terminated) return;
  Terminate(record, now);
  if (!gang.killed && now.steady - *gang.terminated > options_.term_grace) {
    gang.killed = true;
    launcher_->Kill(record.job.id(), record.job.attempt());
  }
}

std::string Dispatcher::DescribeEnd(const JobRecord& record, std::optional<int> exit_code,
                                    const std::string& lost_reason) const {
  if (!record.gang->fault.empty()) return record.gang->fault;
  if (!exit_code) return lost_reason;
  std::string words = record.gang->error.empty() ? LastWords(record.attempts.back().log_dir()) : record.gang->error;
  if (!words.empty() && words.back() == '.') words.pop_back();
  if (words.empty()) words = ExitText(*exit_code);
  return absl::StrCat(words, " (exit code ", *exit_code, ")");
}

milliseconds Dispatcher::PauseAfter(int restarts) const {
  const double factor = std::exp2(std::min(30, std::max(0, restarts - 1)));
  const double pause = static_cast<double>(options_.first_pause.count()) * factor;
  return std::min(options_.longest_pause, milliseconds(static_cast<int64_t>(pause)));
}

// Points that the ranks could not send any more, as when the gang ended while no coordinator was there.
void Dispatcher::TakeLeftPoints(JobRecord& record, Moment now) {
  Gang& gang = *record.gang;
  if (!AnyAttached(gang) || gang.ranks[0].health.finished) return;
  const fs::path output_dir = record.job.output_dir();
  const int attempt = record.job.attempt();
  const int64_t after = std::max(gang.last_step, record.attempts.back().first_step());
  for (const auto& [file, split, after_step] :
       {std::tuple("metrics.jsonl", "train", after),
        std::tuple("eval_metrics.jsonl", "eval",
                   std::max(gang.last_eval_step, record.attempts.back().first_step() - 1))}) {
    for (v1::MetricPoint& point : ReadMetricsFile(output_dir / file, split, attempt, after_step)) {
      v1::StepReport report;
      report.set_steps_planned(record.job.progress().steps_planned());
      report.mutable_point()->Swap(&point);
      TakeReport(record, std::move(report), now);
    }
  }
}

void Dispatcher::EndAttempt(JobRecord& record, std::optional<int> exit_code, const std::string& lost_reason,
                            Moment now) {
  v1::Job& job = record.job;
  const bool restarts_left = job.restarts() < job.max_restarts();
  // A gang that was ended for a fault has failed by it, whatever its exit code is; but 0 is 0.
  const bool own_exit = exit_code && (record.gang->fault.empty() || *exit_code == 0);
  const JobTrigger trigger =
      own_exit ? TriggerOfExit(*exit_code, restarts_left) : TriggerOfExit(/*exit_code=*/1, restarts_left);
  const bool cancelling = job.state() == v1::JOB_STATE_CANCELLING;
  const bool done = trigger == JobTrigger::kAttemptSucceeded;
  const bool preempted = job.state() == v1::JOB_STATE_PREEMPTING && !done && trigger != JobTrigger::kAttemptRefused;
  const bool asked = cancelling || preempted;
  const std::string why = done ? "done" : asked ? job.reason() : DescribeEnd(record, exit_code, lost_reason);

  v1::Attempt& attempt = record.attempts.back();
  *attempt.mutable_end_time() = ToTimestamp(now.unix_ms);
  if (exit_code) attempt.set_exit_code(*exit_code);
  attempt.set_reason(why);
  attempt.set_preempted(preempted);
  Write(jobs_.PutAttempt(record.sequence, attempt));
  job.mutable_progress()->set_eta_seconds(0);

  const std::string after = absl::StrCat("after step ", job.progress().step());
  if (done) {
    Apply(record, trigger, "succeeded", absl::StrCat("done ", after, "; results are in ", job.output_dir()), now);
  } else if (cancelling) {
    Apply(record, trigger, "cancelled", attempt.last_step() > 0 ? absl::StrCat(why, ", stopped ", after) : why, now);
  } else if (preempted) {
    record.not_before_ms = 0;
    const int64_t from = job.progress().checkpoint_step();
    Apply(record, trigger, "preempted",
          absl::StrCat(why, " ", after, "; goes on ", from > 0 ? absl::StrCat("after step ", from) : "from the start",
                       " when there is room again"),
          now);
  } else if (trigger == JobTrigger::kAttemptFaulted) {
    job.set_restarts(job.restarts() + 1);
    const milliseconds pause = PauseAfter(job.restarts());
    record.not_before_ms = now.unix_ms + pause.count();
    const int64_t from = job.progress().checkpoint_step();
    Apply(record, trigger, "restarting",
          absl::StrCat("attempt ", job.attempt(), " was lost: ", why, "; the next one begins ",
                       from > 0 ? absl::StrCat("after step ", from) : "from the start", " in ",
                       (pause.count() + 999) / 1000, " s"),
          now);
  } else if (trigger == JobTrigger::kRestartsExhausted) {
    Apply(record, trigger, "failed",
          absl::StrCat(why, "; given up after ", job.attempt(), job.attempt() == 1 ? " attempt" : " attempts",
                       " (max_restarts is ", job.max_restarts(), ")"),
          now);
  } else {
    Apply(record, trigger, "failed", why, now);
  }
}

}  // namespace simpo
