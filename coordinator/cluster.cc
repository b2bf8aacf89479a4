#include "coordinator/cluster.h"

#include <algorithm>

namespace simpo {
namespace {

int CountFrom(const std::map<int, int>& counts, int slots) {
  int count = 0;
  for (auto size = counts.lower_bound(slots); size != counts.end(); ++size) count += size->second;
  return count;
}

void Subtract(std::map<int, int>* counts, int slots) {
  if (--(*counts)[slots] == 0) counts->erase(slots);
}

}  // namespace

Cluster::Cluster(std::vector<Node> nodes)
    : nodes_(std::move(nodes)), taken_(nodes_.size(), 0), gangs_on_(nodes_.size()) {
  for (size_t i = 0; i < nodes_.size(); ++i) {
    by_name_[nodes_[i].name] = static_cast<int>(i);
    ++totals_[nodes_[i].slots];
    if (!std::exchange(nodes_[i].up, false)) continue;
    SetUp(static_cast<int>(i), true);
  }
}

void Cluster::SetUp(int node, bool up) {
  if (nodes_[node].up == up) return;
  nodes_[node].up = up;
  const int sign = up ? 1 : -1;
  slots_total_ += sign * nodes_[node].slots;
  slots_free_ += sign * free(node);
  if (up) {
    by_free_[free(node)].insert(node);
    ++up_totals_[nodes_[node].slots];
  } else {
    const auto bucket = by_free_.find(free(node));
    bucket->second.erase(node);
    if (bucket->second.empty()) by_free_.erase(bucket);
    Subtract(&up_totals_, nodes_[node].slots);
  }
}

// `slots` more are taken; negative: are free again.
void Cluster::Change(int node, int slots) {
  const bool up = nodes_[node].up;
  if (up) {
    const auto bucket = by_free_.find(free(node));
    bucket->second.erase(node);
    if (bucket->second.empty()) by_free_.erase(bucket);
    slots_free_ -= slots;
  }
  taken_[node] += slots;
  if (up) by_free_[free(node)].insert(node);
}

std::pair<int64_t, int64_t> Cluster::EndKey(const RunningJob& job) {
  return {job.leaving ? 0 : job.ends_by_ms, job.sequence};
}

void Cluster::Put(RunningJob job) {
  Remove(job.sequence);
  for (const NodeShare& share : job.where) {
    Change(share.node, share.slots);
    gangs_on_[share.node][job.sequence] += share.slots;
  }
  by_end_.insert(EndKey(job));
  const int64_t sequence = job.sequence;
  running_[sequence] = std::move(job);
}

std::optional<RunningJob> Cluster::Remove(int64_t sequence) {
  auto node = running_.extract(sequence);
  if (node.empty()) return std::nullopt;
  RunningJob job = std::move(node.mapped());
  for (const NodeShare& share : job.where) {
    Change(share.node, -share.slots);
    gangs_on_[share.node].erase(sequence);
  }
  by_end_.erase(EndKey(job));
  return job;
}

std::optional<NodeShares> Cluster::Fit(const GangShape& shape, const std::function<bool(int)>& allowed) const {
  NodeShares where;
  for (auto bucket = by_free_.lower_bound(shape.slots_per_node); bucket != by_free_.end(); ++bucket) {
    for (int node : bucket->second) {
      if (allowed && !allowed(node)) continue;
      where.push_back({node, shape.slots_per_node});
      if (static_cast<int>(where.size()) == shape.nodes) return where;
    }
  }
  return std::nullopt;
}

int Cluster::NodesWithFree(int slots) const {
  int count = 0;
  for (auto bucket = by_free_.lower_bound(slots); bucket != by_free_.end(); ++bucket) {
    count += static_cast<int>(bucket->second.size());
  }
  return count;
}

int Cluster::NodesWithTotal(int slots, bool even_if_down) const {
  return CountFrom(even_if_down ? totals_ : up_totals_, slots);
}

int Cluster::LargestFree() const { return by_free_.empty() ? 0 : std::max(0, by_free_.rbegin()->first); }

}  // namespace simpo
