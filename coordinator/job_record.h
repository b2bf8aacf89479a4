#ifndef SIMPO_COORDINATOR_JOB_RECORD_H_
#define SIMPO_COORDINATOR_JOB_RECORD_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "common/job_config.h"
#include "coordinator/histogram.h"
#include "coordinator/job_views.h"
#include "coordinator/launcher.h"
#include "coordinator/liveness.h"
#include "simpo/v1/job.pb.h"
#include "simpo/v1/worker_service.pb.h"

namespace simpo {

// The stream of one rank, as the controller speaks to it. Thread-safe; never blocks.
class RankChannel {
 public:
  virtual ~RankChannel() = default;
  virtual void Send(v1::AttachResponse response) = 0;
  // Ends the stream once what was sent before is out.
  virtual void Close(const absl::Status& status) = 0;
};

// A rank of one attempt.
struct RankId {
  std::string job_id;
  int attempt = 0;
  int rank = 0;
};

struct Rank {
  int64_t pid = 0;                       // on its machine
  int64_t last_heard_ms = 0;             // Unix time, for the metrics page
  std::shared_ptr<RankChannel> channel;  // empty while the rank is not connected
  bool welcomed = false;                 // by this channel
};

// The processes of the current attempt. Only in memory: a new coordinator builds it again.
struct Gang {
  bool launched = false;     // the launcher knows of it; before that there is nothing to look after
  std::string secret;        // empty: it could not be read yet
  bool address_due = false;  // its ranks cannot know yet where this coordinator is
  std::vector<Rank> ranks;
  std::vector<RankHealth> health;  // of each rank
  GangStatus::Phase phase = GangStatus::Phase::kStarting;
  SteadyTime phase_since{};           // when the launcher said so first
  std::optional<SteadyTime> started;  // when mpirun ran, or when this coordinator found it
  int64_t stall_told = -1;            // the step after which users were told of a rank that does not get on
  std::set<int> stragglers;           // that users have been told of
  int64_t last_step = 0;              // of the train split, handed to the store for this attempt; 0: none
  int64_t last_eval_step = -1;        // -1: none
  int64_t last_point = 0;             // number of the newest point that was handed to the store
  // The newest reports that the job does not show yet, since they are not stored.
  std::optional<v1::StepReport> unstored_train, unstored_eval;
  std::string error;        // what a rank said before it left
  bool ack_due = false;     // rank 0 is to hear that its reports are stored
  bool files_read = false;  // the gang has ended, and its files have been read for points
  // Ending it: first asked by command, then terminated, then killed.
  std::optional<HungRank> fault;  // why this coordinator ends it as faulty
  std::optional<SteadyTime> stop_asked;
  std::optional<SteadyTime> terminated;
  bool termination_heard = false;  // there was a supervisor to hear it
  bool killed = false;
  std::set<std::string> troubles;  // that the launcher has had with it, and that were logged
};

// A job in memory. What must survive lies in the stores, and the job file, which may be large, only there.
struct JobRecord {
  int64_t sequence = 0;  // order of submission; the key in the stores
  std::string request_digest;
  v1::Job job;                              // without config_yaml
  std::unique_ptr<const JobConfig> config;  // exactly until the job has ended
  std::vector<v1::Attempt> attempts;
  int64_t last_event = 0;
  // What limits and the queue go by; see Dispatcher::EvenMillis. The times in `job` and `attempts` are for people: the
  // clock that they are from may be set back or forward.
  int64_t waiting_since_ms = 0;         // its submission, or the end of its last attempt
  int64_t started_ms = 0;               // of the current attempt
  int64_t seen_ms = 0;                  // when it was last known to run
  int64_t run_before_ms = 0;            // how long the attempts before it have run in all
  int64_t not_before_ms = 0;            // end of the pause before the next attempt
  std::optional<Gang> gang;             // exactly while HoldsGang(job.state())
  uint64_t version = 1;                 // grows with every change that a watcher should hear of
  bool changed = false;                 // since the last picture of it was published
  bool heard = false;                   // ranks have been heard since then
  std::set<std::string> worker_events;  // what ranks have said; they say it again after an outage
  bool checkpoint_asked = false;        // of the current attempt by a user, and none has been complete since
  double mean_step_seconds = 0;         // over the latest steps, for the estimate of the end

  // For the metrics page.
  JobInfo info;
  Histogram step_seconds;
  int64_t checkpoint_ms = 0;  // Unix time of the last complete checkpoint
};

// How long the attempts of a job have run in all. Waiting and pauses do not count. `even_ms`: now.
int64_t RunMillis(const JobRecord& record, int64_t even_ms);
// What a train report says of a job's progress.
void ShowTrainReport(const v1::StepReport& report, v1::JobProgress* progress);
// Two events of one attempt with the same key are the same event.
std::string EventKey(const std::string& type, const std::string& message);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_JOB_RECORD_H_
