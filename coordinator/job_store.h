#ifndef SIMPO_COORDINATOR_JOB_STORE_H_
#define SIMPO_COORDINATOR_JOB_STORE_H_

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/database.h"
#include "simpo/v1/job.pb.h"

namespace simpo {

// A job as it lies on disk.
struct StoredJob {
  int64_t sequence = 0;
  std::string request_digest;
  v1::Job job;  // with config_yaml only for InsertJob
  std::vector<v1::Attempt> attempts;
  int64_t last_event = 0;  // JobEvent.sequence of the newest; 0: none
  int64_t last_point = 0;  // the newest point that was stored before that event
};

// Jobs, attempts and events. Writes belong to the controller's thread and are durable after
// Database::Commit; reads see what is committed and are thread-safe.
class JobStore {
 public:
  static absl::StatusOr<std::unique_ptr<JobStore>> Open(Database& database);

  absl::Status InsertJob(const StoredJob& stored);
  absl::Status UpdateJob(int64_t sequence, const v1::Job& job);
  absl::Status PutAttempt(int64_t job, const v1::Attempt& attempt);
  // `last_point`: MetricStore::stored_sequence() at this moment.
  absl::Status AddEvent(int64_t job, const v1::JobEvent& event, int64_t last_point);
  // An empty reason: the node is not drained any more.
  absl::Status PutDrained(const std::string& node, const std::string& reason);
  // Node, and why.
  absl::StatusOr<std::map<std::string, std::string>> LoadDrained();
  // With its attempts and events.
  absl::Status DeleteJob(int64_t sequence);

  // Every job, in order of submission, without config_yaml.
  absl::StatusOr<std::vector<StoredJob>> LoadJobs();
  // The job file as it runs, up to 1 MiB. NOT_FOUND without the job.
  absl::StatusOr<std::string> ConfigYaml(int64_t job);
  // Events after `after`, oldest first; with more than `limit`, the first ones.
  absl::StatusOr<std::vector<v1::JobEvent>> EventsAfter(int64_t job, int64_t after, int limit);
  // The last `limit` events, oldest first.
  absl::StatusOr<std::vector<v1::JobEvent>> LastEvents(int64_t job, int limit);
  // The newest point that was stored before this event; 0 without such an event.
  absl::StatusOr<int64_t> LastPointBefore(int64_t job, int64_t event_sequence);

 private:
  explicit JobStore(Database& database) : database_(database) {}
  absl::Status LoadAttempts(StoredJob& stored);

  Database& database_;
  SqliteStatement insert_job_, update_job_, put_attempt_, add_event_;                      // of the writer
  SqliteStatement delete_events_, delete_attempts_, delete_job_;                           // of the writer
  SqliteStatement load_attempts_, config_yaml_, events_after_, last_events_, last_point_;  // of the reader
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_JOB_STORE_H_
