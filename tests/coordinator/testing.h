// What the coordinator's tests share: folders, stores, a launcher and ranks of cardboard.
#ifndef SIMPO_TESTS_COORDINATOR_TESTING_H_
#define SIMPO_TESTS_COORDINATOR_TESTING_H_

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/resource.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "coordinator/database.h"
#include "coordinator/dispatcher.h"
#include "coordinator/job_record.h"
#include "coordinator/job_store.h"
#include "coordinator/job_views.h"
#include "coordinator/launcher.h"
#include "coordinator/metric_store.h"
#include "coordinator/submission.h"
#include "tests/temp_dir.h"

namespace simpo {

#define ASSERT_OK(expression)                               \
  do {                                                      \
    const absl::Status status_of_assert = (expression);     \
    ASSERT_TRUE(status_of_assert.ok()) << status_of_assert; \
  } while (false)

// The value itself: a range-for over `*Function()` would keep a reference into what is gone by then.
template <typename T>
T ValueOf(absl::StatusOr<T> result) {
  EXPECT_TRUE(result.ok()) << result.status();
  return *std::move(result);
}

// Polls until `condition` holds; false after a generous deadline.
inline bool Eventually(const std::function<bool()>& condition,
                       std::chrono::milliseconds deadline = std::chrono::milliseconds(30'000)) {
  const auto end = std::chrono::steady_clock::now() + deadline;
  while (!condition()) {
    if (std::chrono::steady_clock::now() > end) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return true;
}

// While it lives this process can open no file.
class NoMoreFiles {
 public:
  NoMoreFiles() {
    getrlimit(RLIMIT_NOFILE, &before_);
    const rlimit none = {.rlim_cur = 0, .rlim_max = before_.rlim_max};
    setrlimit(RLIMIT_NOFILE, &none);
  }
  ~NoMoreFiles() { setrlimit(RLIMIT_NOFILE, &before_); }

 private:
  rlimit before_ = {};
};

inline void WriteText(const std::filesystem::path& path, const std::string& text) {
  std::filesystem::create_directories(path.parent_path());
  std::ofstream(path, std::ios::binary) << text;
}

inline std::string ReadText(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// A job file that needs nothing of this machine; `more` are further lines.
inline std::string JobYaml(int ranks = 1, const std::string& more = "") {
  return absl::StrCat("model_name_or_path: org/model\ndataset_mixer: {org/data: 1.0}\nglobal_batch_size: 8\n",
                      "resources: {ranks_per_node: ", ranks, ", threads_per_rank: 1}\n", more);
}

inline v1::SubmitJobRequest SubmitRequest(const std::string& yaml, const std::string& request_id = "") {
  v1::SubmitJobRequest request;
  request.set_job_yaml(yaml);
  request.set_file_name("test.yaml");
  request.set_base_dir("/");
  request.set_request_id(request_id);
  request.set_user("alice");
  return request;
}

// The stores on one database file.
struct Stores {
  std::unique_ptr<Database> database;
  std::unique_ptr<JobStore> jobs;
  std::unique_ptr<MetricStore> metrics;

  static Stores Open(const std::filesystem::path& path) {
    Stores stores;
    stores.database = *Database::Open(path);
    stores.jobs = *JobStore::Open(*stores.database);
    stores.metrics = *MetricStore::Open(path.parent_path() / kMetricsFile);
    return stores;
  }
};

// A launcher whose gangs do what the test says. Thread-safe.
class FakeLauncher final : public Launcher {
 public:
  absl::StatusOr<bool> Start(const GangRequest& request) override {
    const std::lock_guard lock(mutex_);
    if (!start_error_.ok()) return start_error_;
    const std::string name = Name(request.job_id, request.attempt);
    if (gangs_.contains(name)) return false;
    gangs_[name].phase = GangStatus::Phase::kTraining;
    started_.push_back(request);
    return true;
  }
  GangStatus Poll(const std::string& job_id, int attempt) override {
    const std::lock_guard lock(mutex_);
    if (!look_error_.ok()) {
      return {.phase = GangStatus::Phase::kUnknown, .reason = std::string(look_error_.message())};
    }
    const auto gang = gangs_.find(Name(job_id, attempt));
    if (gang != gangs_.end()) return gang->second;
    GangStatus lost;
    lost.phase = GangStatus::Phase::kLost;
    lost.reason = "never started";
    return lost;
  }
  absl::Status Terminate(const std::string& job_id, int attempt) override { return Note("terminate", job_id, attempt); }
  absl::Status Kill(const std::string& job_id, int attempt) override { return Note("kill", job_id, attempt); }
  absl::StatusOr<std::string> ReadSecret(const std::string& job_id, int attempt) override {
    const std::lock_guard lock(mutex_);
    if (!look_error_.ok()) return look_error_;
    if (!gangs_.contains(Name(job_id, attempt))) return absl::NotFoundError("no such attempt");
    return absl::StrCat("secret-of-", Name(job_id, attempt));
  }
  absl::Status PublishAddress(const std::string& job_id, int attempt) override {
    return Note("publish", job_id, attempt);
  }

  void Forget(const std::string& job_id) override { Note("forget", job_id, 0).IgnoreError(); }

  void SetPhase(const std::string& job_id, int attempt, GangStatus::Phase phase) {
    const std::lock_guard lock(mutex_);
    gangs_[Name(job_id, attempt)].phase = phase;
  }
  void End(const std::string& job_id, int attempt, int exit_code, int64_t unix_ms = 0) {
    const std::lock_guard lock(mutex_);
    GangStatus& status = gangs_[Name(job_id, attempt)];
    status.phase = GangStatus::Phase::kEnded;
    status.exit.exit_code = exit_code;
    status.exit.time_ms = unix_ms;
  }
  void Lose(const std::string& job_id, int attempt, const std::string& reason) {
    const std::lock_guard lock(mutex_);
    GangStatus& status = gangs_[Name(job_id, attempt)];
    status.phase = GangStatus::Phase::kLost;
    status.reason = reason;
  }
  void FailStarts(const absl::Status& status) {
    const std::lock_guard lock(mutex_);
    start_error_ = status;
  }
  // From now on nothing can be looked at, read or signalled; with OK it can again.
  void FailLooks(const absl::Status& status) {
    const std::lock_guard lock(mutex_);
    look_error_ = status;
  }
  std::vector<GangRequest> started() const {
    const std::lock_guard lock(mutex_);
    return started_;
  }
  int Count(const std::string& verb) const {
    const std::lock_guard lock(mutex_);
    int count = 0;
    for (const std::string& note : notes_) count += note.rfind(verb, 0) == 0;
    return count;
  }

 private:
  static std::string Name(const std::string& job_id, int attempt) { return absl::StrCat(job_id, "/", attempt); }
  absl::Status Note(const char* verb, const std::string& job_id, int attempt) {
    const std::lock_guard lock(mutex_);
    if (!look_error_.ok()) return look_error_;
    notes_.push_back(absl::StrCat(verb, " ", Name(job_id, attempt)));
    return absl::OkStatus();
  }

  mutable std::mutex mutex_;
  absl::Status start_error_, look_error_;
  std::map<std::string, GangStatus> gangs_;
  std::vector<GangRequest> started_;
  std::vector<std::string> notes_;
};

// A rank's stream that remembers what came down. Thread-safe.
class FakeChannel final : public RankChannel {
 public:
  void Send(v1::AttachResponse response) override {
    const std::lock_guard lock(mutex_);
    sent_.push_back(std::move(response));
  }
  void Close(const absl::Status& status) override {
    const std::lock_guard lock(mutex_);
    if (!closed_) closed_ = status;
  }
  std::vector<v1::AttachResponse> sent() const {
    const std::lock_guard lock(mutex_);
    return sent_;
  }
  std::optional<absl::Status> closed() const {
    const std::lock_guard lock(mutex_);
    return closed_;
  }
  bool WasToldToStop() const {
    for (const v1::AttachResponse& response : sent()) {
      if (response.command().kind() == v1::COMMAND_KIND_STOP) return true;
    }
    return false;
  }
  // The newest acknowledged step, or -1.
  int64_t acknowledged() const {
    int64_t step = -1;
    for (const v1::AttachResponse& response : sent()) {
      if (response.has_ack()) step = response.ack().step();
    }
    return step;
  }

 private:
  mutable std::mutex mutex_;
  std::vector<v1::AttachResponse> sent_;
  std::optional<absl::Status> closed_;
};

inline v1::AttachRequest StepMessage(int64_t step, double loss = 0.5, const std::string& split = "train") {
  v1::AttachRequest message;
  v1::StepReport& report = *message.mutable_step();
  report.set_steps_planned(100);
  report.mutable_point()->set_step(step);
  report.mutable_point()->set_split(split);
  auto& values = *report.mutable_point()->mutable_values();
  values[split == "eval" ? "eval_loss" : "loss"] = loss;
  if (split == "train") values["step_seconds"] = 0.25;
  return message;
}

inline v1::AttachRequest EventMessage(const std::string& type, const std::string& message, int64_t step = 0) {
  v1::AttachRequest request;
  request.mutable_event()->set_type(type);
  request.mutable_event()->set_message(message);
  request.mutable_event()->set_step(step);
  return request;
}

// Of a rank that has got on since the last one.
inline v1::AttachRequest HeartbeatMessage(const std::string& phase) {
  static int64_t moves = 0;
  v1::AttachRequest request;
  request.mutable_heartbeat()->set_moves(++moves);
  request.mutable_heartbeat()->set_phase(phase);
  request.mutable_heartbeat()->set_steps_planned(100);
  return request;
}

}  // namespace simpo

#endif  // SIMPO_TESTS_COORDINATOR_TESTING_H_
