#ifndef SIMPO_COORDINATOR_JOB_STREAMS_H_
#define SIMPO_COORDINATOR_JOB_STREAMS_H_

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>

#include "coordinator/job_store.h"
#include "coordinator/job_views.h"
#include "coordinator/metric_store.h"
#include "coordinator/stream_pump.h"
#include "simpo/v1/training_service.pb.h"

namespace simpo {

// WatchJob: the job now, then at each change with what is new, until it has ended.
class WatchStream final : public FedStream<v1::WatchJobResponse> {
 public:
  WatchStream(StreamPump& pump, const JobViews& views, JobStore& jobs, MetricStore& metrics, std::string job_id,
              int64_t after_sequence)
      : FedStream(pump),
        views_(views),
        jobs_(jobs),
        metrics_(metrics),
        job_id_(std::move(job_id)),
        last_event_(after_sequence) {}

 private:
  bool Next(v1::WatchJobResponse* response, std::optional<absl::Status>* end) override;
  absl::Status Fill(const JobView& view, v1::WatchJobResponse* response);

  const JobViews& views_;
  JobStore& jobs_;
  MetricStore& metrics_;
  const std::string job_id_;
  int64_t last_event_;
  std::optional<int64_t> last_point_;  // empty until the first response
  uint64_t version_ = 0;               // of the job as last sent
  bool more_ = false;                  // the last response did not hold everything
};

// StreamLogs: the lines of one rank's log.
class LogStream final : public FedStream<v1::StreamLogsResponse> {
 public:
  // INVALID_ARGUMENT when the request asks for what cannot be.
  static absl::Status Check(const v1::StreamLogsRequest& request, const JobView& view);
  // Of a request that passed Check.
  LogStream(StreamPump& pump, const JobViews& views, std::string job_id, const v1::StreamLogsRequest& request);

 private:
  bool Next(v1::StreamLogsResponse* response, std::optional<absl::Status>* end) override;
  // What to do at the end of the file.
  bool AtEnd(const JobView& view, bool attempt_ended, std::optional<absl::Status>* end);
  std::filesystem::path LogFile(const v1::Attempt& attempt) const;
  absl::Status NoLog(const JobView& view) const;

  const JobViews& views_;
  const std::string job_id_;
  const int rank_;
  const bool follow_;
  const bool all_attempts_;  // goes on over the attempts that follow
  int64_t tail_lines_;
  int attempt_;  // 0: not known yet
  int64_t offset_ = 0;
  bool found_ = false;  // any log
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_JOB_STREAMS_H_
