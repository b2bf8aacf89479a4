#ifndef SIMPO_COORDINATOR_METRIC_STORE_H_
#define SIMPO_COORDINATOR_METRIC_STORE_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/database.h"
#include "simpo/v1/worker_service.pb.h"

namespace simpo {

// Every metric point of every job. The key is (job, split, step, attempt); a point that comes again
// after an outage changes nothing. Threads as JobStore.
class MetricStore {
 public:
  static absl::StatusOr<std::unique_ptr<MetricStore>> Open(Database& database);

  absl::Status AddPoint(int64_t job, const v1::StepReport& report);
  // The sequence number of the newest point of all jobs; grows with every point.
  int64_t last_sequence() const { return last_sequence_; }

  // Points in step order with a greater step than `after_step`, of each step the latest attempt's.
  absl::StatusOr<std::vector<v1::MetricPoint>> ListPoints(int64_t job, const std::string& split, int64_t after_step,
                                                          int limit);
  // Points in the order in which they came, after `*cursor`, which moves on to the last one.
  absl::StatusOr<std::vector<v1::MetricPoint>> PointsSince(int64_t job, int64_t* cursor, int limit);
  // The newest report of a split, of one attempt or (0) of the latest that has any.
  absl::StatusOr<std::optional<v1::StepReport>> LastReport(int64_t job, const std::string& split, int attempt);

 private:
  explicit MetricStore(Database& database) : database_(database) {}

  Database& database_;
  int64_t last_sequence_ = 0;
  SqliteStatement add_;                                // of the writer
  SqliteStatement list_, since_, last_of_, last_any_;  // of the reader
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_METRIC_STORE_H_
