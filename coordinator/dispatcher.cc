#include "coordinator/dispatcher.h"

#include <sys/random.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "common/log.h"
#include "common/status_macros.h"
#include "common/text.h"
#include "coordinator/placement.h"
#include "coordinator/rpc_errors.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

constexpr int kEventsOfAJob = 200;        // that are looked through at the start
constexpr int kBadJob = 2;                // the exit code of what is not tried again
constexpr int64_t kRecentMs = 3'600'000;  // ended jobs that may still be on the metrics page
constexpr int kMaxPriority = 1'000'000;
constexpr int kDefaultNodes = 100, kMaxNodes = 1'000;  // of one page

// Reasons for waiting. Those of so many jobs at the front of the queue are always of now; beyond, so many
// are renewed at each tick that those of a queue of 15,000 are never older than ten seconds.
constexpr int kExplainedInFront = 64;
constexpr int kExplainedAtATick = 300;
constexpr size_t kMaxChores = 32;  // that the store of points is given at a time

// Ten letters and digits, the first a letter; no vowels, so that no word comes out.
absl::StatusOr<std::string> NewJobId() {
  constexpr char kAlphabet[] = "bcdfghjkmnpqrstvwxz23456789";
  constexpr size_t kLetters = 19;
  constexpr size_t kAll = sizeof(kAlphabet) - 1;
  std::array<unsigned char, 40> bytes;  // four for each place: the remainder's bias is gone
  if (getrandom(bytes.data(), bytes.size(), 0) != static_cast<ssize_t>(bytes.size())) {
    return absl::UnavailableError("the kernel gives no random bytes");
  }
  std::string id;
  for (size_t i = 0; i < bytes.size(); i += 4) {
    const uint32_t number = bytes[i] | bytes[i + 1] << 8 | bytes[i + 2] << 16 | uint32_t{bytes[i + 3]} << 24;
    id += kAlphabet[number % (id.empty() ? kLetters : kAll)];
  }
  return id;
}

Scheduler::Options QueueOptions(const Dispatcher::Options& options) {
  Scheduler::Options result = options.queue;
  if (result.nodes.empty()) result.nodes.push_back({.name = "local", .slots = options.slots_total});
  return result;
}

GangShape ShapeOf(const v1::Job& job) {
  const int nodes = std::max(1, job.nodes());
  return {.nodes = nodes, .slots_per_node = job.slots() / nodes};
}

JobOwner OwnerOf(const v1::Job& job) {
  return {.user = job.user(), .labels = {job.labels().begin(), job.labels().end()}};
}

// Where an attempt runs. One from before nodes were recorded, or on a machine that has got another name
// since, is on the only node.
NodeShares SharesOf(const v1::Job& job, const v1::Attempt& attempt, const Cluster& cluster) {
  NodeShares where;
  for (const v1::NodeSlots& share : attempt.nodes()) {
    const auto node = cluster.by_name().find(share.node());
    if (node != cluster.by_name().end()) where.push_back({node->second, share.slots()});
  }
  if (where.empty() && cluster.nodes().size() == 1) where.push_back({0, job.slots()});
  return where;
}

std::vector<std::string> NodeNames(const v1::Attempt& attempt) {
  std::vector<std::string> names;
  for (const v1::NodeSlots& share : attempt.nodes()) names.push_back(share.node());
  return names;
}

v1::RankState RankStateOf(int number, const Gang& gang) {
  const Rank& rank = gang.ranks[number];
  const RankHealth& health = gang.health[number];
  v1::RankState state;
  state.set_rank(number);
  state.set_hostname(health.hostname);
  state.set_pid(rank.pid);
  state.set_connected(rank.channel != nullptr);
  *state.mutable_heard_time() = ToTimestamp(rank.last_heard_ms);
  const v1::Heartbeat& heartbeat = health.heartbeat;
  state.set_phase(heartbeat.phase());
  state.set_step(heartbeat.step());
  state.set_busy_seconds(health.busy_seconds);
  state.set_last_collective(DescribeCollective(heartbeat));
  state.set_memory_peak_bytes(heartbeat.memory_peak_bytes());
  return state;
}

// Whether no run has left anything there that a worker would keep, write over or resume from.
bool IsUnused(const fs::path& output_dir) {
  std::error_code error;  // one that cannot be looked at may hold anything
  return !fs::exists(output_dir / "metrics.jsonl", error) && !error && !fs::exists(output_dir / "final", error) &&
         !error && !fs::exists(output_dir / "checkpoints", error) && !error;
}

JobConfig ConfigOf(const v1::Job& job, const std::string& yaml) {
  ParsedJob parsed = ParseJobYaml(yaml, {.file_name = "job.yaml", .base_dir = job.output_dir()});
  if (!parsed.violations.empty()) {
    LOG_WARNING(absl::StrCat(
        "job ", job.id(), ": its stored file is no longer valid: ", FormatViolations(parsed.violations, "job.yaml")));
  }
  return std::move(parsed.config);
}

JobInfo InfoOf(const JobConfig& config) {
  return {.model = config.model_name_or_path, .loss_type = config.loss_type, .launcher = config.launcher};
}

}  // namespace

std::shared_ptr<const JobView> MakeView(const JobRecord& record) {
  auto view = std::make_shared<JobView>();
  view->sequence = record.sequence;
  view->version = record.version;
  view->request_digest = record.request_digest;
  view->job = record.job;
  // The stored phase says how far the ranks of any attempt have come.
  if (record.job.state() == v1::JOB_STATE_LAUNCHING) view->job.mutable_progress()->set_phase("prepare");
  view->attempts = record.attempts;
  view->info = record.info;
  view->step_seconds = record.step_seconds;
  view->checkpoint_ms = record.checkpoint_ms;
  if (record.gang) {
    view->secret = record.gang->secret;
    for (size_t rank = 0; rank < record.gang->ranks.size(); ++rank) {
      if (record.gang->ranks[rank].last_heard_ms != 0) {
        view->ranks.push_back(RankStateOf(static_cast<int>(rank), *record.gang));
      }
    }
  }
  return view;
}

Dispatcher::Dispatcher(Options options, Database& database, JobStore& jobs, MetricStore& metrics, JobViews& views)
    : options_(std::move(options)),
      database_(database),
      jobs_(jobs),
      metrics_(metrics),
      views_(views),
      queue_(QueueOptions(options_)) {}

void Dispatcher::Write(const absl::Status& status) {
  if (store_status_.ok()) store_status_ = status;
}

void Dispatcher::Changed(JobRecord& record, bool for_watchers) {
  if (!record.changed) changed_.push_back(&record);
  record.changed = true;
  if (for_watchers) ++record.version;
}

JobRecord* Dispatcher::FindRecord(const std::string& job_id) {
  const auto found = by_id_.find(job_id);
  return found == by_id_.end() ? nullptr : found->second;
}

JobRecord& Dispatcher::AddRecord(StoredJob stored) {
  auto record = std::make_unique<JobRecord>();
  record->sequence = stored.sequence;
  record->request_digest = std::move(stored.request_digest);
  record->job = std::move(stored.job);
  record->attempts = std::move(stored.attempts);
  record->last_event = stored.last_event;
  JobRecord& result = *record;
  by_id_[result.job.id()] = &result;
  by_request_id_[result.job.request_id()] = &result;
  next_sequence_ = std::max(next_sequence_, result.sequence + 1);
  if (IsFinal(result.job.state())) {
    const std::pair<int64_t, int64_t> ended(UnixMillis(result.job.end_time()), result.sequence);
    to_remove_.insert(ended);
    to_thin_.insert(ended);
  } else {
    live_output_dirs_[result.job.output_dir()] = &result;
    ++live_of_user_[result.job.user()];
  }
  records_[result.sequence] = std::move(record);
  Changed(result);
  return result;
}

absl::Status Dispatcher::Load(Moment now) {
  SIMPO_ASSIGN_OR_RETURN(drained_, jobs_.LoadDrained());
  for (const auto& [node, reason] : drained_) queue_.SetNodeUp(node, false);
  even_offset_ms_ = now.unix_ms - Millis(now.steady);
  SIMPO_ASSIGN_OR_RETURN(std::vector<StoredJob> stored, jobs_.LoadJobs());
  int64_t last_point = 0;
  for (const StoredJob& job : stored) last_point = std::max(last_point, job.last_point);
  SIMPO_RETURN_IF_ERROR(metrics_.Reconcile(stored.empty() ? 0 : stored.back().sequence, last_point));
  for (StoredJob& job : stored) {
    JobRecord& record = AddRecord(std::move(job));
    TakeStoredTimes(record, now);
    const bool is_final = IsFinal(record.job.state());
    if (!is_final) SIMPO_RETURN_IF_ERROR(LoadLive(record, now));
    // Of what ended long ago nothing more is shown.
    if (!is_final || now.unix_ms - UnixMillis(record.job.end_time()) < kRecentMs) {
      SIMPO_ASSIGN_OR_RETURN(const std::string yaml, jobs_.ConfigYaml(record.sequence));
      JobConfig config = ConfigOf(record.job, yaml);
      record.info = InfoOf(config);
      if (!is_final) record.config = std::make_unique<const JobConfig>(std::move(config));
    }
    if (!is_final) Queue(record);
  }
  PublishChanged();
  return absl::OkStatus();
}

void Dispatcher::TakeStoredTimes(JobRecord& record, Moment now) const {
  const auto stored = [&](const google::protobuf::Timestamp& time) { return std::min(UnixMillis(time), now.unix_ms); };
  record.waiting_since_ms = stored(record.job.create_time());
  for (const v1::Attempt& attempt : record.attempts) {
    record.started_ms = record.seen_ms = stored(attempt.start_time());
    if (!attempt.has_end_time()) continue;
    record.waiting_since_ms = stored(attempt.end_time());
    record.run_before_ms += attempt.has_run_seconds()
                                ? std::llround(1000 * attempt.run_seconds())
                                : std::max<int64_t>(0, record.waiting_since_ms - record.started_ms);
  }
}

// The progress of a live job is not written at every step; its points are.
absl::Status Dispatcher::LoadLive(JobRecord& record, Moment now) {
  SIMPO_ASSIGN_OR_RETURN(const auto train, metrics_.LastReport(record.sequence, "train", /*attempt=*/0));
  SIMPO_ASSIGN_OR_RETURN(const auto eval, metrics_.LastReport(record.sequence, "eval", /*attempt=*/0));
  const auto seen = [&](const google::protobuf::Timestamp& time, int attempt) {
    const int64_t time_ms = std::min(UnixMillis(time), now.unix_ms);
    if (attempt == record.job.attempt()) record.seen_ms = std::max(record.seen_ms, time_ms);
  };
  for (const auto& report : {train, eval}) {
    if (report) seen(report->point().time(), report->point().attempt());
  }
  if (train) ShowTrainReport(*train, record.job.mutable_progress());
  if (eval) *record.job.mutable_progress()->mutable_eval_metrics() = eval->point().values();
  SIMPO_ASSIGN_OR_RETURN(const auto events, jobs_.LastEvents(record.sequence, kEventsOfAJob));
  for (const v1::JobEvent& event : events) {
    const bool complete = event.type() == "checkpoint";
    if (complete) record.checkpoint_ms = UnixMillis(event.time());
    if (complete || event.type() == "checkpoint_asked") {
      record.checkpoint_asked = !complete && event.attempt() == record.job.attempt();
    }
    // To be adopted is no sign of life: its gang has not been looked at then.
    if (event.type() != "adopted") seen(event.time(), event.attempt());
    if (event.attempt() == record.job.attempt()) record.worker_events.insert(EventKey(event.type(), event.message()));
  }
  if (record.job.state() == v1::JOB_STATE_RESTARTING && !record.attempts.empty()) {
    record.not_before_ms =
        record.waiting_since_ms + PauseBeforeNext(options_.restart, record.job, record.attempts).count();
  }
  return absl::OkStatus();
}

void Dispatcher::Adopt(Launcher& launcher, Moment now) {
  launcher_ = &launcher;
  launcher.Sweep([this](const std::string& job_id) {
    const JobRecord* record = FindRecord(job_id);
    return record != nullptr && !IsFinal(record->job.state());
  });
  for (JobRecord* record : WithGang()) AdoptGang(*record, now);
}

void Dispatcher::AddEvent(JobRecord& record, const std::string& type, const std::string& message, int64_t unix_ms) {
  v1::JobEvent event;
  event.set_sequence(++record.last_event);
  *event.mutable_time() = ToTimestamp(unix_ms);
  event.set_type(type);
  event.set_message(ToUtf8(message, kMaxReasonBytes));  // a file that is named in it may be called anything
  event.set_attempt(record.job.attempt());
  event.set_state(record.job.state());
  Write(jobs_.AddEvent(record.sequence, event, metrics_.stored_sequence()));
  Changed(record);
  LOG_INFO(absl::StrCat("job ", record.job.id(), ", attempt ", record.job.attempt(), ": ", type, ": ", message));
}

bool Dispatcher::Apply(JobRecord& record, JobTrigger trigger, const std::string& event, const std::string& reason,
                       Moment now) {
  const v1::JobState state = record.job.state();
  const std::optional<Transition> transition = NextState(state, trigger);
  if (!transition) {
    LOG_ERROR(absl::StrCat("job ", record.job.id(), ": '", JobTriggerName(trigger), "' cannot happen in state ",
                           JobStateName(state), "; ignored"));
    return false;
  }
  if (transition->next == state) return true;
  record.job.set_state(transition->next);
  record.job.set_reason(ToUtf8(reason, kMaxReasonBytes));
  if (IsFinal(transition->next)) {
    *record.job.mutable_end_time() = ToTimestamp(now.unix_ms);
    live_output_dirs_.erase(record.job.output_dir());
    if (const auto user = live_of_user_.find(record.job.user()); --user->second == 0) live_of_user_.erase(user);
    // It is kept for long: without what only live jobs need.
    record.worker_events.clear();
    record.config.reset();
    to_remove_.insert({EvenMillis(now), record.sequence});
    to_thin_.insert({EvenMillis(now), record.sequence});
    if (!record.attempts.empty()) {
      acknowledgements_.push_back([this, id = record.job.id()](const absl::Status& status) {
        if (status.ok() && launcher_ != nullptr) launcher_->Forget(id);
      });
    }
  }
  if (!HoldsGang(transition->next) && record.gang) {
    for (Rank& rank : record.gang->ranks) {
      if (rank.channel) rank.channel->Close(absl::OkStatus());
    }
    record.gang.reset();
  }
  AddEvent(record, event, reason, now.unix_ms);
  Write(jobs_.UpdateJob(record.sequence, record.job));
  if (transition->action == JobAction::kLaunch) launches_.push_back(&record);
  Queue(record);
  placement_due_ = true;
  return true;
}

const JobRecord* Dispatcher::WriterTo(const std::string& folder) const {
  if (folder.empty()) return nullptr;
  for (fs::path path = folder;; path = path.parent_path()) {
    if (const auto found = live_output_dirs_.find(path.string()); found != live_output_dirs_.end()) {
      return found->second;
    }
    if (!path.has_relative_path()) break;
  }
  // What lies in it comes next, were it there itself.
  const std::string inside = folder.ends_with('/') ? folder : folder + "/";
  const auto next = live_output_dirs_.lower_bound(inside);
  return next != live_output_dirs_.end() && next->first.starts_with(inside) ? next->second : nullptr;
}

std::string Dispatcher::ProblemOfTurnedFolder(const JobRecord& record) const {
  const std::string& named = record.job.output_dir();
  const std::optional<fs::path> real = WithoutLinks(named);
  if (!options_.roots.restricted() || !real || *real == named) return "";
  const auto taken = [&](const JobRecord& other) {
    return absl::StrCat("'", named, "' leads to a folder of job ", other.job.id(), " since a link was made; name ",
                        "another folder");
  };
  if (const JobRecord* other = WriterTo(real->string()); other != nullptr && other != &record) return taken(*other);
  for (const auto& [sequence, other] : records_) {
    if (other->job.user() != record.job.user() && FoldersOverlap(real->native(), other->job.output_dir())) {
      return taken(*other);
    }
  }
  return "";
}

absl::Status Dispatcher::Check(const v1::Job& job, const std::string& output_dir) {
  if (const auto user = live_of_user_.find(job.user());
      options_.max_jobs_per_user > 0 && user != live_of_user_.end() && user->second >= options_.max_jobs_per_user) {
    return WithReason(absl::ResourceExhaustedError(absl::StrCat(
                          job.user().empty() ? "the user without a name" : absl::StrCat("user ", job.user()), " has ",
                          user->second, " jobs that have not ended, and may have ", options_.max_jobs_per_user,
                          "; wait for some, cancel some, or have --max-jobs-per-user raised on the coordinator")),
                      "TOO_MANY_JOBS");
  }
  std::vector<FieldViolation> violations;
  if (const JobRecord* other = WriterTo(output_dir)) {
    const std::string& theirs = other->job.output_dir();
    const std::string shares = theirs == output_dir ? "" : absl::StrCat(" shares files with '", theirs, "', which");
    violations.push_back({"output_dir", 0,
                          absl::StrCat("'", output_dir, "'", shares, " is being written by job ", other->job.id(),
                                       "; wait for it, cancel it, or name another folder")});
  }
  if (const std::string never = queue_.NeverStarts(ShapeOf(job), OwnerOf(job)); !never.empty()) {
    violations.push_back({"resources", 0, absl::StrCat("the job can never start here: ", never)});
  }
  return violations.empty() ? absl::OkStatus() : BadRequestError(violations, "job");
}

absl::Status Dispatcher::Prepare(Submission& submission) const {
  SIMPO_ASSIGN_OR_RETURN(const std::string id, NewJobId());
  v1::Job& job = submission.job;
  JobConfig& config = submission.config;
  if (!fs::path(config.output_dir).is_absolute()) {
    config.output_dir = (options_.outputs_dir / absl::StrCat(FileNameOf(job.name()), "-", id)).string();
  }
  job.set_id(id);
  job.set_output_dir(config.output_dir);
  job.set_config_yaml(JobConfigToYaml(config));
  return absl::OkStatus();
}

void Dispatcher::Submit(Submission submission, const std::string& request_id, Moment now, SubmitDone done) {
  if (const auto earlier = by_request_id_.find(request_id); !request_id.empty() && earlier != by_request_id_.end()) {
    JobRecord& record = *earlier->second;
    if (record.request_digest != submission.request_digest) {
      return done(WithReason(absl::AlreadyExistsError(absl::StrCat("request_id '", request_id,
                                                                   "' was used for another request, which became job ",
                                                                   record.job.id(), "; use a new request_id")),
                             "REQUEST_ID_REUSED"));
    }
    acknowledgements_.push_back([this, &record, done = std::move(done)](const absl::Status& status) {
      if (!status.ok()) return done(status);
      absl::StatusOr<std::string> yaml = jobs_.ConfigYaml(record.sequence);
      if (!yaml.ok()) return done(yaml.status());
      v1::SubmitJobResponse response;
      *response.mutable_job() = record.job;
      response.mutable_job()->set_config_yaml(*std::move(yaml));
      response.set_already_existed(true);
      done(std::move(response));
    });
    return;
  }
  if (absl::Status status = Check(submission.job, submission.job.output_dir()); !status.ok()) {
    return done(std::move(status));
  }
  StoredJob stored{.sequence = next_sequence_,
                   .request_digest = std::move(submission.request_digest),
                   .job = std::move(submission.job)};
  v1::Job& job = stored.job;
  job.set_request_id(request_id.empty() ? job.id() : request_id);
  job.set_state(v1::JOB_STATE_QUEUED);
  job.set_reason("waiting for its turn");
  *job.mutable_create_time() = ToTimestamp(now.unix_ms);
  Write(jobs_.InsertJob(stored));
  std::string yaml = std::move(*job.mutable_config_yaml());
  job.clear_config_yaml();
  JobRecord& record = AddRecord(std::move(stored));
  record.info = InfoOf(submission.config);
  record.config = std::make_unique<const JobConfig>(std::move(submission.config));
  record.waiting_since_ms = EvenMillis(now);
  Queue(record);
  AddEvent(record, "submitted", absl::StrCat("submitted", job.user().empty() ? "" : " by ", job.user()), now.unix_ms);
  placement_due_ = true;
  acknowledgements_.push_back([&record, yaml = std::move(yaml), notes = std::move(submission.notes),
                               done = std::move(done)](const absl::Status& status) {
    if (!status.ok()) return done(status);
    v1::SubmitJobResponse response;
    *response.mutable_job() = record.job;
    response.mutable_job()->set_config_yaml(yaml);
    response.mutable_notes()->Add(notes.begin(), notes.end());
    done(std::move(response));
  });
}

void Dispatcher::Cancel(const std::string& job_id, Moment now, CancelDone done) {
  JobRecord* record = FindRecord(job_id);
  if (record == nullptr) return done(absl::NotFoundError(absl::StrCat("there is no job '", job_id, "'")));
  RequestEnd(*record, "cancelled on request", now);
  acknowledgements_.push_back([record, done = std::move(done)](const absl::Status& status) {
    if (!status.ok()) return done(status);
    v1::CancelJobResponse response;
    *response.mutable_job() = record->job;
    done(std::move(response));
  });
}

void Dispatcher::SetPriority(const std::string& job_id, int priority, Moment now, PriorityDone done) {
  JobRecord* record = FindRecord(job_id);
  if (record == nullptr) return done(absl::NotFoundError(absl::StrCat("there is no job '", job_id, "'")));
  v1::Job& job = record->job;
  if (priority < -kMaxPriority || priority > kMaxPriority) {
    return done(BadRequestError(
        {{"priority", 0, absl::StrCat("must be ", -kMaxPriority, " to ", kMaxPriority, ", not ", priority)}},
        "request"));
  }
  if (IsFinal(job.state())) {
    return done(absl::FailedPreconditionError(
        absl::StrCat("job ", job_id, " has ended (", JobStateName(job.state()), "); submit it again to run it again")));
  }
  if (const int before = job.priority(); before != priority) {
    job.set_priority(priority);
    Write(jobs_.UpdateJob(record->sequence, job));
    AddEvent(*record, "priority", absl::StrCat("priority ", before, " -> ", priority), now.unix_ms);
    Queue(*record);
    placement_due_ = true;
  }
  acknowledgements_.push_back([record, done = std::move(done)](const absl::Status& status) {
    if (!status.ok()) return done(status);
    v1::SetPriorityResponse response;
    *response.mutable_job() = record->job;
    done(std::move(response));
  });
}

absl::StatusOr<v1::ListNodesResponse> Dispatcher::ListNodes(const v1::ListNodesRequest& request) const {
  if (request.page_size() < 0 || request.page_size() > kMaxNodes) {
    return absl::InvalidArgumentError(
        absl::StrCat("page_size is ", request.page_size(), "; it must be 1 to ", kMaxNodes));
  }
  const int size = request.page_size() == 0 ? kDefaultNodes : request.page_size();
  const Cluster& cluster = queue_.cluster();
  v1::ListNodesResponse response;
  for (auto named = cluster.by_name().upper_bound(request.page_token()); named != cluster.by_name().end(); ++named) {
    if (response.nodes_size() == size) {
      response.set_next_page_token(response.nodes().rbegin()->name());
      break;
    }
    *response.add_nodes() = StateOf(named->second);
  }
  return response;
}

v1::NodeState Dispatcher::StateOf(int index) const {
  const Cluster& cluster = queue_.cluster();
  const Node& node = cluster.nodes()[index];
  v1::NodeState state;
  state.set_name(node.name);
  state.set_slots(node.slots);
  state.set_slots_taken(node.slots - cluster.free(index));
  state.set_up(node.up);
  state.mutable_labels()->insert(node.labels.begin(), node.labels.end());
  if (const auto drained = drained_.find(node.name); drained != drained_.end()) {
    state.set_drain_reason(drained->second);
  }
  for (const auto& [sequence, slots] : cluster.gangs_on(index)) {
    v1::JobSlots& job = *state.add_jobs();
    job.set_job_id(cluster.running().at(sequence).id);
    job.set_slots(slots);
  }
  return state;
}

bool Dispatcher::SetNodeUp(const std::string& name, bool up) {
  placement_due_ = true;
  if (up) {
    down_.erase(name);
  } else {
    down_.insert(name);
  }
  return queue_.SetNodeUp(name, IsUp(name));
}

void Dispatcher::SetDrained(const std::string& node, const std::string& reason, bool keep_running, Moment now,
                            NodeDone done) {
  const Cluster& cluster = queue_.cluster();
  const auto named = cluster.by_name().find(node);
  if (named == cluster.by_name().end()) {
    return done(absl::NotFoundError(absl::StrCat("there is no node '", node, "'; `simpoctl nodes` lists them")));
  }
  if (reason.empty()) {
    drained_.erase(node);
  } else {
    drained_[node] = reason;
  }
  Write(jobs_.PutDrained(node, reason));
  LOG_INFO(absl::StrCat("node ", node, reason.empty() ? " is in use again" : " is drained: ", reason));
  queue_.SetNodeUp(node, IsUp(node));
  placement_due_ = true;
  if (!reason.empty() && !keep_running) {
    std::vector<int64_t> gangs;
    for (const auto& [sequence, slots] : cluster.gangs_on(named->second)) gangs.push_back(sequence);
    for (int64_t sequence : gangs) {
      JobRecord& record = *records_.at(sequence);
      const v1::JobState state = record.job.state();
      if (state != v1::JOB_STATE_LAUNCHING && state != v1::JOB_STATE_RUNNING) continue;  // is leaving already
      Preempt(record, absl::StrCat("node ", node, " was drained: ", reason), now);
    }
  }
  acknowledgements_.push_back([this, index = named->second, done = std::move(done)](const absl::Status& status) {
    if (!status.ok()) return done(status);
    done(StateOf(index));
  });
}

void Dispatcher::Checkpoint(const std::string& job_id, Moment now, CheckpointDone done) {
  JobRecord* record = FindRecord(job_id);
  if (record == nullptr) return done(absl::NotFoundError(absl::StrCat("there is no job '", job_id, "'")));
  const v1::Job& job = record->job;
  const bool trains = job.state() == v1::JOB_STATE_RUNNING && record->gang && !record->gang->stop_asked &&
                      !record->gang->terminated && !record->gang->health[0].finished;
  if (!trains) {
    return done(absl::FailedPreconditionError(absl::StrCat("job ", job_id, " is ", JobStateName(job.state()),
                                                           "; only a job that trains can write a checkpoint")));
  }
  const Rank& rank = record->gang->ranks[0];
  if (!rank.channel || !rank.welcomed) {
    return done(absl::FailedPreconditionError(
        absl::StrCat("rank 0 of job ", job_id, " is not connected at the moment; try again in some seconds")));
  }
  record->checkpoint_asked = true;  // until it is complete: this stream may break before the rank has heard of it
  AddEvent(*record, "checkpoint_asked", "a checkpoint at the next step was asked for", now.unix_ms);
  acknowledgements_.push_back([record, channel = rank.channel, done = std::move(done)](const absl::Status& status) {
    if (!status.ok()) return done(status);
    channel->Send(CheckpointCommand());
    v1::CheckpointJobResponse response;
    *response.mutable_job() = record->job;
    done(std::move(response));
  });
}

void Dispatcher::Queue(const JobRecord& record) {
  const v1::Job& job = record.job;
  const int64_t limit_ms = record.config ? record.config->time_limit_s * 1000 : 0;
  if (WaitsForSlots(job.state())) {
    queue_.Wait({.sequence = record.sequence,
                 .id = job.id(),
                 .owner = OwnerOf(job),
                 .priority = job.priority(),
                 .shape = ShapeOf(job),
                 .time_left_ms = limit_ms > 0 ? std::max<int64_t>(1, limit_ms - record.run_before_ms) : 0,
                 .waiting_since_ms = record.waiting_since_ms,
                 .not_before_ms = record.not_before_ms});
  } else if (HoldsGang(job.state())) {
    const v1::Attempt& attempt = record.attempts.back();
    const bool leaves = job.state() == v1::JOB_STATE_PREEMPTING || job.state() == v1::JOB_STATE_CANCELLING;
    queue_.Run({.sequence = record.sequence,
                .id = job.id(),
                .priority = job.priority() + attempt.priority_gain(),
                .started_ms = record.started_ms,
                .ends_by_ms = limit_ms > 0 ? record.started_ms + limit_ms - record.run_before_ms : kNever,
                .leaving = leaves,
                .where = SharesOf(job, attempt, queue_.cluster())},
               OwnerOf(job));
  } else {
    queue_.Remove(record.sequence);
  }
}

void Dispatcher::Place(Moment now) {
  placement_due_ = false;
  const PlacementDecision decision = queue_.Decide(EvenMillis(now));
  for (const PlacementDecision::Start& start : decision.start) BeginAttempt(*records_.at(start.sequence), start, now);
  for (const auto& [victim, winner] : decision.preempt) {
    const v1::Job& job = records_.at(winner)->job;
    Preempt(*records_.at(victim), absl::StrCat("pre-empted by job ", job.id(), " (priority ", job.priority(), ")"),
            now);
  }
  if (queue_.in_line() <= kExplainedInFront || std::exchange(explain_due_, false)) ExplainQueue(now);
}

void Dispatcher::ExplainQueue(Moment now) {
  if (explain_from_ > queue_.in_line()) explain_from_ = 1;
  queue_.Explain(EvenMillis(now), kExplainedInFront, explain_from_, kExplainedAtATick,
                 [this](int64_t sequence, std::string reason) {
                   JobRecord& record = *records_.at(sequence);
                   // After an attempt it matters most why there is another one.
                   if (!record.attempts.empty()) reason = absl::StrCat(record.attempts.back().reason(), "; ", reason);
                   if (record.job.reason() == reason) return;
                   record.job.set_reason(std::move(reason));
                   Changed(record);
                 });
  explain_from_ += kExplainedAtATick;
}

void Dispatcher::BeginAttempt(JobRecord& record, const PlacementDecision::Start& start, Moment now) {
  v1::Job& job = record.job;
  job.set_attempt(job.attempt() + 1);
  if (!job.has_start_time()) *job.mutable_start_time() = ToTimestamp(now.unix_ms);
  v1::Attempt& attempt = record.attempts.emplace_back();
  attempt.set_number(job.attempt());
  *attempt.mutable_start_time() = ToTimestamp(now.unix_ms);
  attempt.set_log_dir((fs::path(job.output_dir()) / "logs" / absl::StrCat("attempt-", job.attempt())).string());
  attempt.set_priority_gain(start.gain);
  for (const NodeShare& share : start.where) {
    v1::NodeSlots& slots = *attempt.add_nodes();
    slots.set_node(queue_.cluster().nodes()[share.node].name);
    slots.set_slots(share.slots);
  }
  Write(jobs_.PutAttempt(record.sequence, attempt));
  record.started_ms = record.seen_ms = EvenMillis(now);
  // Ranks may train and be lost before they have ever reported. If nothing lay in the folder, what is found there
  // later is this job's all the same: a phase says so (see Launch).
  if (job.attempt() == 1 && IsUnused(job.output_dir())) job.mutable_progress()->set_phase("prepare");
  record.gang.emplace();
  record.gang->ranks.resize(job.ranks());
  record.gang->health.resize(job.ranks());
  record.worker_events.clear();
  record.checkpoint_asked = false;
  Apply(record, JobTrigger::kSlotsAssigned, "launched",
        absl::StrCat("starting attempt ", job.attempt(), " on ", job.ranks(), job.ranks() == 1 ? " rank" : " ranks"),
        now);
}

void Dispatcher::Launch(JobRecord& record, Moment now) {
  if (!record.gang || record.gang->launched) return;
  const v1::Job& job = record.job;
  const GangStatus found = launcher_->Poll(job.id(), job.attempt());
  if (found.phase == GangStatus::Phase::kUnknown) {
    // An earlier coordinator may have started it: neither this attempt nor another may begin. The next tick asks again.
    Managed(record, absl::UnavailableError(found.reason));
    return;
  }
  record.gang->launched = true;
  // Cancelled meanwhile, or an earlier coordinator has started it.
  if (job.state() != v1::JOB_STATE_LAUNCHING || found.phase != GangStatus::Phase::kLost) return OpenTo(record);
  // A link may lead elsewhere by now, and a folder be closed. Another attempt would find the same. A gang that an
  // earlier coordinator started was looked at then.
  std::vector<FieldViolation> violations = options_.roots.Check(*record.config);
  std::string problem = violations.empty() ? ProblemOfTurnedFolder(record) : "";
  // A folder of the coordinator's choice is no fault of the job's.
  if (violations.empty() && problem.empty() && fs::path(job.output_dir()).parent_path() != options_.outputs_dir) {
    problem = ProblemOfFolder(job.output_dir());
    if (problem.empty()) problem = MakeFolder(job.output_dir());
  }
  if (!problem.empty()) violations.push_back({"output_dir", 0, std::move(problem)});
  if (!violations.empty()) {
    record.gang->error = FormatViolations(violations, "job.yaml");
    return EndAttempt(record, {.exit_code = kBadJob}, "", EvenMillis(now), now);
  }
  // With a phase, what lies in the folder is this job's: it was unused, or an earlier attempt whose ranks had begun has
  // claimed it.
  const bool resume = job.attempt() > 1 && !job.progress().phase().empty();
  absl::StatusOr<std::string> yaml = jobs_.ConfigYaml(record.sequence);
  if (!yaml.ok()) return Write(yaml.status());
  const absl::StatusOr<bool> started =
      launcher_->Start({.job_id = job.id(),
                        .attempt = job.attempt(),
                        .ranks = job.ranks(),
                        .threads_per_rank = std::max(1, job.slots() / std::max(1, job.ranks())),
                        .nodes = NodeNames(record.attempts.back()),
                        .resume_latest = resume,
                        .job_yaml = *std::move(yaml),
                        .log_dir = record.attempts.back().log_dir(),
                        .output_dir = job.output_dir()});
  if (started.ok()) {
    if (*started && record.started_ms < EvenMillis(now)) {
      // An earlier coordinator wanted to start it, and was gone before it did: it begins now.
      v1::Attempt& attempt = record.attempts.back();
      *attempt.mutable_start_time() = ToTimestamp(now.unix_ms);
      Write(jobs_.PutAttempt(record.sequence, attempt));
      record.started_ms = record.seen_ms = EvenMillis(now);
      Queue(record);
    }
    Changed(record);
    return OpenTo(record);
  }
  EndAttempt(record, {.seen = v1::FAULT_KIND_MACHINE},
             absl::StrCat("could not be started: ", std::string(started.status().message())), EvenMillis(now), now);
}

void Dispatcher::AfterPoints(PointsStored then) {
  after_points_.emplace_back(metrics_.last_sequence(), std::move(then));
}

bool Dispatcher::ArePointsDue() const {
  return !after_points_.empty() && after_points_.front().first <= metrics_.stored_sequence();
}

void Dispatcher::TellOfStoredPoints(Moment now) {
  while (ArePointsDue()) {
    const PointsStored then = std::move(after_points_.front().second);
    after_points_.pop_front();
    then(absl::OkStatus(), now);
  }
}

void Dispatcher::WhenRoom(std::function<void()> taken) {
  if (!metrics_.IsBehind()) return taken();
  AfterPoints([taken = std::move(taken)](const absl::Status&, Moment) { taken(); });
}

// A few jobs at a time: the store of points works on them, and a job goes when it has none left.
void Dispatcher::KeepHouse(Moment now) {
  for (int64_t sequence : metrics_.TakeForgotten()) RemoveJob(sequence);
  size_t chores = metrics_.chores_waiting();
  const auto due = [&](const auto& jobs, std::chrono::milliseconds keep) {
    return keep.count() > 0 && !jobs.empty() && jobs.begin()->first + keep.count() < EvenMillis(now) &&
           chores < kMaxChores;
  };
  for (; due(to_remove_, options_.keep_jobs); ++chores) {
    to_thin_.erase(*to_remove_.begin());
    metrics_.Forget(to_remove_.extract(to_remove_.begin()).value().second);
  }
  for (; due(to_thin_, options_.keep_points); ++chores) {
    metrics_.Thin(to_thin_.extract(to_thin_.begin()).value().second, now.unix_ms);
  }
}

void Dispatcher::RemoveJob(int64_t sequence) {
  const auto found = records_.find(sequence);
  if (found == records_.end()) return;
  JobRecord* record = found->second.get();
  LOG_INFO(absl::StrCat("job ", record->job.id(), ": removed, as it ended long ago (history_days)"));
  Write(jobs_.DeleteJob(sequence));
  by_id_.erase(record->job.id());
  by_request_id_.erase(record->job.request_id());
  std::erase(changed_, record);
  std::erase(heard_, record);
  removed_.push_back(std::move(found->second));
  records_.erase(found);
}

void Dispatcher::PublishChanged() {
  std::vector<JobViews::View> views;
  for (JobRecord* record : std::exchange(changed_, {})) {
    record->changed = false;
    views.push_back(MakeView(*record));
  }
  views_.Publish(std::move(views));
  for (const auto& record : removed_) views_.Remove(record->sequence);
}

absl::Status Dispatcher::Commit() {
  SIMPO_RETURN_IF_ERROR(store_status_);
  SIMPO_RETURN_IF_ERROR(metrics_.status());
  if (!database_.InTransaction()) return absl::OkStatus();
  const auto begin = std::chrono::steady_clock::now();
  SIMPO_RETURN_IF_ERROR(database_.Commit());
  stats_.commit_seconds.Add(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
  return absl::OkStatus();
}

void Dispatcher::FailAll(const absl::Status& status) {
  const absl::Status answer = absl::UnavailableError(
      absl::StrCat("the coordinator cannot write its database and stops: ", std::string(status.message())));
  for (const Acknowledgement& acknowledge : std::exchange(acknowledgements_, {})) acknowledge(answer);
  for (const auto& [sequence, then] : std::exchange(after_points_, {})) then(answer, {});
}

absl::Status Dispatcher::Flush(Moment now) {
  while (true) {
    TellOfStoredPoints(now);
    if (placement_due_ && launcher_ != nullptr) Place(now);
    if (absl::Status status = Commit(); !status.ok()) {
      FailAll(status);
      return status;
    }
    PublishChanged();
    for (const Acknowledgement& acknowledge : std::exchange(acknowledgements_, {})) acknowledge(absl::OkStatus());
    removed_.clear();
    if (launches_.empty() && !placement_due_ && !ArePointsDue()) return absl::OkStatus();
    for (JobRecord* record : std::exchange(launches_, {})) Launch(*record, now);
  }
}

absl::Status Dispatcher::FlushAll(Moment now) {
  // The first one hands over what acknowledgements wait for.
  SIMPO_RETURN_IF_ERROR(Flush(now));
  Write(metrics_.Sync());
  return Flush(now);
}

}  // namespace simpo
