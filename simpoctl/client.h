#ifndef SIMPO_SIMPOCTL_CLIENT_H_
#define SIMPO_SIMPOCTL_CLIENT_H_

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "common/tls_files.h"
#include "simpo/v1/training_service.grpc.pb.h"
#include "simpoctl/interrupt.h"

namespace simpo {

inline constexpr char kDefaultAddress[] = "127.0.0.1:7077";

// Where the coordinator is: the flag, else SIMPO_ADDRESS, else the default. INVALID_ARGUMENT when it
// is not HOST:PORT.
absl::StatusOr<std::string> CoordinatorAddress(const std::string& flag);

// The token: of the file that the flag names, else SIMPO_TOKEN; "" when there is none. INVALID_ARGUMENT when the file
// cannot be read, or a token would travel to another machine in the clear.
absl::StatusOr<std::string> TokenFor(const std::string& address, const std::string& file_flag, bool tls, bool insecure);

// The coordinator as the commands see it. Every call has a deadline, and is asked again when the connection breaks
// while it is under way; an error's message says what to do about it, and of a change whether it may have been made.
// Connects at the first call.
class Client {
 public:
  // How to show who calls, and to know who answers.
  struct Credentials {
    std::string token;  // empty: none
    TlsFiles tls;
    TlsTexts texts;  // of `tls`
  };
  // `command` is how this coordinator is reached again, for advice: "simpoctl" and the flags it needs.
  Client(std::string address, std::string command, const Credentials& credentials = {});

  const std::string& address() const { return address_; }
  const std::string& command() const { return command_; }

  // Always with the same request_id, so that it never doubles.
  absl::StatusOr<v1::SubmitJobResponse> Submit(const v1::SubmitJobRequest& request);
  absl::StatusOr<v1::CancelJobResponse> Cancel(const v1::CancelJobRequest& request);
  absl::StatusOr<v1::SetPriorityResponse> SetPriority(const v1::SetPriorityRequest& request);
  absl::StatusOr<v1::CheckpointJobResponse> Checkpoint(const v1::CheckpointJobRequest& request);
  absl::StatusOr<v1::DrainNodeResponse> Drain(const v1::DrainNodeRequest& request);
  absl::StatusOr<v1::UndrainNodeResponse> Undrain(const v1::UndrainNodeRequest& request);
  absl::StatusOr<v1::ListNodesResponse> ListNodes(const v1::ListNodesRequest& request);
  absl::StatusOr<v1::GetJobResponse> GetJob(const std::string& job);
  absl::StatusOr<v1::ListJobsResponse> ListJobs(const v1::ListJobsRequest& request);
  absl::StatusOr<v1::ListMetricsResponse> ListMetrics(const v1::ListMetricsRequest& request);
  absl::StatusOr<v1::GetServerInfoResponse> ServerInfo();

  v1::TrainingService::Stub& stub() { return *stub_; }
  absl::Status ToStatus(const grpc::Status& status) const;

 private:
  std::string address_;
  std::string command_;
  bool tls_ = false;
  bool has_certificate_ = false;
  std::unique_ptr<v1::TrainingService::Stub> stub_;
};

// Decides, after a stream ended, whether it is opened again. A coordinator that restarts is waited
// for; that it was lost, and that it is back, is said once each through `say`.
class Reconnect {
 public:
  using Clock = std::chrono::steady_clock;

  Reconnect(const Client& client, Interrupt& interrupt, std::function<void(std::string_view)> say)
      : client_(client), interrupt_(interrupt), say_(std::move(say)) {}

  // When the next stream must end by itself: a dead connection cannot hold a command for ever.
  std::chrono::system_clock::time_point StreamDeadline() const;
  // A response came.
  void Alive();
  // OK: open the stream again (the pause is over). Otherwise what the command ends with.
  absl::Status Next(const grpc::Status& ended);

 private:
  const Client& client_;
  Interrupt& interrupt_;
  std::function<void(std::string_view)> say_;
  bool was_there_ = false;  // a first connection that fails is no loss
  bool lost_ = false;
  Clock::time_point lost_since_;
  std::chrono::milliseconds pause_{250};
};

}  // namespace simpo

#endif  // SIMPO_SIMPOCTL_CLIENT_H_
