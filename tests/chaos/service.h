// The coordinator as its clients find it: one that is there now, or nothing; calls that may end without an answer.
#ifndef SIMPO_TESTS_CHAOS_SERVICE_H_
#define SIMPO_TESTS_CHAOS_SERVICE_H_

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "job_history.h"
#include "simpo/v1/training_service.grpc.pb.h"

namespace simpo {

// Where the coordinator is now. Thread-safe.
class Service {
 public:
  using Stub = std::shared_ptr<v1::TrainingService::Stub>;

  void Appear(const std::string& address) {
    const std::lock_guard lock(mutex_);
    grpc::ChannelArguments arguments;
    arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
    stub_ =
        v1::TrainingService::NewStub(grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments));
    changed_.notify_all();
  }
  void Vanish() {
    const std::lock_guard lock(mutex_);
    stub_ = nullptr;
  }
  // Nothing: there was none within that time.
  Stub Wait(std::chrono::milliseconds time) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, time, [&] { return stub_ != nullptr; });
    return stub_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  Stub stub_;  // guarded by mutex_
};

inline std::unique_ptr<grpc::ClientContext> Context(std::chrono::seconds deadline = std::chrono::seconds(60)) {
  auto context = std::make_unique<grpc::ClientContext>();
  context->set_deadline(std::chrono::system_clock::now() + deadline);
  return context;
}

// The coordinator has gone before it answered: the call has happened or not.
inline bool NoAnswer(const grpc::Status& status) {
  return status.error_code() == grpc::StatusCode::UNAVAILABLE || status.error_code() == grpc::StatusCode::CANCELLED;
}

// Nothing: there was no answer. Newest first; at least `at_least` of them, all when it is 0.
inline std::optional<std::vector<v1::Job>> ListJobs(v1::TrainingService::Stub& stub, size_t at_least,
                                                    grpc::Status* status) {
  std::vector<v1::Job> jobs;
  v1::ListJobsRequest request;
  request.set_page_size(500);
  do {
    v1::ListJobsResponse response;
    *status = stub.ListJobs(Context().get(), request, &response);
    if (!status->ok()) return std::nullopt;
    jobs.insert(jobs.end(), response.jobs().begin(), response.jobs().end());
    request.set_page_token(response.next_page_token());
  } while (!request.page_token().empty() && (at_least == 0 || jobs.size() < at_least));
  return jobs;
}

inline grpc::Status ListPoints(v1::TrainingService::Stub& stub, const std::string& id,
                               std::vector<v1::MetricPoint>* points) {
  v1::ListMetricsRequest request;
  request.set_job_id(id);
  v1::ListMetricsResponse response;
  do {
    const grpc::Status status = stub.ListMetrics(Context().get(), request, &response);
    if (!status.ok()) return status;
    points->insert(points->end(), response.points().begin(), response.points().end());
    if (!points->empty()) request.set_after_step(points->back().step());
  } while (response.more());
  return grpc::Status::OK;
}

}  // namespace simpo

#endif  // SIMPO_TESTS_CHAOS_SERVICE_H_
