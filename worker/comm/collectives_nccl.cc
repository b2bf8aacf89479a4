// The five verbs over NCCL, one GPU per rank. Collectives run on a stream of their own: an event orders
// each after what the current stream had queued when it began, another orders what the current stream
// queues after Wait behind it. The host blocks only for results in host memory.
//
// The communicator does not block either. A thread watches it: a collective that fails or does not end
// aborts the communicator, so that no rank waits for one that is gone; whatever the rank does with it
// next, Wait included, throws.
//
// NCCL's own header comes from its wheel (deploy/install-deps.sh) in every build, so this file is
// compiled and tested where there is no GPU: the tests link a stand-in for libnccl and for the CUDA
// calls (cuda_calls.h).
#include <ATen/ATen.h>
#include <nccl.h>

#include <condition_variable>
#include <cstring>
#include <deque>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "common/log.h"
#include "worker/comm/collectives.h"
#include "worker/comm/cuda_calls.h"

namespace simpo {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::microseconds kInProgressPoll{100};
constexpr std::chrono::microseconds kHostWaitPoll{20};
constexpr std::chrono::seconds kFinalizeTimeout{30};
constexpr char kRemedy[] =
    "Look at the end of the other ranks' logs first: the rank that failed says why. If none did, NCCL_DEBUG=INFO and "
    "NCCL_DEBUG_SUBSYS=INIT,NET in the environment of the ranks show what NCCL sees of the network and the GPUs.";

ncclDataType_t TypeOf(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return ncclFloat32;
    case at::kBFloat16:
      return ncclBfloat16;
    case at::kDouble:
      return ncclFloat64;
    case at::kLong:
      return ncclInt64;
    default:
      throw std::invalid_argument("no NCCL reduction for this element type");
  }
}

class Event {
 public:
  Event() : event_(cuda::NewEvent()) {}
  ~Event() { cuda::FreeEvent(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  const cudaEvent_t event_;
};

// One collective, as the watchdog sees it.
struct UnderWay {
  std::string name;  // "all-gather 17 (4096 bytes)"
  Event done;
  Clock::time_point begun = Clock::now();
};

// The memory of one collective, held from when it begins until it has been waited for: before that it
// must not be given to others.
struct Memory {
  at::Tensor tensor;          // the caller's
  at::Tensor device, pinned;  // where `tensor` is in host memory: what travels

  bool staged() const { return device.defined(); }
  char* data() const { return static_cast<char*>((staged() ? device : tensor).data_ptr()); }
};

class NcclCollectives final : public Collectives {
 public:
  NcclCollectives(const ncclUniqueId& id, int rank, int world_size, const NcclOptions& options)
      : options_(options),
        rank_(rank),
        world_size_(world_size),
        device_(cuda::CurrentDevice()),
        stream_(cuda::NewStream()) {
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    std::unique_lock lock(mutex_);
    Settle(lock, ncclCommInitRankConfig(&comm_, world_size, id, rank, &config), options_.connect_timeout,
           c10::str("joining the communicator of ", world_size, " ranks"));
    watchdog_ = std::thread([this] { Watch(); });
  }

  ~NcclCollectives() override {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_one();
    watchdog_.join();
    End();
  }

  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }

  Pending BeginAllReduce(at::Tensor tensor) override {
    sent_.all_reduce += 2 * ShareOfOthers(tensor);
    return Begin("all-reduce", tensor,
                 [count = Count(tensor), type = TypeOf(tensor)](auto data, auto comm, auto stream) {
                   return ncclAllReduce(data, data, count, type, ncclSum, comm, stream);
                 });
  }

  // In place: slice r of the tensor is where rank r's result belongs.
  Pending BeginReduceScatter(at::Tensor tensor) override {
    sent_.reduce_scatter += ShareOfOthers(tensor);
    const size_t count = SliceCount(tensor);
    return Begin("reduce-scatter", tensor,
                 [count, offset = SliceOffset(tensor), type = TypeOf(tensor)](auto data, auto comm, auto stream) {
                   return ncclReduceScatter(data, data + offset, count, type, ncclSum, comm, stream);
                 });
  }

  Pending BeginAllGather(at::Tensor tensor) override {
    sent_.all_gather += ShareOfOthers(tensor);
    const size_t bytes = SliceCount(tensor) * tensor.element_size();
    return Begin("all-gather", tensor, [bytes, offset = SliceOffset(tensor)](auto data, auto comm, auto stream) {
      return ncclAllGather(data + offset, data, bytes, ncclUint8, comm, stream);
    });
  }

  void Broadcast(at::Tensor tensor, int root) override {
    const size_t bytes = tensor.nbytes();
    sent_.broadcast += rank_ == root ? static_cast<int64_t>(bytes) : 0;
    Begin("broadcast", tensor, [bytes, root](auto data, auto comm, auto stream) {
      return ncclBroadcast(data, data, bytes, ncclUint8, root, comm, stream);
    }).Wait();
  }

  void Barrier() override {
    // Its result comes back to the host, which therefore waits.
    at::Tensor nothing = at::zeros({1}, at::kLong);
    Begin("barrier", nothing, [](auto data, auto comm, auto stream) {
      return ncclAllReduce(data, data, 1, ncclInt64, ncclSum, comm, stream);
    }).Wait();
  }

 private:
  // call(char* data, ncclComm_t, cudaStream_t) queues the collective.
  template <typename Call>
  Pending Begin(const char* verb, const at::Tensor& tensor, Call call) {
    TORCH_CHECK(tensor.is_contiguous(), "collectives take contiguous tensors");
    if (tensor.numel() == 0) return {};
    const size_t bytes = tensor.nbytes();
    auto work = std::make_shared<UnderWay>();
    activity_.Began(verb, static_cast<int64_t>(bytes));
    work->name = c10::str(verb, " ", activity_.Now().collectives, " (", bytes, " bytes)");
    Memory memory{.tensor = tensor};
    if (!cuda::OnDevice(tensor)) {
      memory.pinned = cuda::PinnedEmpty(static_cast<int64_t>(bytes));
      memory.device = cuda::DeviceEmpty(static_cast<int64_t>(bytes));
      std::memcpy(memory.pinned.data_ptr(), tensor.data_ptr(), bytes);
    }
    const Event ready;
    cuda::RecordEvent(ready.get(), cuda::CurrentStream());

    std::unique_lock lock(mutex_);
    ThrowIfFailed();
    cuda::StreamWaitEvent(stream_, ready.get());
    if (memory.staged()) cuda::CopyAsync(memory.data(), memory.pinned.data_ptr(), bytes, stream_);
    Settle(lock, call(memory.data(), comm_, stream_), options_.timeout, work->name);
    if (memory.staged()) cuda::CopyAsync(memory.pinned.data_ptr(), memory.data(), bytes, stream_);
    cuda::RecordEvent(work->done.get(), stream_);
    under_way_.push_back(work);
    return Pending([this, work, memory = std::move(memory)] { Wait(*work, memory); }, &activity_);
  }

  void Wait(const UnderWay& work, const Memory& memory) {
    if (!memory.staged()) {
      cuda::StreamWaitEvent(cuda::CurrentStream(), work.done.get());
      const std::lock_guard lock(mutex_);
      return ThrowIfFailed();
    }
    // The watchdog ends this if the collective does not end.
    while (!cuda::EventDone(work.done.get())) {
      {
        const std::lock_guard lock(mutex_);
        ThrowIfFailed();
      }
      std::this_thread::sleep_for(kHostWaitPoll);
    }
    {
      const std::lock_guard lock(mutex_);
      ThrowIfFailed();  // an aborted collective ends too
    }
    std::memcpy(memory.tensor.data_ptr(), memory.pinned.data_ptr(), memory.tensor.nbytes());
  }

  // Polls the communicator until a call that it has begun is through. Throws after Fail.
  void Settle(std::unique_lock<std::mutex>& lock, ncclResult_t result, std::chrono::milliseconds timeout,
              const std::string& what) {
    const auto deadline = Clock::now() + timeout;
    while (result == ncclInProgress && Clock::now() < deadline) {
      std::this_thread::sleep_for(kInProgressPoll);
      ncclResult_t state = ncclSuccess;
      const ncclResult_t asked = ncclCommGetAsyncError(comm_, &state);
      result = asked == ncclSuccess ? state : asked;
    }
    if (result == ncclSuccess) return;
    Fail(lock, result == ncclInProgress ? NotEnded(what, timeout) : Describe(what, result));
    lock.lock();
    ThrowIfFailed();
  }

  void Watch() {
    cuda::UseDevice(device_);
    std::unique_lock lock(mutex_);
    auto turn_began = Clock::now();  // of the oldest collective that is under way
    while (!wake_.wait_for(lock, options_.watch_interval, [&] { return stop_; })) {
      if (comm_ == nullptr) continue;
      std::string problem;
      try {
        while (!under_way_.empty() && cuda::EventDone(under_way_.front()->done.get())) {
          under_way_.pop_front();
          turn_began = Clock::now();
        }
        const std::string now = under_way_.empty() ? "no collective" : under_way_.front()->name;
        ncclResult_t state = ncclSuccess;
        const ncclResult_t asked = ncclCommGetAsyncError(comm_, &state);
        if (asked != ncclSuccess) state = asked;
        if (state != ncclSuccess && state != ncclInProgress) {
          problem = Describe(c10::str("with ", now, " under way"), state);
        } else if (!under_way_.empty()) {
          const auto since = std::max(turn_began, under_way_.front()->begun);
          if (Clock::now() - since > options_.timeout) problem = NotEnded(now, options_.timeout);
        }
      } catch (const std::exception& error) {  // the device itself
        problem = c10::str("rank ", rank_, ": ", error.what());
      }
      if (problem.empty()) continue;
      LOG_ERROR(problem);  // at once: the rank itself may take long to come back here
      Fail(lock, problem);
      lock.lock();
    }
  }

  std::string Describe(const std::string& what, ncclResult_t result) const {
    const char* detail = comm_ == nullptr ? nullptr : ncclGetLastError(comm_);
    return c10::str("NCCL on rank ", rank_, " of ", world_size_, ", ", what, ": ", ncclGetErrorString(result),
                    detail != nullptr && *detail != '\0' ? ": " : "", detail != nullptr ? detail : "", ". ", kRemedy);
  }
  std::string NotEnded(const std::string& what, std::chrono::milliseconds timeout) const {
    return c10::str("NCCL on rank ", rank_, " of ", world_size_, ", ", what, ": not done after ",
                    std::chrono::duration<double>(timeout).count(),
                    " s: another rank is gone, hangs, or is in another collective. ", kRemedy,
                    " SIMPO_NCCL_TIMEOUT_S sets the time.");
  }

  // Ends the communicator, once. Takes mutex_ held and gives it back free: the abort may take long, and
  // the rank is not to wait for it.
  void Fail(std::unique_lock<std::mutex>& lock, std::string message) {
    if (failure_.empty()) failure_ = std::move(message);
    ncclComm_t comm = std::exchange(comm_, nullptr);
    lock.unlock();
    if (comm != nullptr) ncclCommAbort(comm);
  }
  void ThrowIfFailed() const {
    if (!failure_.empty()) throw std::runtime_error(failure_);
  }

  // A healthy communicator is closed together with the peers; one with work under way is not waited for.
  void End() noexcept {
    if (comm_ == nullptr) return;
    try {
      for (const auto& work : under_way_) {
        if (!cuda::EventDone(work->done.get())) throw std::runtime_error("a collective is under way");
      }
      std::unique_lock lock(mutex_);
      Settle(lock, ncclCommFinalize(comm_), kFinalizeTimeout, "leaving the communicator");
      ncclCommDestroy(comm_);
    } catch (const std::exception&) {
      if (comm_ != nullptr) ncclCommAbort(comm_);
    }
  }

  static size_t Count(const at::Tensor& tensor) { return static_cast<size_t>(tensor.numel()); }
  size_t SliceCount(const at::Tensor& tensor) const {
    TORCH_CHECK(tensor.numel() % world_size_ == 0, "not divisible by the world size");
    return Count(tensor) / static_cast<size_t>(world_size_);
  }
  size_t SliceOffset(const at::Tensor& tensor) const {  // bytes
    return static_cast<size_t>(rank_) * SliceCount(tensor) * tensor.element_size();
  }

  const NcclOptions options_;
  const int rank_;
  const int world_size_;
  const int device_;
  const cudaStream_t stream_;

  std::mutex mutex_;
  std::condition_variable wake_;
  ncclComm_t comm_ = nullptr;  // null once it has failed
  std::string failure_;
  std::deque<std::shared_ptr<UnderWay>> under_way_;
  bool stop_ = false;
  std::thread watchdog_;
};

}  // namespace

std::unique_ptr<Collectives> MakeNcclCollectives(int rank, int world_size, const ShareBytes& share,
                                                 const NcclOptions& options) {
  ncclUniqueId id = {};
  std::string bytes;
  if (rank == 0) {
    if (const ncclResult_t result = ncclGetUniqueId(&id); result != ncclSuccess) {
      throw std::runtime_error(c10::str("ncclGetUniqueId: ", ncclGetErrorString(result), ": ",
                                        ncclGetLastError(nullptr),
                                        ". NCCL found no network interface to listen on: NCCL_DEBUG=INFO shows "
                                        "which it tried, NCCL_SOCKET_IFNAME chooses one."));
    }
    bytes.assign(id.internal, sizeof(id.internal));
  }
  bytes = share(bytes);
  if (bytes.size() != sizeof(id.internal)) throw std::runtime_error("rank 0 gave an NCCL id of another size");
  std::memcpy(id.internal, bytes.data(), sizeof(id.internal));
  return std::make_unique<NcclCollectives>(id, rank, world_size, options);
}

}  // namespace simpo
