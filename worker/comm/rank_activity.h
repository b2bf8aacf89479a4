#ifndef SIMPO_WORKER_COMM_RANK_ACTIVITY_H_
#define SIMPO_WORKER_COMM_RANK_ACTIVITY_H_

#include <chrono>
#include <cstdint>
#include <mutex>
#include <optional>

namespace simpo {

// What a rank is doing, for a thread that watches it. Thread-safe.
class RankActivity {
 public:
  struct State {
    int64_t moves = 0;        // grows whenever the rank gets on
    int64_t collectives = 0;  // begun so far; the same number is the same collective on every rank
    const char* verb = "";    // of the last one
    int64_t bytes = 0;        // of its tensor on this rank
    double waiting_s = 0;     // how long the rank has been waiting for one to be done; 0: it is not waiting
    double waited_s = 0;      // in all
  };

  // The rank got something done: a micro-batch, a tensor.
  void Moved() {
    const std::lock_guard lock(mutex_);
    ++state_.moves;
  }
  // It begins a collective. `verb` is a literal.
  void Began(const char* verb, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    ++state_.moves;
    ++state_.collectives;
    state_.verb = verb;
    state_.bytes = bytes;
  }
  // Between these two it waits for one. One thread waits at a time.
  void BeginWait() {
    const std::lock_guard lock(mutex_);
    wait_began_ = Clock::now();
  }
  void EndWait() {
    const std::lock_guard lock(mutex_);
    ++state_.moves;
    if (wait_began_) state_.waited_s += std::chrono::duration<double>(Clock::now() - *wait_began_).count();
    wait_began_.reset();
  }

  State Now() const {
    const std::lock_guard lock(mutex_);
    State state = state_;
    if (wait_began_) state.waiting_s = std::chrono::duration<double>(Clock::now() - *wait_began_).count();
    return state;
  }

 private:
  using Clock = std::chrono::steady_clock;
  mutable std::mutex mutex_;
  State state_;
  std::optional<Clock::time_point> wait_began_;
};

}  // namespace simpo

#endif  // SIMPO_WORKER_COMM_RANK_ACTIVITY_H_
