// Anything that ranks, and those who would like to be one, may say in any order: see fuzz_services.h.
#include "simpo/v1/training_service.pb.h"
#include "simpo/v1/worker_service.pb.h"
#include "tests/fuzz/fuzz_services.h"

namespace simpo {
namespace {

const std::vector<FuzzMethod>& Methods() {
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

}  // namespace
}  // namespace simpo

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  simpo::RunCalls(simpo::Methods(), data, size);
  return 0;
}

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size, unsigned int seed) {
  return simpo::MutateCalls(simpo::Methods(), data, size, max_size, seed);
}
