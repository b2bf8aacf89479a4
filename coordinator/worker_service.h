#ifndef SIMPO_COORDINATOR_WORKER_SERVICE_H_
#define SIMPO_COORDINATOR_WORKER_SERVICE_H_

#include <chrono>

#include "coordinator/controller.h"
#include "coordinator/job_views.h"
#include "coordinator/rendezvous.h"
#include "simpo/v1/worker_service.grpc.pb.h"

namespace simpo {

// The ranks' RPCs: checks who is there and passes on what is said.
class WorkerService final : public v1::WorkerService::CallbackService {
 public:
  // Both outlive this object.
  // A stream that does not say whose it is within `hello_time` ends.
  WorkerService(Controller& controller, const JobViews& views,
                std::chrono::milliseconds hello_time = std::chrono::seconds(10))
      : controller_(controller), views_(views), hello_time_(hello_time) {}

  grpc::ServerBidiReactor<v1::AttachRequest, v1::AttachResponse>* Attach(grpc::CallbackServerContext* context) override;
  grpc::ServerUnaryReactor* Register(grpc::CallbackServerContext* context, const v1::RegisterRequest* request,
                                     v1::RegisterResponse* response) override;

 private:
  Controller& controller_;
  const JobViews& views_;
  const std::chrono::milliseconds hello_time_;
  Rendezvous rendezvous_;
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_WORKER_SERVICE_H_
