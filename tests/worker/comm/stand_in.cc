// The CUDA side of the stand-in: devices, streams, events, memory. nccl_stand_in.cc has NCCL's.
#include "tests/worker/comm/stand_in.h"

#include <ATen/ATen.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <thread>

#include "tests/worker/comm/stand_in_state.h"
#include "worker/comm/cuda_calls.h"

// What a cudaEvent_t points to. Recording n is done when `done` reaches n.
struct CUevent_st {
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    int64_t recorded = 0;
    int64_t done = 0;
  };
  const int number;
  const std::shared_ptr<State> state = std::make_shared<State>();
};

namespace simpo::stand_in {
namespace {

thread_local int t_device = 0;
thread_local CUstream_st* t_current = nullptr;
thread_local bool t_in_step = true;

struct Memory {
  std::mutex mutex;
  std::map<const char*, std::pair<int64_t, bool>> blocks;  // begin -> bytes, pinned
  std::vector<char*> freed;
};
Memory& TheMemory() {
  static auto* memory = new Memory;
  return *memory;
}

bool Holds(const void* data, bool pinned) {
  Memory& memory = TheMemory();
  const std::lock_guard lock(memory.mutex);
  const auto* at = static_cast<const char*>(data);
  auto block = memory.blocks.upper_bound(at);
  if (block == memory.blocks.begin()) return false;
  --block;
  return at < block->first + block->second.first && block->second.second == pinned;
}

at::Tensor Allocate(int64_t bytes, bool pinned) {
  auto* data = new char[static_cast<size_t>(bytes)];
  Memory& memory = TheMemory();
  {
    const std::lock_guard lock(memory.mutex);
    memory.blocks[data] = {bytes, pinned};
  }
  // As CUDA's caching allocators do: given back, it stays mapped, since what an aborted communicator had
  // queued may still come.
  const auto free = [data, bytes](void*) {
    const std::lock_guard lock(TheMemory().mutex);
    TheMemory().blocks.erase(data);
    TheMemory().freed.push_back(data);
    std::memset(data, 0xff, static_cast<size_t>(bytes));  // NaN or -1 to whom comes too late
  };
  return at::from_blob(data, {bytes}, free, at::kByte);
}

}  // namespace

State& TheState() {
  static auto* state = new State;
  return *state;
}

void Log(Call call, int device) {
  const std::lock_guard lock(TheState().mutex);
  TheState().calls[device].push_back(std::move(call));
}

void Problem(const std::string& text) {
  const std::lock_guard lock(TheState().mutex);
  TheState().problems.push_back(text);
}

int Device() { return t_device; }

void Reset(const Faults& faults) {
  std::vector<CUstream_st*> streams;
  {
    const std::lock_guard lock(TheState().mutex);
    streams = TheState().streams;
    TheState().faults.abort_hangs = false;
    TheState().changed.notify_all();
  }
  for (CUstream_st* stream : streams) stream->Synchronize();
  const std::lock_guard lock(TheState().mutex);
  TheState().faults = faults;
  TheState().calls.clear();
  TheState().events.clear();
  TheState().problems.clear();
}

std::vector<Call> Calls(int device) {
  const std::lock_guard lock(TheState().mutex);
  return TheState().calls[device];
}

int Count(int device, const std::string& name) {
  int count = 0;
  for (const Call& call : Calls(device)) count += call.name == name ? 1 : 0;
  return count;
}

std::vector<std::string> Problems() {
  const std::lock_guard lock(TheState().mutex);
  return TheState().problems;
}

bool IsDeviceMemory(const void* data) { return Holds(data, /*pinned=*/false); }
bool IsPinnedMemory(const void* data) { return Holds(data, /*pinned=*/true); }

void SetInStep(bool in_step) { t_in_step = in_step; }
void LaunchOnCurrentStream(std::function<void()> work) { cuda::CurrentStream()->Add(std::move(work)); }
void SynchronizeCurrentStream() { cuda::CurrentStream()->Synchronize(); }

std::vector<std::string> RunRanks(int ranks, const std::function<void(Collectives&)>& rank_main,
                                  const NcclOptions& options) {
  std::promise<std::string> id;
  const std::shared_future<std::string> shared = id.get_future().share();
  std::vector<std::string> errors(ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      cuda::UseDevice(rank);
      try {
        const auto share = [&](const std::string& bytes) {
          if (rank == 0) id.set_value(bytes);
          return shared.get();
        };
        const std::unique_ptr<Collectives> comm = MakeNcclCollectives(rank, ranks, share, options);
        rank_main(*comm);
      } catch (const std::exception& error) {
        errors[rank] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return errors;
}

}  // namespace simpo::stand_in

namespace simpo::cuda {

using namespace stand_in;  // NOLINT: this is it

int DeviceCount() { return 8; }
void UseDevice(int device) {
  t_device = device;
  t_current = nullptr;
}
int CurrentDevice() { return t_device; }

bool OnDevice(const at::Tensor& tensor) {
  return at::isFloatingType(tensor.scalar_type()) && tensor.element_size() <= 4;
}
at::Tensor DeviceEmpty(int64_t bytes) { return Allocate(bytes, /*pinned=*/false); }
at::Tensor PinnedEmpty(int64_t bytes) { return Allocate(bytes, /*pinned=*/true); }

cudaStream_t CurrentStream() {
  if (t_current == nullptr) t_current = CUstream_st::Make("current");
  return t_current;
}
cudaStream_t NewStream() { return CUstream_st::Make("comm"); }

cudaEvent_t NewEvent() {
  const std::lock_guard lock(TheState().mutex);
  return new CUevent_st{.number = TheState().events[t_device]++};
}
void FreeEvent(cudaEvent_t event) { delete event; }

void RecordEvent(cudaEvent_t event, cudaStream_t stream) {
  Log({.name = "RecordEvent", .stream = stream->name, .event = event->number}, t_device);
  const std::shared_ptr<CUevent_st::State> state = event->state;
  int64_t number = 0;
  {
    const std::lock_guard lock(state->mutex);
    number = ++state->recorded;
  }
  stream->Add([state, number] {
    const std::lock_guard lock(state->mutex);
    state->done = number;
    state->changed.notify_all();
  });
  if (stream == t_current && t_in_step) stream->Synchronize();
}

void StreamWaitEvent(cudaStream_t stream, cudaEvent_t event) {
  Log({.name = "StreamWaitEvent", .stream = stream->name, .event = event->number}, t_device);
  const std::shared_ptr<CUevent_st::State> state = event->state;
  int64_t number = 0;
  {
    const std::lock_guard lock(state->mutex);
    number = state->recorded;
  }
  if (number == 0) Problem("an event is waited for before it is recorded: that waits for nothing");
  stream->Add([state, number] {
    std::unique_lock lock(state->mutex);
    state->changed.wait(lock, [&] { return state->done >= number; });
  });
  if (stream == t_current && t_in_step) stream->Synchronize();
}

bool EventDone(cudaEvent_t event) {
  const std::lock_guard lock(event->state->mutex);
  return event->state->done == event->state->recorded;
}

void CopyAsync(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  Log({.name = "CopyAsync", .stream = stream->name, .from = from, .to = to, .count = bytes}, t_device);
  stream->Add([to, from, bytes] { std::memcpy(to, from, bytes); });
}

}  // namespace simpo::cuda
