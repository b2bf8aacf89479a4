#include "coordinator/preemption.h"

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <tuple>

namespace simpo {
namespace {

// Lower priority first, then the youngest.
bool LeavesBefore(const RunningJob& a, const RunningJob& b) {
  return std::tuple(a.priority, -a.started_ms, -a.sequence) < std::tuple(b.priority, -b.started_ms, -b.sequence);
}

// What would be free on each node that is up once some gangs have left.
class Hypothesis {
 public:
  Hypothesis(const Cluster& cluster, const GangShape& head) : cluster_(cluster), head_(head) {
    for (size_t node = 0; node < cluster.nodes().size(); ++node) {
      free_.push_back(cluster.nodes()[node].up ? cluster.free(static_cast<int>(node)) : 0);
      ready_ += free_.back() >= head.slots_per_node;
    }
  }
  // `sign` 1: it has left; -1: it has not.
  void Move(const RunningJob& job, int sign) {
    for (const NodeShare& share : job.where) {
      if (!cluster_.nodes()[share.node].up) continue;
      ready_ -= free_[share.node] >= head_.slots_per_node;
      free_[share.node] += sign * share.slots;
      ready_ += free_[share.node] >= head_.slots_per_node;
    }
  }
  bool HasRoom() const { return ready_ >= head_.nodes; }
  int free(int node) const { return free_[node]; }

 private:
  const Cluster& cluster_;
  const GangShape& head_;
  std::vector<int> free_;
  int ready_ = 0;  // nodes with room for their part of the head
};

// The fewest gangs that make so many slots free on one node: the largest first, and for the rest the one
// that goes most easily. Empty: even all of them are not enough.
std::optional<std::vector<const RunningJob*>> FewestOn(const Cluster& cluster, int node, int missing, int level) {
  std::vector<std::pair<int, const RunningJob*>> gangs;
  for (const auto& [sequence, slots] : cluster.gangs_on(node)) {
    const RunningJob& job = cluster.running().at(sequence);
    if (!job.leaving && job.priority <= level) gangs.push_back({slots, &job});
  }
  std::sort(gangs.begin(), gangs.end(), [](const auto& a, const auto& b) {
    return a.first != b.first ? a.first > b.first : LeavesBefore(*a.second, *b.second);
  });
  std::vector<const RunningJob*> chosen;
  for (size_t i = 0; i < gangs.size() && missing > 0; ++i) {
    size_t pick = i;
    for (size_t j = i + 1; gangs[i].first >= missing && j < gangs.size() && gangs[j].first >= missing; ++j) {
      if (LeavesBefore(*gangs[j].second, *gangs[pick].second)) pick = j;
    }
    chosen.push_back(gangs[pick].second);
    missing -= gangs[pick].first;
  }
  if (missing > 0) return std::nullopt;
  return chosen;
}

// The lowest priority up to which gangs must leave for there to be room, all of them at worst.
std::optional<int> LevelThatIsEnough(const Cluster& cluster, Hypothesis hypothesis, int priority) {
  std::map<int, std::vector<const RunningJob*>> by_priority;
  for (const auto& [sequence, job] : cluster.running()) {
    if (!job.leaving && job.priority < priority) by_priority[job.priority].push_back(&job);
  }
  for (const auto& [level, jobs] : by_priority) {
    for (const RunningJob* job : jobs) hypothesis.Move(*job, 1);
    if (hypothesis.HasRoom()) return level;
  }
  return std::nullopt;
}

}  // namespace

std::vector<int64_t> FindVictims(const Cluster& cluster, const GangShape& head, int priority) {
  Hypothesis hypothesis(cluster, head);
  for (const auto& [sequence, job] : cluster.running()) {
    if (job.leaving) hypothesis.Move(job, 1);
  }
  if (hypothesis.HasRoom()) return {};
  const std::optional<int> level = LevelThatIsEnough(cluster, hypothesis, priority);
  if (!level) return {};

  struct Choice {
    int node;
    std::vector<const RunningJob*> victims;
  };
  std::vector<Choice> choices;
  for (size_t i = 0; i < cluster.nodes().size(); ++i) {
    const int node = static_cast<int>(i);
    if (!cluster.nodes()[i].up || cluster.nodes()[i].slots < head.slots_per_node) continue;
    if (auto victims = FewestOn(cluster, node, head.slots_per_node - hypothesis.free(node), *level)) {
      choices.push_back({node, *std::move(victims)});
    }
  }
  if (static_cast<int>(choices.size()) < head.nodes) return {};
  const auto worst = [](const Choice& choice) {
    return *std::max_element(choice.victims.begin(), choice.victims.end(),
                             [](const RunningJob* a, const RunningJob* b) { return LeavesBefore(*a, *b); });
  };
  std::stable_sort(choices.begin(), choices.end(), [&](const Choice& a, const Choice& b) {
    if (a.victims.size() != b.victims.size()) return a.victims.size() < b.victims.size();
    return !a.victims.empty() && LeavesBefore(*worst(a), *worst(b));
  });
  std::vector<const RunningJob*> victims;
  for (int i = 0; i < head.nodes; ++i) {
    victims.insert(victims.end(), choices[i].victims.begin(), choices[i].victims.end());
  }
  std::sort(victims.begin(), victims.end(),
            [](const RunningJob* a, const RunningJob* b) { return LeavesBefore(*a, *b); });
  victims.erase(std::unique(victims.begin(), victims.end()), victims.end());
  for (const RunningJob* victim : victims) hypothesis.Move(*victim, 1);
  // One that spans several nodes may have made another one's leaving needless.
  std::vector<int64_t> needed;
  for (auto victim = victims.rbegin(); victim != victims.rend(); ++victim) {
    hypothesis.Move(**victim, -1);
    if (hypothesis.HasRoom()) continue;
    hypothesis.Move(**victim, 1);
    needed.push_back((*victim)->sequence);
  }
  std::reverse(needed.begin(), needed.end());
  return needed;
}

}  // namespace simpo
