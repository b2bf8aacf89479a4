#include "coordinator/reservation.h"

#include <algorithm>

namespace simpo {
namespace {

constexpr int kUnknown = -1;
// Beyond so many elementary steps the sums on one node are not worth it: nothing is lent there.
constexpr int64_t kMostSteps = 1'000'000;

}  // namespace

Reservation::Reservation(const Cluster& cluster, const GangShape& head, int64_t now_ms)
    : cluster_(cluster), head_(head), spare_(cluster.nodes().size(), kUnknown) {
  std::vector<int> free(spare_.size(), 0);
  int ready = 0;  // nodes with room for their part of the head
  for (size_t node = 0; node < free.size(); ++node) {
    if (!cluster.nodes()[node].up) continue;
    free[node] = cluster.free(static_cast<int>(node));
    ready += free[node] >= head.slots_per_node;
  }
  for (const auto& [ends_by_ms, sequence] : cluster.by_end()) {
    if (ready >= head.nodes || ends_by_ms == kNever) break;
    room_at_ms_ = std::max(ends_by_ms, now_ms);
    for (const NodeShare& share : cluster.running().at(sequence).where) {
      if (!cluster.nodes()[share.node].up) continue;
      const bool was_ready = free[share.node] >= head.slots_per_node;
      free[share.node] += share.slots;
      ready += !was_ready && free[share.node] >= head.slots_per_node;
    }
  }
  if (ready < head.nodes) {
    room_at_ms_ = kNever;
    return;
  }
  // The head takes the fullest nodes that hold it then; what is left of them, and all others, is spare.
  std::vector<std::pair<int, int>> fullest;
  for (size_t node = 0; node < free.size(); ++node) {
    if (free[node] >= head.slots_per_node) fullest.push_back({free[node], static_cast<int>(node)});
  }
  std::sort(fullest.begin(), fullest.end());
  spare_ = std::move(free);
  for (int i = 0; i < head.nodes; ++i) spare_[fullest[i].second] -= head.slots_per_node;
}

int Reservation::Spare(int node) {
  if (spare_[node] == kUnknown) spare_[node] = SpareWhateverEnds(node);
  return spare_[node];
}

// The head's part needs `missing` slots to come free here. Any set of gangs may be the one that ends
// next, so every sum of their sizes can come free. The smallest sum that is enough leaves something over,
// and that much may be taken: whichever set would have been enough is enough still.
int Reservation::SpareWhateverEnds(int node) const {
  const int free = cluster_.free(node);
  if (cluster_.nodes()[node].slots < head_.slots_per_node) return free;
  const int missing = head_.slots_per_node - free;
  if (missing <= 0) return -missing;
  int all = 0;
  for (const auto& [sequence, slots] : cluster_.gangs_on(node)) all += slots;
  if (static_cast<int64_t>(all) * static_cast<int64_t>(cluster_.gangs_on(node).size()) > kMostSteps) return 0;
  std::vector<bool> reachable(all + 1, false);
  reachable[0] = true;
  for (const auto& [sequence, slots] : cluster_.gangs_on(node)) {
    for (int sum = all; sum >= slots; --sum) {
      if (reachable[sum - slots]) reachable[sum] = true;
    }
  }
  for (int sum = missing; sum <= all; ++sum) {
    if (reachable[sum]) return sum - missing;
  }
  return 0;
}

std::optional<NodeShares> Reservation::FitBeside(const GangShape& shape, int64_t ends_by_ms) {
  if (room_at_ms_ != kNever && ends_by_ms <= room_at_ms_) return cluster_.Fit(shape);
  for (const GangShape& failed : too_large_) {
    if (shape.nodes >= failed.nodes && shape.slots_per_node >= failed.slots_per_node) return std::nullopt;
  }
  auto where = cluster_.Fit(shape, [&](int node) { return Spare(node) >= shape.slots_per_node; });
  if (!where) too_large_.push_back(shape);
  return where;
}

void Reservation::Started(const NodeShares& where, int64_t ends_by_ms) {
  for (const NodeShare& share : where) {
    if (room_at_ms_ == kNever) {
      spare_[share.node] = kUnknown;
    } else if (ends_by_ms > room_at_ms_) {
      spare_[share.node] -= share.slots;
    }
  }
}

}  // namespace simpo
