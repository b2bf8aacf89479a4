#ifndef SIMPO_TESTS_WORKER_COMM_STAND_IN_STATE_H_
#define SIMPO_TESTS_WORKER_COMM_STAND_IN_STATE_H_

#include <condition_variable>
#include <deque>
#include <functional>
#include <future>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "tests/worker/comm/stand_in.h"

// What the two halves of the stand-in share.
namespace simpo::stand_in {

struct State {
  std::mutex mutex;
  std::condition_variable changed;
  Faults faults;
  std::map<int, std::vector<Call>> calls;  // by device
  std::map<int, int> events;               // made so far, by device
  std::vector<std::string> problems;
  std::vector<CUstream_st*> streams;  // all of the process
};
State& TheState();
void Log(Call call, int device);
void Problem(const std::string& text);
int Device();  // of the calling thread

}  // namespace simpo::stand_in

// What a cudaStream_t points to: a thread that does what it is given, in order. It is never freed.
struct CUstream_st {
  std::string name;
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<std::function<void()>> queue;
  bool busy = false;

  static CUstream_st* Make(const char* name) {
    auto* stream = new CUstream_st{.name = name};
    std::thread([stream] { stream->Loop(); }).detach();
    simpo::stand_in::State& state = simpo::stand_in::TheState();
    const std::lock_guard lock(state.mutex);
    state.streams.push_back(stream);
    return stream;
  }
  void Add(std::function<void()> work) {
    const std::lock_guard lock(mutex);
    queue.push_back(std::move(work));
    changed.notify_all();
  }
  void Synchronize() {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return queue.empty() && !busy; });
  }
  void Loop() {
    std::unique_lock lock(mutex);
    while (true) {
      changed.wait(lock, [&] { return !queue.empty(); });
      const std::function<void()> work = std::move(queue.front());
      queue.pop_front();
      busy = true;
      lock.unlock();
      work();
      lock.lock();
      busy = false;
      changed.notify_all();
    }
  }
};

#endif  // SIMPO_TESTS_WORKER_COMM_STAND_IN_STATE_H_
