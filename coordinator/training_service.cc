#include "coordinator/training_service.h"

#include <algorithm>
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

// One unary call: answers it and notes how long it took.
class UnaryCall {
 public:
  UnaryCall(grpc::CallbackServerContext* context, RpcStats& stats, std::string method)
      : reactor_(context->DefaultReactor()), stats_(stats), method_(std::move(method)) {}

  grpc::ServerUnaryReactor* reactor() const { return reactor_; }
  // Once. May be called by another thread, after the method has returned.
  grpc::ServerUnaryReactor* Finish(const absl::Status& status) const {
    const auto time = std::chrono::steady_clock::now() - begin_;
    stats_.Add(method_, status.code(), std::chrono::duration<double>(time).count());
    reactor_->Finish(ToGrpcStatus(status));
    return reactor_;
  }

 private:
  grpc::ServerUnaryReactor* reactor_;
  RpcStats& stats_;
  std::string method_;
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

// A stream that ends at once.
template <typename Response>
class EndedStream final : public grpc::ServerWriteReactor<Response> {
 public:
  explicit EndedStream(const absl::Status& status) { this->Finish(ToGrpcStatus(status)); }
  void OnDone() override { delete this; }
};

absl::Status CheckPageSize(int size, int max) {
  if (size >= 0 && size <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("page_size is ", size, "; it must be 1 to ", max));
}

// Only what the other machine's eyes can check; the rest of the folder is the server's to choose.
std::vector<FieldViolation> CheckGivenOutputDir(const JobConfig& config) {
  if (!std::filesystem::path(config.output_dir).is_absolute()) return {};
  return CheckOutputDir(config, config.output_dir);
}

// The answer to a request_id that is known already.
absl::Status AnswerAgain(const JobView& view, const v1::SubmitJobRequest& request, v1::SubmitJobResponse* response) {
  if (view.request_digest != RequestDigest(request)) {
    return WithReason(absl::AlreadyExistsError(absl::StrCat("request_id '", request.request_id(),
                                                            "' was used for another request, which became job ",
                                                            view.job.id(), "; use a new request_id")),
                      "REQUEST_ID_REUSED");
  }
  *response->mutable_job() = view.job;
  response->mutable_job()->set_config_yaml(*view.config_yaml);
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
  const UnaryCall call(context, parts_.rpc_stats, "SubmitJob");
  if (!request->request_id().empty() && !request->validate_only()) {
    // Before anything is checked: by now the job's own output may lie in its folder.
    if (const JobViews::View known = parts_.views.FindByRequestId(request->request_id())) {
      return call.Finish(AnswerAgain(*known, *request, response));
    }
  }
  Submission submission = CheckSubmission(*request, parts_.facts.slots_total);
  std::vector<FieldViolation>& violations = submission.violations;
  const std::vector<FieldViolation> of_output = CheckGivenOutputDir(submission.config);
  violations.insert(violations.end(), of_output.begin(), of_output.end());
  if (!violations.empty()) {
    return call.Finish(BadRequestError(violations, request->file_name().empty() ? "job.yaml" : request->file_name()));
  }
  if (request->validate_only()) {
    *response->mutable_job() = submission.job;
    response->mutable_job()->set_config_yaml(JobConfigToYaml(submission.config));
    response->mutable_notes()->Add(submission.notes.begin(), submission.notes.end());
    return call.Finish(absl::OkStatus());
  }
  parts_.controller.Submit(std::move(submission), request->request_id(),
                           [call, response](absl::StatusOr<v1::SubmitJobResponse> result) {
                             if (result.ok()) response->Swap(&*result);
                             call.Finish(result.status());
                           });
  return call.reactor();
}

grpc::ServerUnaryReactor* TrainingService::CancelJob(grpc::CallbackServerContext* context,
                                                     const v1::CancelJobRequest* request,
                                                     v1::CancelJobResponse* response) {
  const UnaryCall call(context, parts_.rpc_stats, "CancelJob");
  const absl::StatusOr<JobViews::View> view = parts_.views.Find(request->job_id());
  if (!view.ok()) return call.Finish(view.status());
  parts_.controller.Cancel((*view)->job.id(), [call, response](absl::StatusOr<v1::CancelJobResponse> result) {
    if (result.ok()) response->Swap(&*result);
    call.Finish(result.status());
  });
  return call.reactor();
}

absl::Status TrainingService::GetJobNow(const v1::GetJobRequest& request, v1::GetJobResponse* response) {
  SIMPO_ASSIGN_OR_RETURN(const JobViews::View view, parts_.views.Find(request.job_id()));
  SIMPO_ASSIGN_OR_RETURN(std::vector<v1::JobEvent> events, parts_.jobs.LastEvents(view->sequence, kEventsShown));
  *response->mutable_job() = view->job;
  response->mutable_job()->set_config_yaml(*view->config_yaml);
  for (const v1::Attempt& attempt : view->attempts) *response->add_attempts() = attempt;
  for (v1::JobEvent& event : events) {
    if (event.type() == "advice") response->add_advice(event.message());
    response->add_events()->Swap(&event);
  }
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* TrainingService::GetJob(grpc::CallbackServerContext* context,
                                                  const v1::GetJobRequest* request, v1::GetJobResponse* response) {
  const UnaryCall call(context, parts_.rpc_stats, "GetJob");
  return call.Finish(GetJobNow(*request, response));
}

absl::Status TrainingService::ListJobsNow(const v1::ListJobsRequest& request, v1::ListJobsResponse* response) {
  SIMPO_RETURN_IF_ERROR(CheckPageSize(request.page_size(), kMaxJobs));
  const int size = request.page_size() == 0 ? kDefaultJobs : request.page_size();
  int64_t before = 0;  // sequence of the last job of the page before
  if (!request.page_token().empty() && (!absl::SimpleAtoi(request.page_token(), &before) || before < 1)) {
    return absl::InvalidArgumentError("page_token is not one that ListJobs has given");
  }
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
  const UnaryCall call(context, parts_.rpc_stats, "ListJobs");
  return call.Finish(ListJobsNow(*request, response));
}

absl::Status TrainingService::ListMetricsNow(const v1::ListMetricsRequest& request, v1::ListMetricsResponse* response) {
  SIMPO_RETURN_IF_ERROR(CheckPageSize(request.page_size(), kMaxPoints));
  const int size = request.page_size() == 0 ? kDefaultPoints : request.page_size();
  const std::string split = request.split().empty() ? "train" : request.split();
  if (split != "train" && split != "eval") {
    return absl::InvalidArgumentError(absl::StrCat("split is '", split, "'; it must be train or eval"));
  }
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
  const UnaryCall call(context, parts_.rpc_stats, "ListMetrics");
  return call.Finish(ListMetricsNow(*request, response));
}

grpc::ServerUnaryReactor* TrainingService::GetServerInfo(grpc::CallbackServerContext* context,
                                                         const v1::GetServerInfoRequest* request,
                                                         v1::GetServerInfoResponse* response) {
  const UnaryCall call(context, parts_.rpc_stats, "GetServerInfo");
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

grpc::ServerWriteReactor<v1::WatchJobResponse>* TrainingService::WatchJob(grpc::CallbackServerContext* context,
                                                                          const v1::WatchJobRequest* request) {
  const absl::StatusOr<JobViews::View> view = parts_.views.Find(request->job_id());
  if (!view.ok()) return new EndedStream<v1::WatchJobResponse>(view.status());
  const auto stream = std::make_shared<WatchStream>(parts_.pump, parts_.views, parts_.jobs, parts_.metrics,
                                                    (*view)->job.id(), std::max<int64_t>(0, request->after_sequence()));
  stream->Begin();
  return stream.get();
}

grpc::ServerWriteReactor<v1::StreamLogsResponse>* TrainingService::StreamLogs(grpc::CallbackServerContext* context,
                                                                              const v1::StreamLogsRequest* request) {
  const absl::StatusOr<JobViews::View> view = parts_.views.Find(request->job_id());
  if (!view.ok()) return new EndedStream<v1::StreamLogsResponse>(view.status());
  const absl::Status status = LogStream::Check(*request, **view);
  if (!status.ok()) return new EndedStream<v1::StreamLogsResponse>(status);
  const auto stream = std::make_shared<LogStream>(parts_.pump, parts_.views, (*view)->job.id(), *request);
  stream->Begin();
  return stream.get();
}

}  // namespace simpo
