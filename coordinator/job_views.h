#ifndef SIMPO_COORDINATOR_JOB_VIEWS_H_
#define SIMPO_COORDINATOR_JOB_VIEWS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "coordinator/histogram.h"
#include "simpo/v1/job.pb.h"

namespace simpo {

// What the metrics page says of a job.
struct JobInfo {
  std::string model, loss_type, launcher;
};

// A job as others see it: a picture taken right after a commit, which never changes. So everything in
// it belongs to one moment, and to one training step.
struct JobView {
  int64_t sequence = 0;  // the key in the stores
  uint64_t version = 0;  // another one: something changed that a watcher should hear of
  std::string request_digest;
  v1::Job job;  // without config_yaml
  std::vector<v1::Attempt> attempts;
  std::string secret;  // of the attempt whose ranks may report; empty: none

  // For the metrics page.
  JobInfo info;
  Histogram step_seconds;
  int64_t checkpoint_ms = 0;         // Unix time; 0: none
  std::vector<v1::RankState> ranks;  // those that were heard
};

// The current picture of every job. Thread-safe.
class JobViews {
 public:
  using View = std::shared_ptr<const JobView>;

  // `listener` is called after each Publish, by its thread; it must not block. Set before the first.
  void SetListener(std::function<void()> listener) { listener_ = std::move(listener); }

  void Publish(std::vector<View> views);
  // Of a job that is no more. Its pictures live on with those who hold one.
  void Remove(int64_t sequence);
  // By id, by a name that only one job has, or by the beginning of an id. NOT_FOUND, or
  // FAILED_PRECONDITION with the candidates when several match.
  absl::StatusOr<View> Find(const std::string& reference) const;
  // Empty: there is none.
  View FindById(const std::string& id) const;
  View FindByRequestId(const std::string& request_id) const;
  // In order of submission.
  std::vector<View> All() const;

 private:
  std::function<void()> listener_;
  mutable std::mutex mutex_;
  std::map<int64_t, View> by_sequence_;           // guarded by mutex_
  std::map<std::string, int64_t> by_id_;          // guarded by mutex_
  std::map<std::string, int64_t> by_request_id_;  // guarded by mutex_
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_JOB_VIEWS_H_
