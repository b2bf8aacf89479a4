#include "simpoctl/client.h"

#include <arpa/inet.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>
#include <grpcpp/support/client_interceptor.h>

#include <algorithm>
#include <cstdlib>
#include <thread>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "common/atomic_file.h"
#include "common/text.h"
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

// Puts the token into every call of a channel.
class TokenInterceptor final : public grpc::experimental::Interceptor {
 public:
  explicit TokenInterceptor(std::string token) : token_(std::move(token)) {}
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    if (methods->QueryInterceptionHookPoint(grpc::experimental::InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      methods->GetSendInitialMetadata()->emplace("authorization", absl::StrCat("Bearer ", token_));
    }
    methods->Proceed();
  }

 private:
  const std::string token_;
};

class TokenInterceptors final : public grpc::experimental::ClientInterceptorFactoryInterface {
 public:
  explicit TokenInterceptors(std::string token) : token_(std::move(token)) {}
  grpc::experimental::Interceptor* CreateClientInterceptor(grpc::experimental::ClientRpcInfo*) override {
    return new TokenInterceptor(token_);
  }

 private:
  const std::string token_;
};

std::shared_ptr<grpc::ChannelCredentials> MakeCredentials(const TlsTexts& texts) {
  if (texts.ca.empty()) return grpc::InsecureChannelCredentials();
  return grpc::SslCredentials({.pem_root_certs = texts.ca, .pem_private_key = texts.key, .pem_cert_chain = texts.cert});
}

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address, const Client::Credentials& credentials) {
  grpc::ChannelArguments arguments;
  // A connection whose other end is gone is noticed.
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 30'000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 20'000);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  if (!credentials.tls.name.empty()) arguments.SetSslTargetNameOverride(credentials.tls.name);
  arguments.SetMaxReceiveMessageSize(-1);
  // A coordinator that restarts is found again soon, and never through a web proxy.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 200);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 10000);  // also how long one connection may take
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 2000);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>> interceptors;
  if (!credentials.token.empty()) interceptors.push_back(std::make_unique<TokenInterceptors>(credentials.token));
  return grpc::experimental::CreateCustomChannelWithInterceptors(address, MakeCredentials(credentials.texts), arguments,
                                                                 std::move(interceptors));
}

bool IsThisMachine(const std::string& address) {
  const std::string host = address.substr(0, address.rfind(':'));
  in_addr address_v4 = {};
  const bool loopback = inet_pton(AF_INET, host.c_str(), &address_v4) == 1 && host.starts_with("127.");
  return loopback || host == "localhost" || host == "[::1]";
}

// No connection came about, so nothing was asked.
bool NeverConnected(const grpc::Status& status) {
  return status.error_message().starts_with("failed to connect") ||
         status.error_message().starts_with("DNS resolution failed");
}

// gRPC wraps the system's words ("Connection refused") in its own.
std::string ShortCause(const std::string& message) {
  const size_t colon = message.rfind(": ");
  const bool wrapped = NeverConnected(grpc::Status(grpc::StatusCode::UNAVAILABLE, message));
  return OneLine(wrapped && colon != std::string::npos ? message.substr(colon + 2) : message);
}

// What to do about a connection that failed with these words.
std::string Remedy(const std::string& message, bool tls, bool has_certificate) {
  const auto says = [&](std::string_view words) { return message.find(words) != std::string::npos; };
  if (says("Connection refused")) {
    return "Start it (simpo-coordinator --data-dir DIR), or name another one with --address or SIMPO_ADDRESS";
  }
  if (says("certificate verify failed")) {
    return "Its certificate is not of the authority that --ca (SIMPO_CA) names, or has expired";
  }
  if (says("wrong version number")) {
    return "It has no TLS: leave out --ca (SIMPO_CA), unless this is the port of its web page; gRPC is 7077 by default";
  }
  if (says("Hostname Verification Check failed")) {
    return "Its certificate is for another name: use that in --address, or set SIMPO_TLS_NAME";
  }
  if (says("http1.x server")) {
    return "That may be the port of its web page: name that of gRPC, by default 7077, with --address or SIMPO_ADDRESS";
  }
  if (says("Socket closed") || says("Connection reset")) {
    if (!tls) return "If it has TLS, name its authority with --ca (SIMPO_CA)";
    if (has_certificate) {
      return "It may not accept your certificate (--cert, SIMPO_CERT): is that of the authority which it asks for "
             "(client_ca)?";
    }
  }
  return "Look whether it runs, and whether --address or SIMPO_ADDRESS names it";
}

// One call, asked again while the connection breaks: none of them does harm when it comes twice. `unknown` is of a
// call that changes something, and says what to do when nobody can tell whether it has: such a call is worth more
// patience than one that only looks.
template <typename Request, typename Response>
absl::StatusOr<Response> Call(const Client& client, v1::TrainingService::Stub* stub,
                              grpc::Status (v1::TrainingService::Stub::*method)(grpc::ClientContext*, const Request&,
                                                                                Response*),
                              const Request& request, const std::string& unknown = "") {
  const bool changes = !unknown.empty();
  bool asked = false;  // it may have reached the coordinator
  std::string said;    // by the coordinator, before it went
  milliseconds pause{200};
  for (int attempt = 1;; ++attempt) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + kCallTimeout);
    Response response;
    const grpc::Status status = (stub->*method)(&context, request, &response);
    if (status.ok()) return response;
    // A coordinator that shuts down cancels what is under way.
    const bool lost =
        status.error_code() == grpc::StatusCode::UNAVAILABLE || status.error_code() == grpc::StatusCode::CANCELLED;
    const bool late = status.error_code() == grpc::StatusCode::DEADLINE_EXCEEDED;
    asked |= (lost && !NeverConnected(status)) || late;
    if (lost && !status.error_details().empty()) said = status.error_message();
    const bool again = lost ? changes || asked : late && changes;
    if (attempt < kTries && again) {
      std::this_thread::sleep_for(pause);
      pause *= 2;
      continue;
    }
    if (!lost && !late) return client.ToStatus(status);
    const grpc::StatusCode code = late ? grpc::StatusCode::DEADLINE_EXCEEDED : grpc::StatusCode::UNAVAILABLE;
    absl::Status error = client.ToStatus(grpc::Status(code, status.error_message(), status.error_details()));
    if (!said.empty() && said != status.error_message()) {
      error = absl::Status(error.code(), absl::StrCat(error.message(), ". Before, it said: ", OneLine(said)));
    }
    if (!changes || !asked) return error;
    return absl::Status(error.code(), absl::StrCat(error.message(), ". ", unknown));
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
  if (colon == std::string::npos || colon == 0 || address.find("://") != std::string::npos ||
      !absl::SimpleAtoi(address.substr(colon + 1), &port) || port < 1 || port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, " is '", OneLine(address), "'; it must be HOST:PORT alone, as ", kDefaultAddress));
  }
  return address;
}

absl::StatusOr<std::string> TokenFor(const std::string& address, const std::string& file_flag, bool tls,
                                     bool insecure) {
  std::string token;
  if (!file_flag.empty()) {
    const absl::StatusOr<std::string> text = ReadFile(file_flag, /*max_bytes=*/4096);
    if (!text.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("--token-file: ", std::string(text.status().message())));
    }
    token = std::string(absl::StripAsciiWhitespace(*text));
    if (token.empty()) return absl::InvalidArgumentError(absl::StrCat("--token-file: ", file_flag, " is empty"));
  } else if (const char* variable = std::getenv("SIMPO_TOKEN")) {
    token = std::string(absl::StripAsciiWhitespace(variable));
  }
  if (token.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") !=
      std::string::npos) {
    return absl::InvalidArgumentError(absl::StrCat(file_flag.empty() ? "SIMPO_TOKEN" : "--token-file",
                                                   " holds no token: one line of letters and digits"));
  }
  if (!token.empty() && !tls && !insecure && !IsThisMachine(address)) {
    return absl::InvalidArgumentError(
        absl::StrCat("the token would travel to ", address,
                     " unencrypted: name the coordinator's authority with --ca (SIMPO_CA), or add --insecure when the "
                     "network is yours alone"));
  }
  return token;
}

Client::Client(std::string address, std::string command, const Credentials& credentials)
    : address_(std::move(address)),
      command_(std::move(command)),
      tls_(!credentials.texts.ca.empty()),
      has_certificate_(!credentials.texts.cert.empty()),
      stub_(v1::TrainingService::NewStub(MakeChannel(address_, credentials))) {}

absl::Status Client::ToStatus(const grpc::Status& status) const {
  if (status.ok()) return absl::OkStatus();
  const auto code = static_cast<absl::StatusCode>(status.error_code());
  switch (status.error_code()) {
    case grpc::StatusCode::UNAVAILABLE:
      // Only its own errors have details.
      if (!status.error_details().empty()) {
        return absl::UnavailableError(
            absl::StrCat("the coordinator at ", address_, " answered: ", OneLine(status.error_message())));
      }
      return absl::UnavailableError(absl::StrCat("cannot reach the coordinator at ", address_, " (",
                                                 ShortCause(status.error_message()), "). ",
                                                 Remedy(status.error_message(), tls_, has_certificate_)));
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
  const auto method = &v1::TrainingService::Stub::SubmitJob;
  if (request.validate_only()) return Call(*this, stub_.get(), method, request);
  return Call(*this, stub_.get(), method, request,
              absl::StrCat("It is not known whether the job was taken: submit it again in the same way with "
                           "--request-id ",
                           OneLine(request.request_id()), ", which gives that job or makes it"));
}

absl::StatusOr<v1::CancelJobResponse> Client::Cancel(const v1::CancelJobRequest& request) {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::CancelJob, request,
              absl::StrCat("It is not known whether job ", OneLine(request.job_id()),
                           " was asked to end: cancel it again, that does no harm"));
}

absl::StatusOr<v1::SetPriorityResponse> Client::SetPriority(const v1::SetPriorityRequest& request) {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::SetPriority, request,
              absl::StrCat("It is not known whether job ", OneLine(request.job_id()),
                           " has its new priority: set it again, that does no harm"));
}

absl::StatusOr<v1::CheckpointJobResponse> Client::Checkpoint(const v1::CheckpointJobRequest& request) {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::CheckpointJob, request,
              absl::StrCat("It is not known whether job ", OneLine(request.job_id()),
                           " was asked for a checkpoint: ask again, that does no harm"));
}

absl::StatusOr<v1::DrainNodeResponse> Client::Drain(const v1::DrainNodeRequest& request) {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::DrainNode, request,
              absl::StrCat("It is not known whether node ", OneLine(request.node()),
                           " is drained: drain it again, that does no harm"));
}

absl::StatusOr<v1::UndrainNodeResponse> Client::Undrain(const v1::UndrainNodeRequest& request) {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::UndrainNode, request,
              absl::StrCat("It is not known whether node ", OneLine(request.node()),
                           " is in use again: ask again, that does no harm"));
}

absl::StatusOr<v1::ListNodesResponse> Client::ListNodes(const v1::ListNodesRequest& request) {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::ListNodes, request);
}

absl::StatusOr<v1::GetJobResponse> Client::GetJob(const std::string& job) {
  v1::GetJobRequest request;
  request.set_job_id(job);
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::GetJob, request);
}

absl::StatusOr<v1::ListJobsResponse> Client::ListJobs(const v1::ListJobsRequest& request) {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::ListJobs, request);
}

absl::StatusOr<v1::ListMetricsResponse> Client::ListMetrics(const v1::ListMetricsRequest& request) {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::ListMetrics, request);
}

absl::StatusOr<v1::GetServerInfoResponse> Client::ServerInfo() {
  return Call(*this, stub_.get(), &v1::TrainingService::Stub::GetServerInfo, v1::GetServerInfoRequest());
}

std::chrono::system_clock::time_point Reconnect::StreamDeadline() const {
  return std::chrono::system_clock::now() + kStreamTimeout;
}

void Reconnect::Alive() {
  if (lost_) say_("Connected again.\n");
  was_there_ = true;
  lost_ = false;
  pause_ = milliseconds(250);
}

absl::Status Reconnect::Next(const grpc::Status& ended) {
  if (interrupt_.Requested()) return absl::CancelledError("detached");
  switch (ended.error_code()) {
    case grpc::StatusCode::DEADLINE_EXCEEDED:  // the stream's own time, in which the connection was kept alive
      Alive();
      return absl::OkStatus();
    case grpc::StatusCode::OK:         // a coordinator that shuts down in order
    case grpc::StatusCode::CANCELLED:  // the same, out of patience
    case grpc::StatusCode::UNKNOWN:    // a stream cut in the middle
    case grpc::StatusCode::UNAVAILABLE:
      break;
    default:
      return client_.ToStatus(ended);
  }
  const auto now = Clock::now();
  was_there_ |= ended.ok() || (ended.error_code() == grpc::StatusCode::UNAVAILABLE && !NeverConnected(ended));
  if (!was_there_) return client_.ToStatus(ended);
  if (!lost_) {
    lost_ = true;
    lost_since_ = now;
    const std::string said =
        ended.error_details().empty() ? "" : absl::StrCat(" (", OneLine(ended.error_message()), ")");
    say_(absl::StrCat("Lost the coordinator at ", client_.address(), said,
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
