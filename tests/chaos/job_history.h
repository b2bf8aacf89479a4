// What must hold of jobs whatever is killed: a model of everything that was asked of a coordinator and of everything
// that it has ever said, and the checks of the one against the other.
#ifndef SIMPO_TESTS_CHAOS_JOB_HISTORY_H_
#define SIMPO_TESTS_CHAOS_JOB_HISTORY_H_

#include <google/protobuf/repeated_field.h>

#include <algorithm>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/job_state.h"
#include "coordinator/moment.h"
#include "simpo/v1/training_service.pb.h"
#include "simulated_run.h"

namespace simpo {

// One job as its submitter knows it. Under the history's mutex, but for what is const.
struct TrackedJob {
  explicit TrackedJob(std::string request_id, SimulatedJob spec)
      : request_id(std::move(request_id)), spec(std::move(spec)) {}

  const std::string request_id;
  const SimulatedJob spec;
  std::string id;      // empty: no answer has come yet
  bool acked = false;  // the submit was answered
  bool cancel_tried = false;
  bool cancel_acked = false;  // by an answer that said that it had not ended before
  int64_t cancel_acked_at = 0;
  std::set<int> priorities = {0};                  // that it may have
  v1::JobState ended = v1::JOB_STATE_UNSPECIFIED;  // a final state that somebody was told of
  int64_t ended_at = 0;
  std::vector<std::string> events;                 // serialized; all that anybody was shown, from the first
  v1::JobState state = v1::JOB_STATE_UNSPECIFIED;  // after the last of them
  bool settled = false;                            // it has ended, and all of it was looked at

  bool MaySucceed() const { return spec.exit_code == 0 && spec.faults <= spec.max_restarts; }
};

// Whether three attempts in a row, a killed one among them, were lost to faults of the job after one and the same
// checkpoint: those are the last.
inline bool WasKilledTooOften(const v1::GetJobResponse& got) {
  const int count = got.attempts_size();
  bool killed = false;
  for (int i = std::max(0, count - 3); i < count; ++i) {
    const v1::Attempt& attempt = got.attempts(i);
    if (attempt.fault() != v1::FAULT_KIND_JOB) return false;
    if (attempt.checkpoint_step() != got.attempts(count - 1).checkpoint_step()) return false;
    killed |= attempt.exit_code() == 128 + SIGKILL;
  }
  return count >= 3 && killed;
}

// Thread-safe.
class JobHistory {
 public:
  using JobPtr = std::shared_ptr<TrackedJob>;

  explicit JobHistory(std::filesystem::path journal) : journal_(std::move(journal)) {}

  // --- what was found wrong
  void Fail(const std::string& what) {
    const std::lock_guard lock(mutex_);
    FailLocked(what);
  }
  size_t violations() const {
    const std::lock_guard lock(mutex_);
    return violations_;
  }

  // --- what was asked, and what was answered. Answers come late: `asked_at` is Now() from before the question, and
  // what was learned since then may be newer than the answer.
  int64_t Now() {
    const std::lock_guard lock(mutex_);
    return ++now_;
  }
  JobPtr Add(std::string request_id, SimulatedJob spec) {
    const std::lock_guard lock(mutex_);
    auto job = std::make_shared<TrackedJob>(request_id, std::move(spec));
    by_request_[request_id] = job;
    jobs_.push_back(job);
    return job;
  }
  void SubmitAnswered(TrackedJob& job, const v1::SubmitJobResponse& response, int64_t asked_at) {
    const std::lock_guard lock(mutex_);
    job.acked = true;
    TakeId(job, response.job());
    TakeState(job, response.job().state(), asked_at);
  }
  void CancelTried(TrackedJob& job) {
    const std::lock_guard lock(mutex_);
    job.cancel_tried = true;
  }
  void CancelAnswered(TrackedJob& job, const v1::Job& answer, int64_t asked_at) {
    const std::lock_guard lock(mutex_);
    TakeId(job, answer);
    TakeState(job, answer.state(), asked_at);
    if (IsFinal(answer.state())) return;
    if (answer.state() != v1::JOB_STATE_CANCELLING) {
      FailLocked(absl::StrCat("job ", job.id, ": a cancel was acknowledged in state ", JobStateName(answer.state())));
    }
    job.cancel_acked = true;
    job.cancel_acked_at = ++now_;
  }
  void PriorityTried(TrackedJob& job, int priority) {
    const std::lock_guard lock(mutex_);
    job.priorities.insert(priority);
  }
  void PriorityAnswered(TrackedJob& job, int priority) {
    const std::lock_guard lock(mutex_);
    job.priorities = {priority};
  }
  // Any picture of a job: its state may not contradict what was said before.
  void Saw(const v1::Job& job, int64_t asked_at) {
    const std::lock_guard lock(mutex_);
    if (TrackedJob* tracked = FindLocked(job)) TakeState(*tracked, job.state(), asked_at);
  }
  // Events that follow each other, of any part of a job's life that joins what is known.
  void SawEvents(TrackedJob& job, const google::protobuf::RepeatedPtrField<v1::JobEvent>& events) {
    const std::lock_guard lock(mutex_);
    TakeEvents(job, events);
  }
  int64_t events_known(const TrackedJob& job) const {
    const std::lock_guard lock(mutex_);
    return static_cast<int64_t>(job.events.size());
  }

  // All jobs that were acknowledged and have not settled.
  std::vector<JobPtr> Unsettled(bool acked_only = true) const {
    const std::lock_guard lock(mutex_);
    std::vector<JobPtr> found;
    for (size_t i = first_unsettled_; i < jobs_.size(); ++i) {
      if (!jobs_[i]->settled && (jobs_[i]->acked || !acked_only)) found.push_back(jobs_[i]);
    }
    return found;
  }
  // Of which nobody has been told that they have ended.
  size_t CountLive() const {
    const std::lock_guard lock(mutex_);
    return static_cast<size_t>(
        std::count_if(jobs_.begin() + static_cast<std::ptrdiff_t>(first_unsettled_), jobs_.end(),
                      [](const JobPtr& job) { return job->acked && job->ended == v1::JOB_STATE_UNSPECIFIED; }));
  }
  std::vector<JobPtr> All() const {
    const std::lock_guard lock(mutex_);
    return jobs_;
  }

  // A list of the newest jobs, asked for after `expected` were known: all of these must be there, and nothing that
  // nobody asked for, and no request twice.
  void CheckList(const std::vector<v1::Job>& listed, const std::vector<JobPtr>& expected, int64_t asked_at) {
    const std::lock_guard lock(mutex_);
    std::set<std::string> requests, ids;
    for (const v1::Job& job : listed) {
      ids.insert(job.id());
      if (!requests.insert(job.request_id()).second) {
        FailLocked(absl::StrCat("request ", job.request_id(), " has become two jobs"));
      }
      if (TrackedJob* tracked = FindLocked(job)) TakeState(*tracked, job.state(), asked_at);
    }
    for (const JobPtr& job : expected) {
      if (!ids.contains(job->id)) FailLocked(absl::StrCat("job ", job->id, " was acknowledged and is lost"));
    }
  }

  // A job that must have ended: all of it.
  void CheckEnded(TrackedJob& job, const v1::GetJobResponse& got, const std::vector<v1::MetricPoint>& points) {
    const std::lock_guard lock(mutex_);
    TakeId(job, got.job());
    TakeState(job, got.job().state(), now_ + 1);
    TakeEvents(job, got.events());
    const v1::JobState state = got.job().state();
    const std::string name = absl::StrCat("job ", job.id, " (", job.request_id, ")");
    const auto fail = [&](const std::string& what) {
      FailLocked(absl::StrCat(name, ": ", what, "; ", got.job().reason()));
    };
    if (job.events.empty() || job.state != state) {
      fail(absl::StrCat("is ", JobStateName(state), ", its last event says ", JobStateName(job.state)));
    }
    if (state == v1::JOB_STATE_SUCCEEDED && !job.MaySucceed()) fail("succeeded, although its gang never does");
    const bool may_fail = !job.MaySucceed() || WasKilledTooOften(got);
    if (state == v1::JOB_STATE_FAILED && (!may_fail || job.cancel_acked)) fail("failed");
    if (state == v1::JOB_STATE_CANCELLED && !job.cancel_tried) fail("was cancelled, although nobody asked for it");
    if (!job.priorities.contains(got.job().priority())) fail(absl::StrCat("has priority ", got.job().priority()));
    int64_t end_ms = 0;
    for (int i = 0; i < got.attempts_size(); ++i) {
      const v1::Attempt& attempt = got.attempts(i);
      if (attempt.number() != i + 1) fail(absl::StrCat("attempt ", attempt.number(), " stands in place ", i + 1));
      if (!attempt.has_end_time()) fail(absl::StrCat("attempt ", i + 1, " has no end"));
      if (UnixMillis(attempt.start_time()) < end_ms) fail(absl::StrCat("attempt ", i + 1, " began before its time"));
      end_ms = UnixMillis(attempt.end_time());
      const auto prepared = journal_lines_.find(absl::StrCat("prepare ", job.id, " ", i + 1));
      if (prepared == journal_lines_.end() && attempt.exit_code() == 0 && attempt.has_exit_code()) {
        fail(absl::StrCat("attempt ", i + 1, " ended well and was never started"));
      }
    }
    if (got.job().attempt() != got.attempts_size()) fail("its attempts are not all there");
    CheckPoints(job, got.job(), points, name);
    job.settled = true;
    while (first_unsettled_ < jobs_.size() && jobs_[first_unsettled_]->settled) ++first_unsettled_;
  }

  // What gangs have written since the last call.
  void ReadJournal() {
    const std::lock_guard lock(mutex_);
    std::ifstream file(journal_);
    file.seekg(journal_offset_);
    for (std::string line; std::getline(file, line) && !file.eof();) {
      journal_offset_ += static_cast<std::streamoff>(line.size()) + 1;
      std::istringstream words(line);
      std::string verb, job, attempt;
      words >> verb >> job >> attempt;
      if (verb == "prepare") {
        const std::filesystem::path folder = job;
        job = folder.parent_path().filename().string();
        attempt = folder.filename().string();
      }
      if (verb == "start") ++attempts_;
      if (verb == "overlap") {
        FailLocked(absl::StrCat("job ", job, ": attempt ", attempt, " began while an earlier one still ran"));
      } else if (++journal_lines_[absl::StrCat(verb, " ", job, " ", attempt)] > 1) {
        FailLocked(absl::StrCat("job ", job, ": '", verb, "' of attempt ", attempt, " happened twice"));
      }
    }
  }

  struct Figures {
    int64_t jobs = 0, acked = 0, attempts = 0, events = 0, points = 0;
    std::map<v1::JobState, int64_t> states;
  };
  Figures figures() const {
    const std::lock_guard lock(mutex_);
    Figures figures{.attempts = attempts_, .points = points_};
    for (const JobPtr& job : jobs_) {
      ++figures.jobs;
      figures.acked += job->acked;
      figures.events += static_cast<int64_t>(job->events.size());
      if (job->settled) ++figures.states[job->ended];
    }
    return figures;
  }

 private:
  void FailLocked(const std::string& what) {
    ++violations_;
    std::printf("VIOLATION: %s\n", what.c_str());
    std::fflush(stdout);
  }
  TrackedJob* FindLocked(const v1::Job& job) {
    const auto found = by_request_.find(job.request_id());
    if (found == by_request_.end()) {
      FailLocked(absl::StrCat("job ", job.id(), " of request '", job.request_id(), "' was never asked for"));
      return nullptr;
    }
    TakeId(*found->second, job);
    return found->second.get();
  }
  void TakeId(TrackedJob& job, const v1::Job& shown) {
    if (job.id.empty()) job.id = shown.id();
    if (job.id != shown.id() || job.request_id != shown.request_id()) {
      FailLocked(absl::StrCat("request ", job.request_id, " is job ", job.id, " and job ", shown.id(), " (request ",
                              shown.request_id(), ")"));
    }
  }
  void TakeState(TrackedJob& job, v1::JobState state, int64_t asked_at) {
    if (job.ended != v1::JOB_STATE_UNSPECIFIED && state != job.ended && job.ended_at < asked_at) {
      FailLocked(absl::StrCat("job ", job.id, " was ", JobStateName(job.ended), " and is ", JobStateName(state)));
    }
    if (IsFinal(state) && job.ended == v1::JOB_STATE_UNSPECIFIED) {
      job.ended = state;
      job.ended_at = ++now_;
    }
    if (job.cancel_acked && job.cancel_acked_at < asked_at && !IsFinal(state) && state != v1::JOB_STATE_CANCELLING) {
      FailLocked(absl::StrCat("job ", job.id, " has forgotten its cancel and is ", JobStateName(state)));
    }
  }
  static bool InTable(v1::JobState from, v1::JobState to) {
    return from == to || std::any_of(kJobTriggers.begin(), kJobTriggers.end(), [&](JobTrigger trigger) {
             const auto transition = NextState(from, trigger);
             return transition && transition->next == to;
           });
  }
  void TakeEvents(TrackedJob& job, const google::protobuf::RepeatedPtrField<v1::JobEvent>& events) {
    for (const v1::JobEvent& event : events) {
      const auto place = static_cast<size_t>(event.sequence()) - 1;
      const std::string text = event.SerializeAsString();
      if (place < job.events.size()) {
        if (job.events[place] != text) {
          FailLocked(
              absl::StrCat("job ", job.id, ": event ", event.sequence(), " is another one now: ", event.message()));
        }
        continue;
      }
      if (place > job.events.size()) {
        // Only a picture with the last 200 events may begin later; none of these jobs has so many.
        FailLocked(absl::StrCat("job ", job.id, ": events ", job.events.size() + 1, " to ", place, " are missing"));
        return;
      }
      const bool first = job.events.empty();
      if (first ? event.state() != v1::JOB_STATE_QUEUED : !InTable(job.state, event.state())) {
        FailLocked(absl::StrCat("job ", job.id, ": ", first ? "begins" : JobStateName(job.state), " -> ",
                                JobStateName(event.state()), " (", event.type(), ") is no move of the table"));
      }
      job.events.push_back(text);
      job.state = event.state();
    }
  }
  // Every step once, with the numbers of a run that nothing has disturbed, and all that stands in the file.
  void CheckPoints(const TrackedJob& job, const v1::Job& shown, const std::vector<v1::MetricPoint>& points,
                   const std::string& name) {
    SimulatedRun run(job.spec.seed);
    int64_t step = 0;
    int attempt = 0;
    for (const v1::MetricPoint& point : points) {
      run.Step();
      ++step;
      const auto loss = point.values().find("loss");
      if (point.step() != step) {
        return FailLocked(absl::StrCat(name, ": the point of step ", step, " is that of step ", point.step()));
      }
      if (loss == point.values().end() || loss->second != run.loss()) {
        return FailLocked(absl::StrCat(name, ": step ", step, " has another loss than an undisturbed run"));
      }
      // The last attempt may have stopped before it did again all that an earlier one had done.
      if (point.attempt() < attempt && step <= shown.progress().step()) {
        FailLocked(absl::StrCat(name, ": step ", step, " is of an earlier attempt"));
      }
      attempt = point.attempt();
    }
    if (!job.settled) points_ += step;
    int64_t lines = 0;
    std::ifstream file(std::filesystem::path(shown.output_dir()) / "metrics.jsonl");
    for (std::string line; std::getline(file, line) && !file.eof();) ++lines;
    if (lines > step) FailLocked(absl::StrCat(name, ": ", lines, " steps were taken, but ", step, " are stored"));
    if (shown.state() == v1::JOB_STATE_SUCCEEDED && (step != job.spec.steps || lines != step)) {
      FailLocked(absl::StrCat(name, ": succeeded with ", step, " of ", job.spec.steps, " steps"));
    }
  }

  const std::filesystem::path journal_;
  mutable std::mutex mutex_;
  size_t violations_ = 0;
  int64_t now_ = 0;
  std::vector<JobPtr> jobs_;
  std::map<std::string, JobPtr> by_request_;
  size_t first_unsettled_ = 0;
  std::streamoff journal_offset_ = 0;
  std::map<std::string, int> journal_lines_;  // "VERB JOB ATTEMPT": how often
  int64_t attempts_ = 0, points_ = 0;
};

}  // namespace simpo

#endif  // SIMPO_TESTS_CHAOS_JOB_HISTORY_H_
