#include "worker/register_rank.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <thread>

#include "absl/strings/str_cat.h"
#include "common/status_macros.h"
#include "simpo/v1/worker_service.grpc.pb.h"
#include "worker/coordinator_channel.h"

namespace simpo {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kRetryPause{500};
constexpr milliseconds kAnswerTime{5'000};  // beyond the rank's patience, for the coordinator to say who is missing

}  // namespace

absl::StatusOr<std::string> RegisterRank(const CoordinatorClient::Options& options, const std::string& of_rank_0,
                                         milliseconds timeout) {
  const auto deadline = Clock::now() + timeout;
  while (true) {
    const auto left = std::chrono::duration_cast<milliseconds>(deadline - Clock::now());
    v1::RegisterRequest request;
    CoordinatorClient::FillHello(options, request.mutable_hello());
    request.set_nccl_id(of_rank_0);
    request.set_timeout_ms(static_cast<int32_t>(std::max<int64_t>(left.count(), 1)));
    grpc::ClientContext context;
    context.AddMetadata("simpo-attempt-secret", options.secret);
    context.set_deadline(std::chrono::system_clock::now() + left + kAnswerTime);
    v1::RegisterResponse response;
    std::string address;
    SIMPO_ASSIGN_OR_RETURN(const std::shared_ptr<grpc::Channel> channel, ConnectToCoordinator(options, &address));
    const grpc::Status status = v1::WorkerService::NewStub(channel)->Register(&context, request, &response);
    if (status.ok()) return response.nccl_id();
    if (status.error_code() != grpc::StatusCode::UNAVAILABLE) {
      return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
    }
    if (Clock::now() + kRetryPause > deadline) {
      return absl::UnavailableError(absl::StrCat("rank ", options.rank, " has not met the gang at the coordinator ",
                                                 address, " within ", timeout.count() / 1000.0,
                                                 " s: ", status.error_message()));
    }
    std::this_thread::sleep_for(kRetryPause);
  }
}

}  // namespace simpo
