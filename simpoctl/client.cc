#include "simpoctl/client.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <algorithm>
#include <cstdlib>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "simpoctl/terminal.h"

namespace simpo {
namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;

constexpr seconds kCallTimeout{20};
constexpr int kTries = 5;
constexpr seconds kStreamTimeout{300};
constexpr seconds kReconnectFor{600};
constexpr milliseconds kLongestPause{5000};

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address) {
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(-1);
  // A coordinator that restarts is found again soon, and never through a web proxy.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 200);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 10000);  // also how long one connection may take
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2000);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
}

bool MayPass(grpc::StatusCode code) {
  return code == grpc::StatusCode::UNAVAILABLE || code == grpc::StatusCode::DEADLINE_EXCEEDED;
}

// gRPC wraps the system's words ("Connection refused") in its own.
std::string ShortCause(const std::string& message) {
  const size_t colon = message.rfind(": ");
  const bool wrapped = message.starts_with("failed to connect") || message.starts_with("DNS resolution failed");
  return OneLine(wrapped && colon != std::string::npos ? message.substr(colon + 2) : message);
}

// One call, asked up to `tries` times while the coordinator does not answer.
template <typename Request, typename Response>
absl::StatusOr<Response> Call(const Client& client, v1::TrainingService::Stub* stub,
                              grpc::Status (v1::TrainingService::Stub::*method)(grpc::ClientContext*, const Request&,
                                                                                Response*),
                              const Request& request, int tries) {
  milliseconds pause{200};
  for (int attempt = 1;; ++attempt) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kCallTimeout);
    Response response;
    const grpc::Status status = (stub->*method)(&context, request, &response);
    if (status.ok()) return response;
    if (attempt == tries || !MayPass(status.error_code())) return client.ToStatus(status);
    std::this_thread::sleep_for(pause);
    pause *= 2;
  }
}

}  // namespace

absl::StatusOr<std::string> CoordinatorAddress(const std::string& flag) {
  std::string address = flag;
  std::string source = "--address";
  if (address.empty()) {
    const char* variable = std::getenv("SIMPO_ADDRESS");
    if (variable == nullptr || *variable == '\0') return kDefaultAddress;
    address = variable;
    source = "SIMPO_ADDRESS";
  }
  const size_t colon = address.rfind(':');
  int port = 0;
  if (colon == std::string::npos || colon == 0 || !absl::SimpleAtoi(address.substr(colon + 1), &port) || port < 1 ||
      port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, " is '", OneLine(address), "'; it must be HOST:PORT, as ", kDefaultAddress));
  }
  return address;
}

Client::Client(std::string address, std::string command)
    : address_(std::move(address)),
      command_(std::move(command)),
      stub_(v1::TrainingService::NewStub(MakeChannel(address_))) {}

absl::Status Client::ToStatus(const grpc::Status& status) const {
  if (status.ok()) return absl::OkStatus();
  const auto code = static_cast<absl::StatusCode>(status.error_code());
  switch (status.error_code()) {
    case grpc::StatusCode::UNAVAILABLE:
      return absl::UnavailableError(
          absl::StrCat("cannot reach the coordinator at ", address_, " (", ShortCause(status.error_message()),
                       "). Start it (simpo-coordinator --data-dir DIR), or name another one with --address or "
                       "SIMPO_ADDRESS"));
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      return absl::DeadlineExceededError(
          absl::StrCat("the coordinator at ", address_, " did not answer in time; look at its log, then try again"));
    case grpc::StatusCode::UNIMPLEMENTED:
      return absl::UnimplementedError(absl::StrCat("the server at ", address_,
                                                   " does not know this request: it is no simpo-coordinator, or an "
                                                   "older one (compare: simpoctl version)"));
    default:
      return absl::Status(code, status.error_message());
  }
}

absl::StatusOr<v1::SubmitJobResponse> Client::Submit(const v1::SubmitJobRequest& request) {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::SubmitJob, request, request.validate_only() ? 1 : kTries);
}

absl::StatusOr<v1::CancelJobResponse> Client::Cancel(const v1::CancelJobRequest& request) {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::CancelJob, request, kTries);
}

absl::StatusOr<v1::SetPriorityResponse> Client::SetPriority(const v1::SetPriorityRequest& request) {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::SetPriority, request, kTries);
}

absl::StatusOr<v1::ListNodesResponse> Client::ListNodes(const v1::ListNodesRequest& request) {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::ListNodes, request, 1);
}

absl::StatusOr<v1::GetJobResponse> Client::GetJob(const std::string& job) {
  v1::GetJobRequest request;
  request.set_job_id(job);
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::GetJob, request, 1);
}

absl::StatusOr<v1::ListJobsResponse> Client::ListJobs(const v1::ListJobsRequest& request) {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::ListJobs, request, 1);
}

absl::StatusOr<v1::ListMetricsResponse> Client::ListMetrics(const v1::ListMetricsRequest& request) {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::ListMetrics, request, 1);
}

absl::StatusOr<v1::GetServerInfoResponse> Client::ServerInfo() {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::GetServerInfo, v1::GetServerInfoRequest(), 1);
}

std::chrono::system_clock::time_point Reconnect::StreamDeadline() const {
  return std::chrono::system_clock::now() + kStreamTimeout;
}

void Reconnect::Alive() {
  if (lost_) say_("Connected again.\n");
  ever_alive_ = true;
  lost_ = false;
  pause_ = milliseconds(250);
}

absl::Status Reconnect::Next(const grpc::Status& ended) {
  if (interrupt_.Requested()) return absl::CancelledError("detached");
  switch (ended.error_code()) {
    case grpc::StatusCode::DEADLINE_EXCEEDED:
      if (ever_alive_ && !lost_) return absl::OkStatus();  // the stream's own time; opened again at once
      break;
    case grpc::StatusCode::OK:         // a coordinator that shuts down in order
    case grpc::StatusCode::CANCELLED:  // the same, out of patience
    case grpc::StatusCode::UNKNOWN:    // a stream cut in the middle
    case grpc::StatusCode::UNAVAILABLE:
      break;
    default:
      return client_.ToStatus(ended);
  }
  const auto now = Clock::now();
  if (!ever_alive_ && !ended.ok()) return client_.ToStatus(ended);
  if (!lost_) {
    lost_ = true;
    lost_since_ = now;
    say_(absl::StrCat("Lost the coordinator at ", client_.address(),
                      "; a running job goes on without it. Connecting again ...\n"));
  } else if (now - lost_since_ > kReconnectFor) {
    return client_.ToStatus(
        grpc::Status(grpc::StatusCode::UNAVAILABLE, absl::StrCat("lost for ", kReconnectFor.count(), " s")));
  }
  if (interrupt_.WaitFor(pause_)) return absl::CancelledError("detached");
  pause_ = std::min(pause_ * 2, kLongestPause);
  return absl::OkStatus();
}

}  // namespace simpo
