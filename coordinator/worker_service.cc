#include "coordinator/worker_service.h"

#include <grpcpp/alarm.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/rpc_errors.h"
#include "coordinator/tokens.h"

namespace simpo {
namespace {

constexpr char kSecretKey[] = "simpo-attempt-secret";
// Of one rank, that wait for the controller; beyond that no more is read from it.
constexpr int kMaxWaitingMessages = 256;
// To one rank, that wait for the network: more than a rank that reads can have.
constexpr size_t kMaxWaitingResponses = 4096;
constexpr int kMaxRanks = 1'000'000;
constexpr int kMaxPatienceMs = 24 * 3600 * 1000;  // of one call of Register

std::string SecretOf(const grpc::CallbackServerContext& context) {
  const auto found = context.client_metadata().find(kSecretKey);
  return found == context.client_metadata().end() ? "" : std::string(found->second.data(), found->second.size());
}

// Whether the caller is a rank of the attempt that runs. The same words for all, so that nobody learns what
// exists.
absl::Status CheckCaller(const JobViews& views, const v1::Hello& hello, const std::string& secret) {
  const JobViews::View view = views.FindById(hello.job_id());
  const bool known = view && view->job.attempt() == hello.attempt() && !view->secret.empty();
  if (known && SecretsEqual(view->secret, secret)) return absl::OkStatus();
  return absl::UnauthenticatedError(absl::StrCat("job ", hello.job_id(), ", attempt ", hello.attempt(),
                                                 " does not run here, or the secret is not its own"));
}

// One rank's stream. It keeps itself alive until gRPC has done with it.
class RankStream final : public grpc::ServerBidiReactor<v1::AttachRequest, v1::AttachResponse>,
                         public RankChannel,
                         public std::enable_shared_from_this<RankStream> {
 public:
  RankStream(Controller& controller, const JobViews& views, grpc::CallbackServerContext* context)
      : controller_(controller), views_(views), context_(context), secret_(SecretOf(*context)) {}

  void Begin(std::chrono::milliseconds hello_time) {
    self_ = shared_from_this();
    hello_alarm_.Set(std::chrono::system_clock::now() + hello_time, [weak = weak_from_this()](bool rang) {
      const std::shared_ptr<RankStream> stream = weak.lock();
      if (rang && stream) stream->Close(absl::DeadlineExceededError("hello did not come in time"));
    });
    const std::lock_guard lock(mutex_);
    Read();
  }

  void Send(v1::AttachResponse response) override {
    const std::lock_guard lock(mutex_);
    if (end_) return;
    // A rank that takes nothing is dropped; it hears everything anew when it is back.
    if (responses_.size() >= kMaxWaitingResponses) {
      end_ = ToGrpcStatus(absl::UnavailableError("this rank does not read what it is sent; connect again"));
      if (!finished_) context_->TryCancel();  // the write that is under way would never end
    }
    if (!end_) responses_.push_back(std::move(response));
    Write();
  }

  void Close(const absl::Status& status) override { End(ToGrpcStatus(status)); }

  void OnReadDone(bool ok) override {
    {
      const std::lock_guard lock(mutex_);
      reading_ = false;
    }
    if (!ok) return LastRead();
    if (!id_) return Greet();
    v1::AttachRequest request;
    {
      const std::lock_guard lock(mutex_);
      // Before it pauses: from then on another thread may have the next message read into it.
      request.Swap(&request_);
      paused_ = ++waiting_messages_ >= kMaxWaitingMessages;
    }
    controller_.Receive(*id_, std::move(request), [stream = shared_from_this()] { stream->Taken(); });
    const std::lock_guard lock(mutex_);
    if (!paused_ && !reading_) Read();
  }

  void OnWriteDone(bool ok) override {
    const std::lock_guard lock(mutex_);
    writing_ = false;
    if (!responses_.empty()) responses_.pop_front();
    if (!ok) responses_.clear();
    Write();
  }

  // Reads and writes fail soon by themselves.
  void OnCancel() override { End(grpc::Status::CANCELLED); }

  void OnDone() override {
    hello_alarm_.Cancel();
    const std::shared_ptr<RankStream> self = std::move(self_);
    bool leave = false;
    {
      const std::lock_guard lock(mutex_);
      leave = id_ && !std::exchange(left_, true);
    }
    if (leave) controller_.Leave(*id_, self);
  }

 private:
  // The first message says who it is.
  void Greet() {
    if (!request_.has_hello()) {
      return Close(absl::InvalidArgumentError("the first message must be hello"));
    }
    const v1::Hello& hello = request_.hello();
    if (absl::Status status = CheckCaller(views_, hello, secret_); !status.ok()) return Close(status);
    hello_alarm_.Cancel();
    id_ = {hello.job_id(), hello.attempt(), hello.rank()};
    controller_.Attach(hello, shared_from_this());
    const std::lock_guard lock(mutex_);
    Read();
  }

  void LastRead() {
    if (!id_) return Close(absl::CancelledError("the stream ended before hello"));
    {
      const std::lock_guard lock(mutex_);
      if (std::exchange(left_, true)) return;
    }
    controller_.Leave(*id_, shared_from_this());
  }

  void Taken() {
    const std::lock_guard lock(mutex_);
    --waiting_messages_;
    if (!paused_ || waiting_messages_ > kMaxWaitingMessages / 2) return;
    paused_ = false;
    if (!reading_) Read();
  }

  // With mutex_ held, so that it never comes after Finish.
  void Read() {
    if (finished_) return;
    reading_ = true;
    StartRead(&request_);
  }

  void End(grpc::Status status) {
    const std::lock_guard lock(mutex_);
    if (!end_) end_ = std::move(status);
    Write();
  }

  // Starts what comes next, with mutex_ held: a response, or the end when all responses are out.
  void Write() {
    if (writing_ || finished_) return;
    if (!responses_.empty()) {
      writing_ = true;
      StartWrite(&responses_.front());
    } else if (end_) {
      finished_ = true;
      Finish(*end_);
    }
  }

  Controller& controller_;
  const JobViews& views_;
  grpc::CallbackServerContext* const context_;  // is there until after Finish
  const std::string secret_;
  v1::AttachRequest request_;  // of the read in flight
  std::optional<RankId> id_;   // written once, before the controller knows of this stream
  std::shared_ptr<RankStream> self_;
  grpc::Alarm hello_alarm_;

  std::mutex mutex_;
  std::deque<v1::AttachResponse> responses_;  // the first is in flight while writing_
  bool writing_ = false;
  std::optional<grpc::Status> end_;  // what follows the responses
  bool finished_ = false;
  bool left_ = false;  // the controller knows that nothing more comes
  int waiting_messages_ = 0;
  bool paused_ = false;  // too many wait
  bool reading_ = false;
};

// One rank's call of Register. It keeps itself alive until gRPC has done with it.
class RegisterCall final : public grpc::ServerUnaryReactor, public std::enable_shared_from_this<RegisterCall> {
 public:
  RegisterCall(Rendezvous& rendezvous, v1::RegisterResponse* response) : rendezvous_(rendezvous), response_(response) {}

  void Begin(const v1::RegisterRequest& request) {
    self_ = shared_from_this();
    call_ = {.who = request.hello(), .id = this};
    const auto patience = std::chrono::milliseconds(std::clamp(request.timeout_ms(), 1, kMaxPatienceMs));
    alarm_.Set(std::chrono::system_clock::now() + patience, [weak = weak_from_this()](bool rang) {
      // An alarm keeps its function for as long as it lives: the function must not keep the alarm.
      const std::shared_ptr<RegisterCall> call = weak.lock();
      if (rang && call) call->rendezvous_.Expire(call->call_);
    });
    rendezvous_.Arrive(call_, request.nccl_id(),
                       [call = self_](absl::StatusOr<std::string> bytes) { call->Reply(std::move(bytes)); });
  }
  void Refuse(const absl::Status& status) {
    self_ = shared_from_this();
    Reply(status);
  }

  void OnCancel() override {
    rendezvous_.Forget(call_);
    Reply(absl::CancelledError());
  }
  void OnDone() override {
    alarm_.Cancel();
    const std::shared_ptr<RegisterCall> self = std::move(self_);
  }

 private:
  // The response is there until the first reply.
  void Reply(absl::StatusOr<std::string> bytes) {
    if (replied_.exchange(true)) return;
    const grpc::Status status = ToGrpcStatus(bytes.status());
    if (bytes.ok()) response_->set_nccl_id(*std::move(bytes));
    Finish(status);
  }

  Rendezvous& rendezvous_;
  v1::RegisterResponse* const response_;
  Rendezvous::Call call_;
  grpc::Alarm alarm_;
  std::atomic<bool> replied_ = false;
  std::shared_ptr<RegisterCall> self_;
};

}  // namespace

grpc::ServerBidiReactor<v1::AttachRequest, v1::AttachResponse>* WorkerService::Attach(
    grpc::CallbackServerContext* context) {
  const auto stream = std::make_shared<RankStream>(controller_, views_, context);
  stream->Begin(hello_time_);
  return stream.get();
}

grpc::ServerUnaryReactor* WorkerService::Register(grpc::CallbackServerContext* context,
                                                  const v1::RegisterRequest* request, v1::RegisterResponse* response) {
  const v1::Hello& hello = request->hello();
  const auto call = std::make_shared<RegisterCall>(rendezvous_, response);
  if (absl::Status status = CheckCaller(views_, hello, SecretOf(*context)); !status.ok()) {
    call->Refuse(status);
  } else if (hello.world_size() < 1 || hello.world_size() > kMaxRanks || hello.rank() < 0 ||
             hello.rank() >= hello.world_size()) {
    call->Refuse(absl::InvalidArgumentError(
        absl::StrCat("rank ", hello.rank(), " of ", hello.world_size(), " ranks: there is no such rank")));
  } else {
    call->Begin(*request);
  }
  return call.get();
}

}  // namespace simpo
