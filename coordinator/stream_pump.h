#ifndef SIMPO_COORDINATOR_STREAM_PUMP_H_
#define SIMPO_COORDINATOR_STREAM_PUMP_H_

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "coordinator/rpc_errors.h"

namespace simpo {

// A stream to a client that the pump feeds.
class PumpedStream {
 public:
  virtual ~PumpedStream() = default;
  // Sends the next piece unless one is still on its way. `stop`: end the stream instead. False when it
  // is over. Only for the pump's thread.
  virtual bool Pump(bool stop) = 0;
};

// One thread that feeds all streams to clients: it alone reads stores and log files for them, so neither
// the controller nor gRPC's threads wait for a disk, and a slow client holds up nobody. Thread-safe.
class StreamPump {
 public:
  // A client that takes nothing for `patience` loses its stream.
  explicit StreamPump(std::chrono::milliseconds patience = std::chrono::minutes(1))
      : patience_(patience), thread_([this] { Run(); }) {}
  // Every stream must be over by then.
  ~StreamPump();

  void Add(std::shared_ptr<PumpedStream> stream);
  // Something may have changed. Without it streams are looked at several times a second.
  void Wake();
  // Ends all streams, and those that are added later.
  void Stop();
  std::chrono::milliseconds patience() const { return patience_; }

 private:
  void Run();

  const std::chrono::milliseconds patience_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::shared_ptr<PumpedStream>> streams_;  // guarded by mutex_
  bool woken_ = false;                                  // guarded by mutex_
  bool stop_ = false;                                   // guarded by mutex_
  bool exit_ = false;                                   // guarded by mutex_
  std::thread thread_;
};

// The gRPC side of a pumped stream. It keeps itself alive until gRPC has done with it.
template <typename Response>
class FedStream : public grpc::ServerWriteReactor<Response>,
                  public PumpedStream,
                  public std::enable_shared_from_this<FedStream<Response>> {
 public:
  explicit FedStream(StreamPump& pump) : pump_(pump) {}

  // `place` is given back when the stream is over.
  void Begin(grpc::CallbackServerContext* context, std::shared_ptr<void> place) {
    context_ = context;
    place_ = std::move(place);
    self_ = this->shared_from_this();
    pump_.Add(self_);
  }

  bool Pump(bool stop) final {
    {
      const std::lock_guard lock(mutex_);
      if (writing_) {
        // A client that does not read must not hold its place for ever. It comes back with its cursor.
        if (std::chrono::steady_clock::now() - write_begin_ > pump_.patience()) context_->TryCancel();
        return true;
      }
      if (broken_) return End(absl::CancelledError("the client has gone"));
      if (stop) return End(absl::UnavailableError("the coordinator is stopping; ask again when it is back"));
    }
    response_.Clear();
    std::optional<absl::Status> end;
    const bool any = Next(&response_, &end);
    const std::lock_guard lock(mutex_);
    if (any) {
      writing_ = true;
      write_begin_ = std::chrono::steady_clock::now();
      this->StartWrite(&response_);
      return true;
    }
    return end ? End(*end) : true;
  }

  void OnWriteDone(bool ok) final {
    {
      const std::lock_guard lock(mutex_);
      writing_ = false;
      broken_ |= !ok;
    }
    pump_.Wake();
  }

  void OnCancel() final {
    {
      const std::lock_guard lock(mutex_);
      broken_ = true;
    }
    pump_.Wake();
  }

  void OnDone() final { self_.reset(); }

 private:
  // Fills the next response and returns true; or returns false, and sets `end` when there will be none.
  virtual bool Next(Response* response, std::optional<absl::Status>* end) = 0;

  bool End(const absl::Status& status) {
    this->Finish(ToGrpcStatus(status));
    return false;
  }

  StreamPump& pump_;
  grpc::CallbackServerContext* context_ = nullptr;
  std::shared_ptr<void> place_;
  Response response_;
  std::shared_ptr<FedStream> self_;
  std::mutex mutex_;
  bool writing_ = false;                               // guarded by mutex_; response_ is on its way
  bool broken_ = false;                                // guarded by mutex_
  std::chrono::steady_clock::time_point write_begin_;  // guarded by mutex_; of the write on its way
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_STREAM_PUMP_H_
