// Gangs that only pass time, for tests of the queue: simulated or real time, by the clock they are given.
#ifndef SIMPO_TESTS_COORDINATOR_SIMULATION_H_
#define SIMPO_TESTS_COORDINATOR_SIMULATION_H_

#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/job_record.h"
#include "coordinator/launcher.h"
#include "coordinator/submission.h"
#include "testing.h"

namespace simpo {

// A gang ends with 0 when its job's work is done. Asked to stop it leaves a little later with 143, and what
// it has done is kept; ended in any other way it is lost. Thread-safe.
class SimulatedLauncher final : public Launcher {
 public:
  static constexpr int64_t kCheckpointMs = 2'000;

  explicit SimulatedLauncher(std::function<int64_t()> now_ms) : now_ms_(std::move(now_ms)) {}

  // Of jobs that are not told otherwise.
  void SetWork(int64_t work_ms) { work_ms_ = work_ms; }
  void SetWork(const std::string& job_id, int64_t work_ms) {
    const std::lock_guard lock(mutex_);
    left_ms_[job_id] = work_ms;
  }
  // The gangs that were started since the last call.
  std::vector<GangRequest> TakeStarted() {
    const std::lock_guard lock(mutex_);
    return std::exchange(started_, {});
  }
  int starts() const {
    const std::lock_guard lock(mutex_);
    return starts_;
  }
  void Stop(const std::string& job_id, int attempt) {
    const std::lock_guard lock(mutex_);
    Gang* gang = Find(job_id, attempt);
    if (gang == nullptr || gang->leaves_ms) return;
    gang->leaves_ms = now_ms_() + kCheckpointMs;
    gang->keeps = true;
  }
  void LoseNode(const std::string& node) {
    const std::lock_guard lock(mutex_);
    for (auto& [name, gang] : gangs_) {
      const auto& nodes = gang.request.nodes;
      if (std::find(nodes.begin(), nodes.end(), node) != nodes.end())
        gang.lost = absl::StrCat("node ", node, " was lost");
    }
  }

  absl::StatusOr<bool> Start(const GangRequest& request) override {
    const std::lock_guard lock(mutex_);
    const int64_t left = left_ms_.try_emplace(request.job_id, work_ms_).first->second;
    gangs_[{request.job_id, request.attempt}] = {
        .request = request, .started_ms = now_ms_(), .done_ms = now_ms_() + left};
    started_.push_back(request);
    ++starts_;
    return true;
  }
  GangStatus Poll(const std::string& job_id, int attempt) override {
    const std::lock_guard lock(mutex_);
    Gang* gang = Find(job_id, attempt);
    GangStatus status{.phase = GangStatus::Phase::kTraining};
    if (gang == nullptr || !gang->lost.empty()) {
      status.phase = GangStatus::Phase::kLost;
      status.reason = gang == nullptr ? "never started" : gang->lost;
    } else if (now_ms_() >= gang->done_ms || (gang->leaves_ms && now_ms_() >= *gang->leaves_ms)) {
      status.phase = GangStatus::Phase::kEnded;
      status.exit.exit_code = now_ms_() >= gang->done_ms ? 0 : 143;
      if (gang->keeps) left_ms_[job_id] -= now_ms_() - gang->started_ms;
      gangs_.erase({job_id, attempt});
    }
    return status;
  }
  absl::Status Terminate(const std::string& job_id, int attempt) override {
    const std::lock_guard lock(mutex_);
    if (Gang* gang = Find(job_id, attempt)) gang->leaves_ms = now_ms_();
    return absl::OkStatus();
  }
  absl::Status Kill(const std::string& job_id, int attempt) override { return Terminate(job_id, attempt); }
  absl::StatusOr<std::string> ReadSecret(const std::string& job_id, int attempt) override { return "secret"; }
  absl::Status PublishAddress(const std::string&, int) override { return absl::OkStatus(); }

 private:
  struct Gang {
    GangRequest request;
    int64_t started_ms = 0;
    int64_t done_ms = 0;
    std::optional<int64_t> leaves_ms;
    bool keeps = false;  // its work
    std::string lost;    // why
  };
  Gang* Find(const std::string& job_id, int attempt) {
    const auto found = gangs_.find({job_id, attempt});
    return found == gangs_.end() ? nullptr : &found->second;
  }

  const std::function<int64_t()> now_ms_;
  mutable std::mutex mutex_;
  int64_t work_ms_ = 1'000;
  std::map<std::pair<std::string, int>, Gang> gangs_;
  std::map<std::string, int64_t> left_ms_;  // work of each job
  std::vector<GangRequest> started_;
  int starts_ = 0;
};

// A rank's stream that obeys the command to stop.
class SimulatedRank final : public RankChannel {
 public:
  SimulatedRank(SimulatedLauncher& launcher, std::string job_id, int attempt)
      : launcher_(launcher), job_id_(std::move(job_id)), attempt_(attempt) {}
  void Send(v1::AttachResponse response) override {
    if (response.command().kind() == v1::COMMAND_KIND_STOP) launcher_.Stop(job_id_, attempt_);
  }
  void Close(const absl::Status&) override {}

 private:
  SimulatedLauncher& launcher_;
  const std::string job_id_;
  const int attempt_;
};

inline v1::Hello HelloOf(const GangRequest& gang, int rank) {
  v1::Hello hello;
  hello.set_job_id(gang.job_id);
  hello.set_attempt(gang.attempt);
  hello.set_rank(rank);
  hello.set_world_size(gang.ranks);
  return hello;
}

// A job of a shape that job files cannot ask for yet, since mpirun knows one node only: one rank on each.
inline Submission SimulatedSubmission(const std::string& name, int nodes, int slots_per_node) {
  static const Submission plain = CheckSubmission(SubmitRequest(JobYaml()), 1'000'000);
  Submission submission = plain;
  submission.job.set_name(name);
  submission.job.set_nodes(nodes);
  submission.job.set_ranks(nodes);
  submission.job.set_slots(nodes * slots_per_node);
  return submission;
}

}  // namespace simpo

#endif  // SIMPO_TESTS_COORDINATOR_SIMULATION_H_
