#include "coordinator/training_service.h"

#include <grpcpp/alarm.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "coordinator/job_state.h"
#include "coordinator/job_streams.h"
#include "coordinator/moment.h"
#include "coordinator/rpc_errors.h"
#include "coordinator/submission.h"

namespace simpo {
namespace {

constexpr int kEventsShown = 200;
constexpr int kDefaultJobs = 50;
constexpr int kMaxJobs = 1000;
constexpr int kDefaultPoints = 1000;
constexpr int kMaxPoints = 10'000;
constexpr size_t kMaxReasonBytes = 256;

// One unary call: admits its caller, answers it, and notes how long it took and what came of it. A method that does
// not begin with one, and with its answer(), has not asked whether it may go on.
class UnaryCall {
 public:
  // `job`: what the request names, for the audit log.
  UnaryCall(grpc::CallbackServerContext* context, const TrainingService::Parts& parts, const std::string& method,
            const std::string& job = "")
      : state_(std::make_shared<State>(context->DefaultReactor(), parts, method)) {
    absl::StatusOr<Caller> caller = parts.guard.Admit(state_->rule, *context, job);
    state_->admitted = caller.status();
    if (caller.ok()) state_->caller = *std::move(caller);
  }

  bool admitted() const { return state_->admitted.ok(); }
  // Of an admitted call.
  const Caller& caller() const { return state_->caller; }
  grpc::ServerUnaryReactor* reactor() const { return state_->reactor; }

  grpc::ServerUnaryReactor* Refuse() const { return Answer(state_->admitted); }
  // Once. `job`: the id of the job that was changed, or was not to be.
  grpc::ServerUnaryReactor* Finish(const absl::Status& status, const std::string& job = "") const {
    Note(status, job);
    return Answer(status);
  }
  // Of a call whose time was up before this came of it: what was changed is in the audit log all the same.
  void Note(const absl::Status& status, const std::string& job = "") const {
    const MethodRule* rule = FindRule(state_->rule);
    if (rule != nullptr && rule->changes && !state_->only_looks) {
      state_->parts.guard.Note(state_->rule, state_->caller, job, status);
    }
  }
  // The call changes nothing after all.
  void OnlyLooks() const { state_->only_looks = true; }

  // For a call that another thread answers: it ends with DEADLINE_EXCEEDED when that takes too long. That thread then
  // asks Claim() before it touches the response.
  void LimitTime() const {
    // An alarm keeps its function for as long as it lives: the function must not keep the alarm.
    state_->alarm.Set(std::chrono::system_clock::now() + state_->parts.longest_call,
                      [weak = std::weak_ptr(state_)](bool rang) {
                        const std::shared_ptr<State> state = weak.lock();
                        if (!rang || !state || state->claimed.exchange(true)) return;
                        UnaryCall(state).Answer(absl::DeadlineExceededError(
                            state->only_looks ? "the coordinator has not looked at this in time; ask again"
                                              : "the coordinator has not stored this in time; ask again with the same "
                                                "request_id, or look whether it was"));
                      });
  }
  bool Claim() const {
    if (state_->claimed.exchange(true)) return false;
    state_->alarm.Cancel();
    return true;
  }

 private:
  struct State {
    State(grpc::ServerUnaryReactor* reactor, const TrainingService::Parts& parts, const std::string& method)
        : reactor(reactor), parts(parts), method(method), rule("TrainingService/" + method) {}
    grpc::ServerUnaryReactor* const reactor;
    const TrainingService::Parts& parts;
    const std::string method, rule;
    const std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
    Caller caller;
    absl::Status admitted;
    bool only_looks = false;
    std::atomic<bool> claimed = false;
    grpc::Alarm alarm;
  };
  explicit UnaryCall(std::shared_ptr<State> state) : state_(std::move(state)) {}

  grpc::ServerUnaryReactor* Answer(const absl::Status& status) const {
    const auto time = std::chrono::steady_clock::now() - state_->begin;
    state_->parts.rpc_stats.Add(state_->method, status.code(), std::chrono::duration<double>(time).count());
    state_->reactor->Finish(ToGrpcStatus(status));
    return state_->reactor;
  }

  std::shared_ptr<State> state_;
};

// Answers a call with what another thread has found, if its time is not up. `job`: as of Finish.
template <typename Response>
auto AnswerLater(const UnaryCall& call, Response* response, const std::string& job = "") {
  return [call, response, job](absl::StatusOr<Response> result) {
    if (!call.Claim()) return call.Note(result.status(), job);
    if (result.ok()) response->Swap(&*result);
    call.Finish(result.status(), job);
  };
}

// A stream that ends at once.
template <typename Response>
class EndedStream final : public grpc::ServerWriteReactor<Response> {
 public:
  explicit EndedStream(const absl::Status& status) { this->Finish(ToGrpcStatus(status)); }
  void OnDone() override { delete this; }
};

void CheckPageSize(int size, int max, std::vector<FieldViolation>* violations) {
  if (size >= 0 && size <= max) return;
  violations->push_back({"page_size", 0, absl::StrCat("it is ", size, "; it must be 1 to ", max)});
}

// The answer to a request_id that is known already.
absl::Status AnswerAgain(const JobView& view, const v1::SubmitJobRequest& request, JobStore& jobs,
                         v1::SubmitJobResponse* response) {
  if (view.request_digest != RequestDigest(request)) {
    return WithReason(absl::AlreadyExistsError(absl::StrCat("request_id '", request.request_id(),
                                                            "' was used for another request, which became job ",
                                                            view.job.id(), "; use a new request_id")),
                      "REQUEST_ID_REUSED");
  }
  SIMPO_ASSIGN_OR_RETURN(std::string yaml, jobs.ConfigYaml(view.sequence));
  *response->mutable_job() = view.job;
  response->mutable_job()->set_config_yaml(std::move(yaml));
  response->set_already_existed(true);
  return absl::OkStatus();
}

bool Matches(const v1::ListJobsRequest& request, const v1::Job& job) {
  const auto& states = request.states();
  if (!states.empty() && std::find(states.begin(), states.end(), job.state()) == states.end()) return false;
  if (!request.user().empty() && request.user() != job.user()) return false;
  return std::all_of(request.labels().begin(), request.labels().end(), [&](const auto& label) {
    const auto found = job.labels().find(label.first);
    return found != job.labels().end() && found->second == label.second;
  });
}

}  // namespace

std::vector<FieldViolation> TrainingService::CheckGivenOutputDir(const Submission& submission,
                                                                 const Caller& caller) const {
  const std::string& folder = submission.config.output_dir;
  // What is relative is the coordinator's to choose. Of what is not allowed nothing is told.
  const bool refused = std::any_of(submission.violations.begin(), submission.violations.end(),
                                   [](const FieldViolation& violation) { return violation.field == "output_dir"; });
  if (refused || !std::filesystem::path(folder).is_absolute()) return {};
  for (const JobViews::View& view : parts_.views.All()) {
    if (!FoldersOverlap(folder, view->job.output_dir()) || Guard::CheckMayChange(caller, view->job).ok()) continue;
    return {{"output_dir", 0,
             absl::StrCat("'", folder, "' belongs to job ", view->job.id(), " of ", view->job.user(),
                          "; name another folder")}};
  }
  return CheckOutputDir(submission.config, folder);
}

int SlotsTaken(const JobViews& views) {
  int taken = 0;
  for (const JobViews::View& view : views.All()) {
    if (HoldsGang(view->job.state())) taken += view->job.slots();
  }
  return taken;
}

grpc::ServerUnaryReactor* TrainingService::SubmitJob(grpc::CallbackServerContext* context,
                                                     const v1::SubmitJobRequest* request,
                                                     v1::SubmitJobResponse* response) {
  const UnaryCall call(context, parts_, "SubmitJob", request->name());
  if (!call.admitted()) return call.Refuse();
  // The user is the one whose token it is, whatever the request says.
  v1::SubmitJobRequest own;
  if (!call.caller().user.empty() && call.caller().user != request->user()) {
    own = *request;
    own.set_user(call.caller().user);
    request = &own;
  }
  if (request->validate_only()) call.OnlyLooks();
  if (!request->request_id().empty() && !request->validate_only()) {
    // Before anything is checked: by now the job's own output may lie in its folder.
    if (const JobViews::View known = parts_.views.FindByRequestId(request->request_id())) {
      return call.Finish(AnswerAgain(*known, *request, parts_.jobs, response), known->job.id());
    }
  }
  Submission submission = CheckSubmission(*request, parts_.facts.slots_total, parts_.roots);
  std::vector<FieldViolation>& violations = submission.violations;
  const std::vector<FieldViolation> of_output = CheckGivenOutputDir(submission, call.caller());
  violations.insert(violations.end(), of_output.begin(), of_output.end());
  if (!violations.empty()) {
    for (FieldViolation& violation : violations) {
      const auto line = submission.lines.find(violation.field);
      if (violation.line == 0 && line != submission.lines.end()) violation.line = line->second;
    }
    return call.Finish(BadRequestError(violations, request->file_name().empty() ? "job.yaml" : request->file_name()));
  }
  call.LimitTime();
  if (request->validate_only()) {
    *response->mutable_job() = submission.job;
    response->mutable_job()->set_config_yaml(JobConfigToYaml(submission.config));
    response->mutable_notes()->Add(submission.notes.begin(), submission.notes.end());
    const std::string& output_dir = submission.config.output_dir;
    parts_.controller.Check(submission.job, std::filesystem::path(output_dir).is_absolute() ? output_dir : "",
                            [call](const absl::Status& status) {
                              if (call.Claim()) call.Finish(status);
                            });
    return call.reactor();
  }
  parts_.controller.Submit(std::move(submission), request->request_id(),
                           [call, response](absl::StatusOr<v1::SubmitJobResponse> result) {
                             const std::string id = result.ok() ? result->job().id() : "";
                             if (!call.Claim()) return call.Note(result.status(), id);
                             if (result.ok()) response->Swap(&*result);
                             call.Finish(result.status(), id);
                           });
  return call.reactor();
}

// A call that changes a job that its caller may change. `change(id, done)` begins the change.
template <typename Request, typename Response, typename Change>
grpc::ServerUnaryReactor* TrainingService::ChangeJob(grpc::CallbackServerContext* context, const char* method,
                                                     const Request* request, Response* response, Change change) {
  const UnaryCall call(context, parts_, method, request->job_id());
  if (!call.admitted()) return call.Refuse();
  const absl::StatusOr<JobViews::View> view = parts_.views.Find(request->job_id());
  if (!view.ok()) return call.Finish(view.status(), request->job_id());
  const std::string id = (*view)->job.id();
  if (absl::Status status = Guard::CheckMayChange(call.caller(), (*view)->job); !status.ok()) {
    return call.Finish(status, id);
  }
  call.LimitTime();
  change(id, AnswerLater(call, response, id));
  return call.reactor();
}

grpc::ServerUnaryReactor* TrainingService::CancelJob(grpc::CallbackServerContext* context,
                                                     const v1::CancelJobRequest* request,
                                                     v1::CancelJobResponse* response) {
  return ChangeJob(
      context, "CancelJob", request, response,
      [&](const std::string& id, const Dispatcher::CancelDone& done) { parts_.controller.Cancel(id, done); });
}

grpc::ServerUnaryReactor* TrainingService::SetPriority(grpc::CallbackServerContext* context,
                                                       const v1::SetPriorityRequest* request,
                                                       v1::SetPriorityResponse* response) {
  return ChangeJob(context, "SetPriority", request, response,
                   [&](const std::string& id, const Dispatcher::PriorityDone& done) {
                     parts_.controller.SetPriority(id, request->priority(), done);
                   });
}

grpc::ServerUnaryReactor* TrainingService::CheckpointJob(grpc::CallbackServerContext* context,
                                                         const v1::CheckpointJobRequest* request,
                                                         v1::CheckpointJobResponse* response) {
  return ChangeJob(
      context, "CheckpointJob", request, response,
      [&](const std::string& id, const Dispatcher::CheckpointDone& done) { parts_.controller.Checkpoint(id, done); });
}

grpc::ServerUnaryReactor* TrainingService::DrainNode(grpc::CallbackServerContext* context,
                                                     const v1::DrainNodeRequest* request,
                                                     v1::DrainNodeResponse* response) {
  const UnaryCall call(context, parts_, "DrainNode", request->node());
  if (!call.admitted()) return call.Refuse();
  if (request->reason().size() > kMaxReasonBytes) {
    return call.Finish(BadFieldsError(
        {{"reason", 0, absl::StrCat("it has ", request->reason().size(), " bytes; at most ", kMaxReasonBytes)}}));
  }
  call.LimitTime();
  const std::string who = call.caller().user.empty() ? "" : absl::StrCat(" by ", call.caller().user);
  parts_.controller.SetDrained(request->node(),
                               request->reason().empty() ? absl::StrCat("drained", who) : request->reason(),
                               request->keep_running(), AnswerLater(call, response->mutable_node(), request->node()));
  return call.reactor();
}

grpc::ServerUnaryReactor* TrainingService::UndrainNode(grpc::CallbackServerContext* context,
                                                       const v1::UndrainNodeRequest* request,
                                                       v1::UndrainNodeResponse* response) {
  const UnaryCall call(context, parts_, "UndrainNode", request->node());
  if (!call.admitted()) return call.Refuse();
  call.LimitTime();
  parts_.controller.SetDrained(request->node(), /*reason=*/"", /*keep_running=*/true,
                               AnswerLater(call, response->mutable_node(), request->node()));
  return call.reactor();
}

grpc::ServerUnaryReactor* TrainingService::ListNodes(grpc::CallbackServerContext* context,
                                                     const v1::ListNodesRequest* request,
                                                     v1::ListNodesResponse* response) {
  const UnaryCall call(context, parts_, "ListNodes");
  if (!call.admitted()) return call.Refuse();
  call.LimitTime();
  parts_.controller.ListNodes(*request, AnswerLater(call, response));
  return call.reactor();
}

absl::Status TrainingService::GetJobNow(const v1::GetJobRequest& request, v1::GetJobResponse* response) {
  SIMPO_ASSIGN_OR_RETURN(const JobViews::View view, parts_.views.Find(request.job_id()));
  SIMPO_ASSIGN_OR_RETURN(std::vector<v1::JobEvent> events, parts_.jobs.LastEvents(view->sequence, kEventsShown));
  SIMPO_ASSIGN_OR_RETURN(std::string yaml, parts_.jobs.ConfigYaml(view->sequence));
  *response->mutable_job() = view->job;
  response->mutable_job()->set_config_yaml(std::move(yaml));
  for (const v1::Attempt& attempt : view->attempts) *response->add_attempts() = attempt;
  for (const v1::RankState& rank : view->ranks) *response->add_ranks() = rank;
  for (v1::JobEvent& event : events) {
    if (event.type() == "advice") response->add_advice(event.message());
    response->add_events()->Swap(&event);
  }
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* TrainingService::GetJob(grpc::CallbackServerContext* context,
                                                  const v1::GetJobRequest* request, v1::GetJobResponse* response) {
  const UnaryCall call(context, parts_, "GetJob", request->job_id());
  if (!call.admitted()) return call.Refuse();
  return call.Finish(GetJobNow(*request, response));
}

absl::Status TrainingService::ListJobsNow(const v1::ListJobsRequest& request, v1::ListJobsResponse* response) {
  std::vector<FieldViolation> violations;
  CheckPageSize(request.page_size(), kMaxJobs, &violations);
  const int size = request.page_size() == 0 ? kDefaultJobs : request.page_size();
  int64_t before = 0;  // sequence of the last job of the page before
  if (!request.page_token().empty() && (!absl::SimpleAtoi(request.page_token(), &before) || before < 1)) {
    violations.push_back({"page_token", 0, "it is not one that ListJobs has given"});
  }
  if (!violations.empty()) return BadFieldsError(violations);
  const std::vector<JobViews::View> all = parts_.views.All();
  for (auto view = all.rbegin(); view != all.rend(); ++view) {
    if ((before != 0 && (*view)->sequence >= before) || !Matches(request, (*view)->job)) continue;
    if (response->jobs_size() == size) {
      response->set_next_page_token(absl::StrCat(before));
      return absl::OkStatus();
    }
    *response->add_jobs() = (*view)->job;
    before = (*view)->sequence;
  }
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* TrainingService::ListJobs(grpc::CallbackServerContext* context,
                                                    const v1::ListJobsRequest* request,
                                                    v1::ListJobsResponse* response) {
  const UnaryCall call(context, parts_, "ListJobs");
  if (!call.admitted()) return call.Refuse();
  return call.Finish(ListJobsNow(*request, response));
}

absl::Status TrainingService::ListMetricsNow(const v1::ListMetricsRequest& request, v1::ListMetricsResponse* response) {
  std::vector<FieldViolation> violations;
  CheckPageSize(request.page_size(), kMaxPoints, &violations);
  const int size = request.page_size() == 0 ? kDefaultPoints : request.page_size();
  const std::string split = request.split().empty() ? "train" : request.split();
  if (split != "train" && split != "eval") {
    violations.push_back({"split", 0, absl::StrCat("it is '", split, "'; it must be train or eval")});
  }
  if (!violations.empty()) return BadFieldsError(violations);
  SIMPO_ASSIGN_OR_RETURN(const JobViews::View view, parts_.views.Find(request.job_id()));
  // One more than asked for tells whether there are more.
  SIMPO_ASSIGN_OR_RETURN(std::vector<v1::MetricPoint> points,
                         parts_.metrics.ListPoints(view->sequence, split, request.after_step(), size + 1));
  response->set_more(points.size() > static_cast<size_t>(size));
  if (response->more()) points.pop_back();
  for (v1::MetricPoint& point : points) response->add_points()->Swap(&point);
  SIMPO_ASSIGN_OR_RETURN(const auto thinned, parts_.metrics.FindThinned(view->sequence, split));
  if (thinned) {
    response->set_kept_every(thinned->every);
    *response->mutable_thinned_time() = ToTimestamp(thinned->time_ms);
  }
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* TrainingService::ListMetrics(grpc::CallbackServerContext* context,
                                                       const v1::ListMetricsRequest* request,
                                                       v1::ListMetricsResponse* response) {
  const UnaryCall call(context, parts_, "ListMetrics", request->job_id());
  if (!call.admitted()) return call.Refuse();
  return call.Finish(ListMetricsNow(*request, response));
}

grpc::ServerUnaryReactor* TrainingService::GetServerInfo(grpc::CallbackServerContext* context,
                                                         const v1::GetServerInfoRequest* /*request*/,
                                                         v1::GetServerInfoResponse* response) {
  const UnaryCall call(context, parts_, "GetServerInfo");
  if (!call.admitted()) return call.Refuse();
  const ServerFacts& facts = parts_.facts;
  response->set_version(facts.version);
  *response->mutable_start_time() = ToTimestamp(facts.start_ms);
  response->set_data_dir(facts.data_dir);
  response->set_http_address(facts.http_address);
  response->set_hostname(facts.hostname);
  response->set_slots_total(facts.slots_total);
  response->set_slots_free(std::max(0, facts.slots_total - SlotsTaken(parts_.views)));
  return call.Finish(absl::OkStatus());
}

absl::StatusOr<std::shared_ptr<void>> TrainingService::OpenStream(const char* method,
                                                                  const grpc::CallbackServerContext& context,
                                                                  const std::string& job) {
  SIMPO_ASSIGN_OR_RETURN(const Caller caller, parts_.guard.Admit(method, context, job));
  return parts_.guard.OpenStream(method, caller, job);
}

grpc::ServerWriteReactor<v1::WatchJobResponse>* TrainingService::WatchJob(grpc::CallbackServerContext* context,
                                                                          const v1::WatchJobRequest* request) {
  const absl::StatusOr<std::shared_ptr<void>> place =
      OpenStream("TrainingService/WatchJob", *context, request->job_id());
  if (!place.ok()) return new EndedStream<v1::WatchJobResponse>(place.status());
  const absl::StatusOr<JobViews::View> view = parts_.views.Find(request->job_id());
  if (!view.ok()) return new EndedStream<v1::WatchJobResponse>(view.status());
  const auto stream = std::make_shared<WatchStream>(parts_.pump, parts_.views, parts_.jobs, parts_.metrics,
                                                    (*view)->job.id(), std::max<int64_t>(0, request->after_sequence()));
  stream->Begin(context, *place);
  return stream.get();
}

grpc::ServerWriteReactor<v1::StreamLogsResponse>* TrainingService::StreamLogs(grpc::CallbackServerContext* context,
                                                                              const v1::StreamLogsRequest* request) {
  const absl::StatusOr<std::shared_ptr<void>> place =
      OpenStream("TrainingService/StreamLogs", *context, request->job_id());
  if (!place.ok()) return new EndedStream<v1::StreamLogsResponse>(place.status());
  const absl::StatusOr<JobViews::View> view = parts_.views.Find(request->job_id());
  if (!view.ok()) return new EndedStream<v1::StreamLogsResponse>(view.status());
  const absl::Status status = LogStream::Check(*request, **view);
  if (!status.ok()) return new EndedStream<v1::StreamLogsResponse>(status);
  const auto stream = std::make_shared<LogStream>(parts_.pump, parts_.views, (*view)->job.id(), *request);
  stream->Begin(context, *place);
  return stream.get();
}

}  // namespace simpo
