#include "coordinator/controller.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/rpc_errors.h"

namespace simpo {
namespace {

constexpr std::chrono::milliseconds kTick{200};
// Of what ranks say, in one group: a few milliseconds of work.
constexpr size_t kRankEventsOfAGroup = 256;
// Of what users ask, while the disk hangs: more than come at once when it does not.
constexpr size_t kMaxWaitingCalls = 100'000;
constexpr size_t kMaxWaitingBytes = 128 << 20;

absl::Status Stopping() { return absl::UnavailableError("the coordinator is stopping; ask again when it is back"); }

absl::Status TooManyWait(size_t calls) {
  return WithReason(absl::ResourceExhaustedError(absl::StrCat(
                        "nothing was changed: ", calls,
                        " calls wait for the coordinator's disk, and no more are taken until it has written them; ask "
                        "again in a minute, or have its administrator look at the disk of its data folder")),
                    "TOO_MANY_CALLS_WAIT");
}

}  // namespace

void Controller::Start(Launcher& launcher) {
  dispatcher_.Adopt(launcher, Moment::Now());
  thread_ = std::thread([this] { Run(); });
}

void Controller::Stop() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  posted_.notify_one();
  if (thread_.joinable()) thread_.join();
  RefuseAll(Stopping());
}

void Controller::Post(std::deque<Event>& queue, Event event) {
  event.arrived = std::chrono::steady_clock::now();
  absl::Status refusal;
  {
    const std::lock_guard lock(mutex_);
    const bool full = &queue == &of_users_ &&
                      (of_users_.size() >= kMaxWaitingCalls || bytes_of_users_ + event.bytes > kMaxWaitingBytes);
    if (!closed_ && !full) {
      bytes_of_users_ += event.bytes;
      queue.push_back(std::move(event));
      posted_.notify_one();
      return;
    }
    refusal = closed_ ? refusal_ : TooManyWait(of_users_.size());
  }
  event.refuse(refusal);
}

void Controller::RefuseAll(const absl::Status& status) {
  std::deque<Event> of_users, of_ranks;
  {
    const std::lock_guard lock(mutex_);
    if (!closed_) refusal_ = status;
    closed_ = true;
    of_users.swap(of_users_);
    bytes_of_users_ = 0;
    of_ranks.swap(of_ranks_);
  }
  for (const Event& event : of_users) event.refuse(status);
  for (const Event& event : of_ranks) event.refuse(status);
}

void Controller::Run() {
  SteadyTime next_tick = last_tick_ = Moment::Now().steady;
  while (true) {
    std::deque<Event> events;
    bool stop = false, tick = false;
    {
      std::unique_lock lock(mutex_);
      posted_.wait_until(lock, next_tick, [&] { return stop_ || woken_ || !of_users_.empty() || !of_ranks_.empty(); });
      events.swap(of_users_);
      bytes_of_users_ = 0;
      woken_ = false;
      stop = stop_;
      const SteadyTime now = Moment::Now().steady;
      tick = now >= next_tick && !stop;
      if (tick) next_tick = now + kTick;
      const size_t count = stop || tick ? of_ranks_.size() : std::min(of_ranks_.size(), kRankEventsOfAGroup);
      const auto end = of_ranks_.begin() + static_cast<std::ptrdiff_t>(count);
      std::move(of_ranks_.begin(), end, std::back_inserter(events));
      of_ranks_.erase(of_ranks_.begin(), end);
    }
    if (!Work(events, tick, /*last=*/stop) || stop) return;
  }
}

bool Controller::Work(const std::deque<Event>& events, bool tick, bool last) {
  const Moment now = Moment::Now();
  for (const Event& event : events) event.apply({.steady = event.arrived, .unix_ms = now.unix_ms});
  if (tick) {
    dispatcher_.ExcuseSilence(now, now.steady - std::exchange(last_tick_, now.steady));
    dispatcher_.Tick(now);
  }
  const absl::Status status = last ? dispatcher_.FlushAll(now) : dispatcher_.Flush(now);
  {
    const std::lock_guard lock(mutex_);
    stats_ = dispatcher_.stats();
  }
  if (status.ok()) return true;
  RefuseAll(absl::UnavailableError(
      absl::StrCat("the coordinator cannot write its database and stops: ", std::string(status.message()))));
  on_failure_(status);
  return false;
}

void Controller::Submit(Submission submission, std::string request_id, const Dispatcher::SubmitDone& done) {
  if (absl::Status status = dispatcher_.Prepare(submission); !status.ok()) return done(std::move(status));
  const size_t bytes = submission.job.config_yaml().size();  // a short file may stand for a large job
  Post(of_users_,
       {.apply = [this, submission = std::move(submission), request_id = std::move(request_id),
                  done](Moment now) mutable { dispatcher_.Submit(std::move(submission), request_id, now, done); },
        .refuse = [done](const absl::Status& status) { done(status); },
        .bytes = bytes});
}

void Controller::Check(v1::Job job, std::string output_dir, const std::function<void(absl::Status)>& done) {
  Post(of_users_, {.apply = [this, job = std::move(job), output_dir = std::move(output_dir),
                             done](Moment) { done(dispatcher_.Check(job, output_dir)); },
                   .refuse = done});
}

void Controller::Cancel(std::string job_id, const Dispatcher::CancelDone& done) {
  Post(of_users_,
       {.apply = [this, job_id = std::move(job_id), done](Moment now) { dispatcher_.Cancel(job_id, now, done); },
        .refuse = [done](const absl::Status& status) { done(status); }});
}

void Controller::SetPriority(std::string job_id, int priority, const Dispatcher::PriorityDone& done) {
  Post(of_users_, {.apply = [this, job_id = std::move(job_id), priority,
                             done](Moment now) { dispatcher_.SetPriority(job_id, priority, now, done); },
                   .refuse = [done](const absl::Status& status) { done(status); }});
}

void Controller::Checkpoint(std::string job_id, const Dispatcher::CheckpointDone& done) {
  Post(of_users_,
       {.apply = [this, job_id = std::move(job_id), done](Moment now) { dispatcher_.Checkpoint(job_id, now, done); },
        .refuse = [done](const absl::Status& status) { done(status); }});
}

void Controller::SetDrained(std::string node, std::string reason, bool keep_running, const Dispatcher::NodeDone& done) {
  Post(of_users_, {.apply = [this, node = std::move(node), reason = std::move(reason), keep_running,
                             done](Moment now) { dispatcher_.SetDrained(node, reason, keep_running, now, done); },
                   .refuse = [done](const absl::Status& status) { done(status); }});
}

void Controller::ListNodes(v1::ListNodesRequest request,
                           const std::function<void(absl::StatusOr<v1::ListNodesResponse>)>& done) {
  Post(of_users_,
       {.apply = [this, request = std::move(request), done](Moment) { done(dispatcher_.ListNodes(request)); },
        .refuse = [done](const absl::Status& status) { done(status); }});
}

void Controller::Attach(v1::Hello hello, const std::shared_ptr<RankChannel>& channel) {
  Post(of_ranks_,
       {.apply = [this, hello = std::move(hello), channel](Moment now) { dispatcher_.Attach(hello, channel, now); },
        .refuse = [channel](const absl::Status& status) { channel->Close(status); }});
}

void Controller::Receive(RankId from, v1::AttachRequest message, std::function<void()> taken) {
  Post(of_ranks_,
       {.apply =
            [this, from = std::move(from), message = std::move(message), taken = std::move(taken)](Moment now) mutable {
              dispatcher_.Receive(from, std::move(message), now);
              dispatcher_.WhenRoom(taken);
            },
        .refuse = [](const absl::Status&) {}});
}

void Controller::Leave(RankId rank, const std::shared_ptr<RankChannel>& channel) {
  Post(of_ranks_, {.apply = [this, rank = std::move(rank), channel](Moment) { dispatcher_.Leave(rank, channel); },
                   .refuse = [channel](const absl::Status& status) { channel->Close(status); }});
}

void Controller::Wake() {
  {
    const std::lock_guard lock(mutex_);
    woken_ = true;
  }
  posted_.notify_one();
}

Dispatcher::Stats Controller::stats() const {
  const std::lock_guard lock(mutex_);
  return stats_;
}

}  // namespace simpo
