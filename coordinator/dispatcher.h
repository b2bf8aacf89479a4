#ifndef SIMPO_COORDINATOR_DISPATCHER_H_
#define SIMPO_COORDINATOR_DISPATCHER_H_

#include <chrono>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "coordinator/allowed_roots.h"
#include "coordinator/database.h"
#include "coordinator/histogram.h"
#include "coordinator/job_record.h"
#include "coordinator/job_state.h"
#include "coordinator/job_store.h"
#include "coordinator/job_views.h"
#include "coordinator/launcher.h"
#include "coordinator/liveness.h"
#include "coordinator/metric_store.h"
#include "coordinator/moment.h"
#include "coordinator/placement.h"
#include "coordinator/restart_policy.h"
#include "coordinator/submission.h"
#include "simpo/v1/training_service.pb.h"

namespace simpo {

// Every job in memory, and what becomes of it: what happens to a job is one call here, which goes
// through the table of job_state.h, writes to the stores and notes what is to follow. Flush then makes
// the writes of all calls since the last Flush durable at once, and only after that publishes the new
// pictures, acknowledges, and starts gangs. So whatever anyone hears of has survived a crash already,
// and after a crash Load and Adopt go on from what is on disk.
//
// Metric points are handed to their own store, which writes them at its own pace. What a report changes, and
// that rank 0 hears of it, follows once Flush finds that the points are stored; the end of an attempt waits for
// its points too. Nothing else waits for them.
//
// For one thread, which tells it the time; Prepare is for any. An error of the stores is kept and comes back from
// Flush.
class Dispatcher {
 public:
  struct Options {
    int slots_total = 1;                // of this machine, where `queue` names no nodes
    Scheduler::Options queue;           // how slots are shared out
    std::filesystem::path outputs_dir;  // absolute, without links; of jobs without an absolute output_dir
    AllowedRoots roots;                 // for the paths of jobs; looked at again before each attempt
    LivenessLimits liveness;
    std::chrono::milliseconds heartbeat_interval{2'000};  // that ranks are told
    RestartPolicy restart;
    int max_jobs_per_user = 0;  // that have not ended; 0: no limit
    // From the command to stop to SIGTERM; a gang that is writing a checkpoint then has liveness.checkpoint.
    std::chrono::milliseconds stop_grace{120'000};
    std::chrono::milliseconds term_grace{15'000};  // from SIGTERM to SIGKILL
    // How long after its end all of a job's points are kept, and how long anything of it; 0: for ever.
    std::chrono::milliseconds keep_points{0};
    std::chrono::milliseconds keep_jobs{0};
  };
  struct Stats {
    Histogram commit_seconds;
    int64_t points = 0;  // taken since this coordinator began
  };
  static constexpr size_t kMaxReasonBytes = 8192;  // of a job, an attempt or an event, in UTF-8

  using SubmitDone = std::function<void(absl::StatusOr<v1::SubmitJobResponse>)>;
  using CancelDone = std::function<void(absl::StatusOr<v1::CancelJobResponse>)>;
  using CheckpointDone = std::function<void(absl::StatusOr<v1::CheckpointJobResponse>)>;
  using NodeDone = std::function<void(absl::StatusOr<v1::NodeState>)>;
  using PriorityDone = std::function<void(absl::StatusOr<v1::SetPriorityResponse>)>;

  Dispatcher(Options options, Database& database, JobStore& jobs, MetricStore& metrics, JobViews& views);

  // Reads every job and publishes it. Once, before all else.
  absl::Status Load(Moment now);
  // From here on gangs are started by `launcher`, which outlives this object. Takes up what an earlier
  // coordinator left: gangs that run go on, one that was about to be started is started.
  void Adopt(Launcher& launcher, Moment now);

  // Gives a checked submission the id, the output folder and the file that its job will have. From any thread: a file
  // of 1 MiB is not to hold up decisions.
  absl::Status Prepare(Submission& submission) const;

  // --- what users ask. `done` is called by Flush, or at once with an error.
  // Of a prepared submission. The same request_id again gives the same job; with another digest it is ALREADY_EXISTS.
  void Submit(Submission submission, const std::string& request_id, Moment now, SubmitDone done);
  // What only this coordinator, as it stands now, has against a job; see also CheckSubmission. `output_dir`: empty
  // where it is to be chosen here.
  absl::Status Check(const v1::Job& job, const std::string& output_dir);
  void Cancel(const std::string& job_id, Moment now, CancelDone done);
  void SetPriority(const std::string& job_id, int priority, Moment now, PriorityDone done);
  // Asks the ranks for a checkpoint; an event tells when it is complete.
  void Checkpoint(const std::string& job_id, Moment now, CheckpointDone done);
  // A node with a reason is drained; with an empty one it is taken into use again.
  void SetDrained(const std::string& node, const std::string& reason, bool keep_running, Moment now, NodeDone done);
  absl::StatusOr<v1::ListNodesResponse> ListNodes(const v1::ListNodesRequest& request) const;
  // For launchers of several machines: a node that is down gets no new gang. False: there is no such node.
  bool SetNodeUp(const std::string& name, bool up);

  // --- what ranks say. What comes from another attempt than the current one is turned away.
  void Attach(const v1::Hello& hello, const std::shared_ptr<RankChannel>& channel, Moment now);
  void Receive(const RankId& from, v1::AttachRequest message, Moment now);
  // Calls `taken` when more points may come: at once, or by Flush when too many wait to be stored.
  void WhenRoom(std::function<void()> taken);
  // The stream is at its end; it is closed once all that came by it is on disk.
  void Leave(const RankId& rank, const std::shared_ptr<RankChannel>& channel);

  // Before a Tick that comes so long after the one before: in a long pause the process was stopped or the disk held
  // it up, and what ranks said may not have been read yet. Such time is nobody's silence, and neither is time in which
  // no more points are read since too many wait to be stored.
  void ExcuseSilence(Moment now, std::chrono::steady_clock::duration since_tick);
  // Looks after gangs, limits of time and the queue; a few times a second.
  void Tick(Moment now);
  // An error means that it is unknown what is on disk: stop, and let a new coordinator begin from there.
  absl::Status Flush(Moment now);
  // Waits for the points that were handed over, then Flush: nothing is left to be acknowledged.
  absl::Status FlushAll(Moment now);

  const Stats& stats() const { return stats_; }

 private:
  using Acknowledgement = std::function<void(const absl::Status&)>;
  using PointsStored = std::function<void(const absl::Status&, Moment)>;

  // dispatcher.cc: jobs and the queue.
  void Write(const absl::Status& status);
  void Changed(JobRecord& record, bool for_watchers = true);
  JobRecord* FindRecord(const std::string& job_id);
  JobRecord& AddRecord(StoredJob stored);
  // The job that has not ended and writes to this folder, to one that it lies in, or to one in it; or null.
  const JobRecord* WriterTo(const std::string& folder) const;
  // Why an attempt may not write to its job's folder, which has become a link or lies behind one since the submit, or
  // "".
  std::string ProblemOfTurnedFolder(const JobRecord& record) const;
  void AddEvent(JobRecord& record, const std::string& type, const std::string& message, int64_t unix_ms);
  v1::NodeState StateOf(int node) const;
  bool IsUp(const std::string& node) const { return !down_.contains(node) && !drained_.contains(node); }
  // Moves a job on; false where the table has no such move.
  bool Apply(JobRecord& record, JobTrigger trigger, const std::string& event, const std::string& reason, Moment now);
  // Tells the queue what has become of a job.
  void Queue(const JobRecord& record);
  void Place(Moment now);
  void ExplainQueue(Moment now);
  void BeginAttempt(JobRecord& record, const PlacementDecision::Start& start, Moment now);
  void Launch(JobRecord& record, Moment now);
  // Calls `then` by Flush once all points that were handed over so far are stored.
  void AfterPoints(PointsStored then);
  bool ArePointsDue() const;
  void TellOfStoredPoints(Moment now);
  void KeepHouse(Moment now);
  void RemoveJob(int64_t sequence);
  void PublishChanged();
  absl::Status LoadLive(JobRecord& record, Moment now);
  // What was stored in the calendar's time, as far as it can be right: not after now.
  void TakeStoredTimes(JobRecord& record, Moment now) const;
  // The calendar as it was when this coordinator began, carried on by the clock that never jumps: how long something
  // has taken is judged by it.
  int64_t EvenMillis(Moment now) const { return even_offset_ms_ + Millis(now.steady); }
  static int64_t Millis(SteadyTime time) {
    return std::chrono::duration_cast<std::chrono::milliseconds>(time.time_since_epoch()).count();
  }
  absl::Status Commit();
  void FailAll(const absl::Status& status);

  // dispatcher_gangs.cc: attempts and their ranks.
  // The jobs that hold slots, by sequence: from Adopt on each has a gang. A long queue costs the ticks nothing.
  std::vector<JobRecord*> WithGang() const;
  void AdoptGang(JobRecord& record, Moment now);
  // Has its ranks let in, and lets them know where; what fails is done at the next tick.
  void OpenTo(JobRecord& record);
  // Whether the launcher has done something. What it is asked again several times a second is logged once.
  static bool Managed(JobRecord& record, const absl::Status& status);
  Gang* GangOf(const RankId& rank, JobRecord** record);
  void TakeHeartbeat(JobRecord& record, const RankId& from, const v1::Heartbeat& heartbeat, Moment now);
  void TakeReport(JobRecord& record, v1::StepReport report, Moment now);
  // Once they are stored, the job shows its reports, and rank 0 hears how far they are.
  void AcknowledgeReports(JobRecord& record);
  void ShowStoredReports(JobRecord& record, const std::optional<v1::StepReport>& train,
                         const std::optional<v1::StepReport>& eval);
  void TakeWorkerEvent(JobRecord& record, const RankId& from, const v1::WorkerEvent& event, Moment now);
  // Asks a job to end: by command where there is training to keep, else by signal.
  void RequestEnd(JobRecord& record, const std::string& why, Moment now);
  void Preempt(JobRecord& record, const std::string& why, Moment now);
  // `state`: that the job was in.
  void AskToLeave(JobRecord& record, v1::JobState state, Moment now);
  void SendStop(JobRecord& record);
  void Terminate(JobRecord& record, Moment now);
  void TendGang(JobRecord& record, Moment now);
  void Escalate(JobRecord& record, Moment now);
  void LookAtRanks(JobRecord& record, Moment now);
  void EndForFault(JobRecord& record, HungRank fault, Moment now);
  // When an attempt has ended that ended by itself; see JobRecord::started_ms. The coordinator may have been away then.
  int64_t EndOf(const JobRecord& record, const GangStatus& status, Moment now) const;
  // `what` tells more than the exit code, or is empty.
  void EndAttempt(JobRecord& record, const AttemptEnd& end, const std::string& what, int64_t ended_ms, Moment now);
  void TakeLeftPoints(JobRecord& record, Moment now);
  static std::string DescribeEnd(const JobRecord& record, std::optional<int> exit_code, const std::string& what);

  const Options options_;
  Database& database_;
  JobStore& jobs_;
  MetricStore& metrics_;
  JobViews& views_;
  Launcher* launcher_ = nullptr;

  std::map<int64_t, std::unique_ptr<JobRecord>> records_;  // by sequence
  std::unordered_map<std::string, JobRecord*> by_id_, by_request_id_;
  std::map<std::string, JobRecord*> live_output_dirs_;  // where those write that have not ended
  std::unordered_map<std::string, int> live_of_user_;   // and how many each user has
  std::vector<JobRecord*> changed_;                     // since the last publication
  std::vector<JobRecord*> heard_;                       // whose ranks were, since the last tick
  // (end_time, sequence) of ended jobs: those that are yet to be removed, and those that are yet to be thinned.
  std::set<std::pair<int64_t, int64_t>> to_remove_, to_thin_;
  std::vector<std::unique_ptr<JobRecord>> removed_;  // until the commit and who waits for it
  int64_t next_sequence_ = 1;
  int64_t even_offset_ms_ = 0;

  Scheduler queue_;
  std::set<std::string> down_;                  // nodes that a launcher cannot reach
  std::map<std::string, std::string> drained_;  // nodes, and why
  bool explain_due_ = false;                    // at each tick, for queues that are too long to be explained each time
  int explain_from_ = 1;                        // the place in the queue where the next tick goes on

  absl::Status store_status_;
  bool placement_due_ = true;
  std::vector<Acknowledgement> acknowledgements_;
  std::deque<std::pair<int64_t, PointsStored>> after_points_;  // by MetricStore::last_sequence(), in order
  std::vector<JobRecord*> launches_;
  Stats stats_;
};

v1::AttachResponse CheckpointCommand();
// The picture of a record that others see.
std::shared_ptr<const JobView> MakeView(const JobRecord& record);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_DISPATCHER_H_
