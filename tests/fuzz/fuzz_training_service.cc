// Any calls of users, in any order and with any bytes: see fuzz_services.h.
#include <cstdio>
#include <cstdlib>

#include "simpo/v1/training_service.pb.h"
#include "tests/fuzz/fuzz_services.h"

namespace simpo {

#define SIMPO_METHOD(kind, name)                                                                        \
  FuzzMethod {                                                                                          \
    FuzzMethod::Kind::kind, "/simpo.v1.TrainingService/" #name, &v1::name##Request::default_instance(), \
        &v1::name##Response::default_instance()                                                         \
  }

const std::vector<FuzzMethod>& FuzzMethods() {
  static const std::vector<FuzzMethod> methods = {
      SIMPO_METHOD(kUnary, SubmitJob),         SIMPO_METHOD(kUnary, GetJob),
      SIMPO_METHOD(kUnary, ListJobs),          SIMPO_METHOD(kUnary, CancelJob),
      SIMPO_METHOD(kUnary, SetPriority),       SIMPO_METHOD(kServerStream, WatchJob),
      SIMPO_METHOD(kServerStream, StreamLogs), SIMPO_METHOD(kUnary, ListMetrics),
      SIMPO_METHOD(kUnary, ListNodes),         SIMPO_METHOD(kUnary, GetServerInfo),
      SIMPO_METHOD(kUnary, CheckpointJob),     SIMPO_METHOD(kUnary, DrainNode),
      SIMPO_METHOD(kUnary, UndrainNode),       {.kind = FuzzMethod::Kind::kEndGang},
      {.kind = FuzzMethod::Kind::kLoseGang}};
  constexpr int kNoMethods = 2;  // the last ones
  const int there_are = v1::SubmitJobRequest::descriptor()->file()->service(0)->method_count();
  if (static_cast<int>(methods.size()) != there_are + kNoMethods) {
    std::fprintf(stderr, "a method of TrainingService is missing in this list\n");
    std::abort();
  }
  return methods;
}

}  // namespace simpo
