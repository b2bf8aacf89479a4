#ifndef SIMPO_COORDINATOR_CONTROLLER_H_
#define SIMPO_COORDINATOR_CONTROLLER_H_

#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "coordinator/dispatcher.h"

namespace simpo {

// The Dispatcher's thread, and the queues through which all others reach it. What waits is taken as one group
// and committed at once: all that users ask, and a bounded part of what ranks say, so that no flood of reports
// holds up a submit. What ranks say counts as heard when it came, however long it waited here, and before ranks are
// judged at a tick all that came is taken. Of what users ask only so much waits; the rest is refused at once, so that
// a disk that hangs fills no memory. Thread-safe; no function waits for the disk.
class Controller {
 public:
  // `on_failure` is called once, by the controller's thread, when the stores cannot be written any more;
  // by then everything that waits is refused.
  Controller(Dispatcher& dispatcher, std::function<void(const absl::Status&)> on_failure)
      : dispatcher_(dispatcher), on_failure_(std::move(on_failure)) {}
  ~Controller() { Stop(); }

  // Adopts what is left of an earlier coordinator and begins to work.
  void Start(Launcher& launcher);
  // Works off the queue and ends the thread. Gangs go on. What comes later is refused.
  void Stop();

  // `done` is called by the controller's thread once the answer is durable.
  void Submit(Submission submission, std::string request_id, const Dispatcher::SubmitDone& done);
  void Check(v1::Job job, std::string output_dir, const std::function<void(absl::Status)>& done);
  void Cancel(std::string job_id, const Dispatcher::CancelDone& done);
  void SetPriority(std::string job_id, int priority, const Dispatcher::PriorityDone& done);
  void Checkpoint(std::string job_id, const Dispatcher::CheckpointDone& done);
  void SetDrained(std::string node, std::string reason, bool keep_running, const Dispatcher::NodeDone& done);
  void ListNodes(v1::ListNodesRequest request, const std::function<void(absl::StatusOr<v1::ListNodesResponse>)>& done);

  void Attach(v1::Hello hello, const std::shared_ptr<RankChannel>& channel);
  // `taken` is called when the next message may come.
  void Receive(RankId from, v1::AttachRequest message, std::function<void()> taken);
  void Leave(RankId rank, const std::shared_ptr<RankChannel>& channel);

  // Points have been stored: those who wait for it are told.
  void Wake();

  Dispatcher::Stats stats() const;

 private:
  struct Event {
    std::function<void(Moment)> apply;
    std::function<void(const absl::Status&)> refuse;
    size_t bytes = 0;  // that it holds, where a user chooses how many
    SteadyTime arrived{};
  };
  void Post(std::deque<Event>& queue, Event event);
  void Run();
  // False when the stores have failed.
  bool Work(const std::deque<Event>& events, bool tick, bool last);
  void RefuseAll(const absl::Status& status);

  Dispatcher& dispatcher_;  // belongs to thread_ once it runs
  const std::function<void(const absl::Status&)> on_failure_;
  mutable std::mutex mutex_;
  std::condition_variable posted_;
  std::deque<Event> of_users_;  // guarded by mutex_
  size_t bytes_of_users_ = 0;   // guarded by mutex_; those of of_users_
  std::deque<Event> of_ranks_;  // guarded by mutex_; in order, since a stream's last word must not pass the others
  bool woken_ = false;          // guarded by mutex_
  bool stop_ = false;           // guarded by mutex_
  bool closed_ = false;         // guarded by mutex_; nothing is taken any more
  absl::Status refusal_;        // guarded by mutex_; of what comes once closed_
  Dispatcher::Stats stats_;     // guarded by mutex_
  SteadyTime last_tick_{};      // of thread_
  std::thread thread_;
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_CONTROLLER_H_
