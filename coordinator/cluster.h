#ifndef SIMPO_COORDINATOR_CLUSTER_H_
#define SIMPO_COORDINATOR_CLUSTER_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace simpo {

inline constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// A machine that gangs run on.
struct Node {
  std::string name;
  int slots = 0;
  std::map<std::string, std::string> labels;
  bool up = true;
};

// What a gang needs: so many slots on each of so many nodes, all or none.
struct GangShape {
  int nodes = 1;
  int slots_per_node = 1;
  int slots() const { return nodes * slots_per_node; }
};

// Slots of one node that a gang holds.
struct NodeShare {
  int node = 0;  // index into Cluster::nodes()
  int slots = 0;
  bool operator==(const NodeShare&) const = default;
};
using NodeShares = std::vector<NodeShare>;

// A gang that holds slots.
struct RunningJob {
  int64_t sequence = 0;  // order of submission; the key
  std::string id;
  int priority = 0;  // that it is defended with against pre-emption
  int64_t started_ms = 0;
  int64_t ends_by_ms = kNever;  // by its time limit
  bool leaving = false;         // has been asked to end: its slots will be free at once, as good as
  NodeShares where;
  std::vector<int> quotas;  // of the scheduler that it counts in
};

// The nodes, the gangs on them and the slots that are free. Answers in time that grows with what is
// asked, not with the number of nodes or gangs. Pure bookkeeping; for one thread.
class Cluster {
 public:
  explicit Cluster(std::vector<Node> nodes);

  const std::vector<Node>& nodes() const { return nodes_; }
  const std::map<std::string, int>& by_name() const { return by_name_; }
  // A node that is down takes no new gang; those on it go on holding its slots until they are removed.
  void SetUp(int node, bool up);

  // Takes the slots of a gang; one of the same sequence is replaced.
  void Put(RunningJob job);
  std::optional<RunningJob> Remove(int64_t sequence);

  const std::map<int64_t, RunningJob>& running() const { return running_; }
  // (ends_by_ms, sequence), the earliest first; 0 of those that leave.
  const std::set<std::pair<int64_t, int64_t>>& by_end() const { return by_end_; }
  // Slots by sequence of the gangs on one node.
  const std::map<int64_t, int>& gangs_on(int node) const { return gangs_on_[node]; }

  int slots_total() const { return slots_total_; }                        // of the nodes that are up
  int slots_free() const { return slots_free_; }                          // of the nodes that are up
  int free(int node) const { return nodes_[node].slots - taken_[node]; }  // below 0 once a node has shrunk

  // The nodes for a gang now, the fullest first so that large holes stay whole; only `allowed` ones.
  std::optional<NodeShares> Fit(const GangShape& shape, const std::function<bool(int)>& allowed = {}) const;
  // How many nodes have so many slots free now, or in all. Nodes that are down count only `even_if_down`.
  int NodesWithFree(int slots) const;
  int NodesWithTotal(int slots, bool even_if_down) const;
  int LargestFree() const;

 private:
  void Change(int node, int slots);
  static std::pair<int64_t, int64_t> EndKey(const RunningJob& job);

  std::vector<Node> nodes_;
  std::map<std::string, int> by_name_;
  std::vector<int> taken_;
  std::vector<std::map<int64_t, int>> gangs_on_;
  std::map<int, std::set<int>> by_free_;   // nodes that are up
  std::map<int, int> totals_, up_totals_;  // nodes by their size
  int slots_total_ = 0, slots_free_ = 0;
  std::map<int64_t, RunningJob> running_;
  std::set<std::pair<int64_t, int64_t>> by_end_;
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_CLUSTER_H_
