// Anything that ranks, and those who would like to be one, may say in any order: see fuzz_services.h.
#include "simpo/v1/training_service.pb.h"
#include "simpo/v1/worker_service.pb.h"
#include "tests/fuzz/fuzz_services.h"

namespace simpo {

const std::vector<FuzzMethod>& FuzzMethods() {
  using Kind = FuzzMethod::Kind;
  const auto& up = v1::AttachRequest::default_instance();
  const auto& down = v1::AttachResponse::default_instance();
  static constexpr char kAttach[] = "/simpo.v1.WorkerService/Attach";
  static const std::vector<FuzzMethod> methods = {
      {Kind::kOpen, kAttach, &up, &down},
      {Kind::kSay, kAttach, &up, &down},
      {Kind::kSay, kAttach, &up, &down},
      {Kind::kSay, kAttach, &up, &down},
      {Kind::kClose, kAttach, nullptr, &down},
      {Kind::kRegister, "/simpo.v1.WorkerService/Register", &v1::RegisterRequest::default_instance(),
       &v1::RegisterResponse::default_instance()},
      {Kind::kUnary, "/simpo.v1.TrainingService/SubmitJob", &v1::SubmitJobRequest::default_instance(),
       &v1::SubmitJobResponse::default_instance()},
      {Kind::kUnary, "/simpo.v1.TrainingService/GetJob", &v1::GetJobRequest::default_instance(),
       &v1::GetJobResponse::default_instance()},
      {Kind::kUnary, "/simpo.v1.TrainingService/ListMetrics", &v1::ListMetricsRequest::default_instance(),
       &v1::ListMetricsResponse::default_instance()},
      {Kind::kUnary, "/simpo.v1.TrainingService/CancelJob", &v1::CancelJobRequest::default_instance(),
       &v1::CancelJobResponse::default_instance()},
      {.kind = Kind::kEndGang},
      {.kind = Kind::kLoseGang},
      {.kind = Kind::kRest}};
  return methods;
}

}  // namespace simpo
