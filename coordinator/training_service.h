#ifndef SIMPO_COORDINATOR_TRAINING_SERVICE_H_
#define SIMPO_COORDINATOR_TRAINING_SERVICE_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "coordinator/allowed_roots.h"
#include "coordinator/controller.h"
#include "coordinator/guard.h"
#include "coordinator/job_store.h"
#include "coordinator/job_views.h"
#include "coordinator/metric_store.h"
#include "coordinator/rpc_stats.h"
#include "coordinator/stream_pump.h"
#include "simpo/v1/training_service.grpc.pb.h"

namespace simpo {

// What does not change while a coordinator runs.
struct ServerFacts {
  std::string version;
  int64_t start_ms = 0;  // Unix time
  std::string data_dir;
  std::string http_address;
  std::string hostname;
  int slots_total = 1;
};

// Slots of the jobs that hold a gang.
int SlotsTaken(const JobViews& views);

// The users' RPCs: they check and translate; the controller decides, and pictures and stores answer.
class TrainingService final : public v1::TrainingService::CallbackService {
 public:
  struct Parts {  // all outlive the service
    Controller& controller;
    const JobViews& views;
    JobStore& jobs;
    MetricStore& metrics;
    StreamPump& pump;
    RpcStats& rpc_stats;
    const ServerFacts& facts;
    Guard& guard;
    const AllowedRoots& roots;
    std::chrono::milliseconds longest_call = std::chrono::minutes(1);  // when the disk hangs, no call hangs with it
  };
  explicit TrainingService(Parts parts) : parts_(parts) {}

  grpc::ServerUnaryReactor* SubmitJob(grpc::CallbackServerContext* context, const v1::SubmitJobRequest* request,
                                      v1::SubmitJobResponse* response) override;
  grpc::ServerUnaryReactor* GetJob(grpc::CallbackServerContext* context, const v1::GetJobRequest* request,
                                   v1::GetJobResponse* response) override;
  grpc::ServerUnaryReactor* ListJobs(grpc::CallbackServerContext* context, const v1::ListJobsRequest* request,
                                     v1::ListJobsResponse* response) override;
  grpc::ServerUnaryReactor* CancelJob(grpc::CallbackServerContext* context, const v1::CancelJobRequest* request,
                                      v1::CancelJobResponse* response) override;
  grpc::ServerUnaryReactor* SetPriority(grpc::CallbackServerContext* context, const v1::SetPriorityRequest* request,
                                        v1::SetPriorityResponse* response) override;
  grpc::ServerUnaryReactor* CheckpointJob(grpc::CallbackServerContext* context, const v1::CheckpointJobRequest* request,
                                          v1::CheckpointJobResponse* response) override;
  grpc::ServerUnaryReactor* DrainNode(grpc::CallbackServerContext* context, const v1::DrainNodeRequest* request,
                                      v1::DrainNodeResponse* response) override;
  grpc::ServerUnaryReactor* UndrainNode(grpc::CallbackServerContext* context, const v1::UndrainNodeRequest* request,
                                        v1::UndrainNodeResponse* response) override;
  grpc::ServerUnaryReactor* ListNodes(grpc::CallbackServerContext* context, const v1::ListNodesRequest* request,
                                      v1::ListNodesResponse* response) override;
  grpc::ServerUnaryReactor* ListMetrics(grpc::CallbackServerContext* context, const v1::ListMetricsRequest* request,
                                        v1::ListMetricsResponse* response) override;
  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context, const v1::GetServerInfoRequest* request,
                                          v1::GetServerInfoResponse* response) override;
  grpc::ServerWriteReactor<v1::WatchJobResponse>* WatchJob(grpc::CallbackServerContext* context,
                                                           const v1::WatchJobRequest* request) override;
  grpc::ServerWriteReactor<v1::StreamLogsResponse>* StreamLogs(grpc::CallbackServerContext* context,
                                                               const v1::StreamLogsRequest* request) override;

 private:
  // Admits the caller of a stream, and counts it while what is returned lives.
  absl::StatusOr<std::shared_ptr<void>> OpenStream(const char* method, const grpc::CallbackServerContext& context,
                                                   const std::string& job);
  template <typename Request, typename Response, typename Change>
  grpc::ServerUnaryReactor* ChangeJob(grpc::CallbackServerContext* context, const char* method, const Request* request,
                                      Response* response, Change change);
  // Whether the folder is another user's, or holds what is not to be overwritten.
  std::vector<FieldViolation> CheckGivenOutputDir(const Submission& submission, const Caller& caller) const;
  absl::Status GetJobNow(const v1::GetJobRequest& request, v1::GetJobResponse* response);
  absl::Status ListJobsNow(const v1::ListJobsRequest& request, v1::ListJobsResponse* response);
  absl::Status ListMetricsNow(const v1::ListMetricsRequest& request, v1::ListMetricsResponse* response);

  const Parts parts_;
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_TRAINING_SERVICE_H_
