#ifndef SIMPO_TESTS_SIMPOCTL_FAKE_SERVICE_H_
#define SIMPO_TESTS_SIMPOCTL_FAKE_SERVICE_H_

#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <functional>
#include <memory>
#include <mutex>
#include <string>

#include "simpo/v1/training_service.grpc.pb.h"

namespace simpo {

// A coordinator that answers as a test says, on a free port of this machine.
class FakeService final : public v1::TrainingService::Service {
 public:
  FakeService() {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    EXPECT_NE(port, 0);
    address_ = "127.0.0.1:" + std::to_string(port);
  }
  ~FakeService() override {
    server_->Shutdown(std::chrono::system_clock::now());
    Settle();
  }

  // Asked for after the handlers are set: a call that comes by it sees them.
  const std::string& address() const {
    Settle();
    return address_;
  }
  // After a call has ended: what its handler did is there to be read, and the handlers below may be changed. (The
  // answer says so too, but gRPC is not built with the thread sanitizer, which cannot see that.)
  void Settle() const { const std::lock_guard lock(mutex_); }

  std::function<void(const grpc::ServerContext&)> on_call = [](const grpc::ServerContext&) {};
  std::function<grpc::Status(const v1::SubmitJobRequest&, v1::SubmitJobResponse*)> on_submit;
  std::function<grpc::Status(const v1::GetJobRequest&, v1::GetJobResponse*)> on_get;
  std::function<grpc::Status(const v1::ListJobsRequest&, v1::ListJobsResponse*)> on_list;
  std::function<grpc::Status(const v1::CancelJobRequest&, v1::CancelJobResponse*)> on_cancel;
  std::function<grpc::Status(const v1::CheckpointJobRequest&, v1::CheckpointJobResponse*)> on_checkpoint;
  std::function<grpc::Status(grpc::ServerContext*, const v1::WatchJobRequest&,
                             grpc::ServerWriter<v1::WatchJobResponse>*)>
      on_watch;

 private:
  struct Handler {
    explicit Handler(const FakeService& service) : service(service) { service.Settle(); }
    ~Handler() { service.Settle(); }
    const FakeService& service;
  };

  grpc::Status SubmitJob(grpc::ServerContext*, const v1::SubmitJobRequest* request,
                         v1::SubmitJobResponse* response) override {
    const Handler handler(*this);
    return on_submit(*request, response);
  }
  grpc::Status GetJob(grpc::ServerContext* context, const v1::GetJobRequest* request,
                      v1::GetJobResponse* response) override {
    const Handler handler(*this);
    on_call(*context);
    return on_get(*request, response);
  }
  grpc::Status ListJobs(grpc::ServerContext*, const v1::ListJobsRequest* request,
                        v1::ListJobsResponse* response) override {
    const Handler handler(*this);
    return on_list(*request, response);
  }
  grpc::Status CancelJob(grpc::ServerContext*, const v1::CancelJobRequest* request,
                         v1::CancelJobResponse* response) override {
    const Handler handler(*this);
    return on_cancel(*request, response);
  }
  grpc::Status CheckpointJob(grpc::ServerContext*, const v1::CheckpointJobRequest* request,
                             v1::CheckpointJobResponse* response) override {
    const Handler handler(*this);
    return on_checkpoint(*request, response);
  }
  grpc::Status WatchJob(grpc::ServerContext* context, const v1::WatchJobRequest* request,
                        grpc::ServerWriter<v1::WatchJobResponse>* writer) override {
    const Handler handler(*this);
    on_call(*context);
    return on_watch(context, *request, writer);
  }

  mutable std::mutex mutex_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
};

}  // namespace simpo

#endif  // SIMPO_TESTS_SIMPOCTL_FAKE_SERVICE_H_
