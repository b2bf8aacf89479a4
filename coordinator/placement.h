#ifndef SIMPO_COORDINATOR_PLACEMENT_H_
#define SIMPO_COORDINATOR_PLACEMENT_H_

#include <cstdint>
#include <ext/pb_ds/assoc_container.hpp>
#include <ext/pb_ds/tree_policy.hpp>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "coordinator/cluster.h"
#include "coordinator/reservation.h"

namespace simpo {

// Who a job belongs to, for the quotas.
struct JobOwner {
  std::string user;
  std::map<std::string, std::string> labels;
};

// A job that waits for slots.
struct WaitingJob {
  int64_t sequence = 0;  // order of submission; the key
  std::string id;
  JobOwner owner;
  int priority = 0;  // higher first
  GangShape shape;
  int64_t time_left_ms = 0;  // of its time limit; 0: it has none
  int64_t waiting_since_ms = 0;
  int64_t not_before_ms = 0;  // end of the pause after a fault; 0: none
};

// Which jobs start, where, and which are asked to make room.
struct PlacementDecision {
  struct Start {
    int64_t sequence = 0;
    NodeShares where;
    int gain = 0;  // of priority, by waiting
  };
  struct Preemption {
    int64_t victim = 0;
    int64_t winner = 0;
  };
  std::vector<Start> start;  // in this order; their slots are taken
  std::vector<Preemption> preempt;
};

// The queue, and the decision what starts next. By priority, then first come, first served; a gang
// starts with all its slots or not at all. The first job that finds no room keeps what it will need
// (Reservation), and others pass it only where that cannot delay it. Passed by all are jobs in a pause,
// over a quota, or whose nodes are down. Who waits long gains priority step by step, so that everybody's
// turn comes. Pure: it knows what it is told, and the time is an argument. For one thread.
class Scheduler {
 public:
  struct Options {
    std::vector<Node> nodes;
    std::map<std::string, int> user_quotas;   // most slots of a user at a time; "*": of each user not named
    std::map<std::string, int> label_quotas;  // the same of all jobs with a label, "key=value"
    bool preemption = false;                  // of running jobs by waiting ones of higher priority
    // After each such time of waiting a job's priority is 1, 3, 7, ... higher than its own; 0: never.
    int64_t starvation_ms = 3'600'000;
  };
  explicit Scheduler(Options options);

  const Cluster& cluster() const { return cluster_; }
  // Jobs that wait for their turn; without those that can never start.
  int in_line() const { return static_cast<int>(line_.size()); }

  // What has happened. Each replaces what was known of that job.
  void Wait(WaitingJob job);
  void Run(RunningJob job, const JobOwner& owner);
  void Remove(int64_t sequence);
  bool SetNodeUp(const std::string& name, bool up);

  PlacementDecision Decide(int64_t now_ms);

  // Why jobs wait, as of the last decision: tells it of the first `first` in line, of `count` from place
  // `from` on, and of each that has come or changed since it was last told. Places begin with 1.
  void Explain(int64_t now_ms, int first, int from, int count,
               const std::function<void(int64_t sequence, std::string reason)>& tell);
  // Why a job can never start here, however long it waits; empty: it can.
  std::string NeverStarts(const GangShape& shape, const JobOwner& owner);

 private:
  struct Quota {
    std::string whose;  // "user alice", "label team=red"
    int slots = 0;
    int used = 0;
  };
  struct Waiting {
    WaitingJob job;
    std::vector<int> quotas;  // that it counts in
    int gain = 0;
    std::string never;  // why it can never start; empty: it is in line
    int64_t rank() const { return static_cast<int64_t>(job.priority) + gain; }
  };
  struct Place {
    int64_t rank = 0;
    int64_t sequence = 0;
    Waiting* waiting = nullptr;
    bool operator<(const Place& other) const {
      return rank != other.rank ? rank > other.rank : sequence < other.sequence;
    }
  };
  // A set that knows what place each has, and who has a place, in the logarithm of its size.
  using Line = __gnu_pbds::tree<Place, __gnu_pbds::null_type, std::less<Place>, __gnu_pbds::rb_tree_tag,
                                __gnu_pbds::tree_order_statistics_node_update>;

  std::vector<int> QuotasOf(const JobOwner& owner);
  const Quota* Exceeded(const Waiting& waiting) const;
  void Count(const RunningJob& job, int sign);
  void Promote(int64_t now_ms);
  void SetGain(Waiting& waiting, int64_t now_ms);
  void LeaveLine(int64_t sequence);
  void GiveBack(int64_t sequence);
  bool NodesAreDown(const GangShape& shape) const;
  void Start(Waiting& waiting, NodeShares where, int64_t now_ms, PlacementDecision* decision);
  void Preempt(PlacementDecision* decision);
  std::string Reason(const Waiting& waiting, int place, int64_t now_ms) const;
  std::string Room(const GangShape& shape) const;

  const Options options_;
  Cluster cluster_;
  std::vector<Quota> quotas_;
  std::map<std::string, int> quota_of_user_;  // -1: none
  std::map<std::string, int> quota_of_label_;
  std::unordered_map<int64_t, Waiting> waiting_;  // by sequence
  Line line_;
  std::set<int64_t> untold_;                          // of waiting_, whose reasons have not been told yet
  std::set<std::pair<int64_t, int64_t>> promotions_;  // (when, sequence) of the next gain of each
  std::map<int64_t, std::string> makes_room_for_;     // by victim: the id of the job
  // Of the last decision: who keeps room, and from when on it is there.
  const Waiting* head_ = nullptr;
  int64_t room_at_ms_ = kNever;
};

// Slots of a gang: threads_per_rank for each rank, where 0 stands for an equal share of all slots, at
// least one.
int ThreadsPerRank(int threads_per_rank, int ranks, int slots_total);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_PLACEMENT_H_
