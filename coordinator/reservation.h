#ifndef SIMPO_COORDINATOR_RESERVATION_H_
#define SIMPO_COORDINATOR_RESERVATION_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "coordinator/cluster.h"

namespace simpo {

// The room that is kept for the job at the head of the queue while it waits, and what may run beside it
// without delaying it (back-fill). The head's time is the earliest one at which the time limits of
// running gangs have made room for it. A job may pass the head when it ends by then, or when it takes
// only slots that the head leaves over then. When limits alone never make room, nobody knows which gang
// ends next: then a job may take a node's slots only where the head would start after the same ends with
// it as without it, whatever their order. Pure, but for what it remembers of its own answers.
class Reservation {
 public:
  // `cluster` outlives this object. The head does not fit now.
  Reservation(const Cluster& cluster, const GangShape& head, int64_t now_ms);

  int64_t room_at_ms() const { return room_at_ms_; }  // kNever: it is not known

  // Where a job may start now that ends by `ends_by_ms` (kNever: has no limit).
  std::optional<NodeShares> FitBeside(const GangShape& shape, int64_t ends_by_ms);
  // That it was started there, and is in the cluster.
  void Started(const NodeShares& where, int64_t ends_by_ms);

 private:
  int Spare(int node);
  int SpareWhateverEnds(int node) const;

  const Cluster& cluster_;
  const GangShape head_;
  int64_t room_at_ms_ = kNever;
  std::vector<int> spare_;            // by node; kUnknown: not computed yet
  std::vector<GangShape> too_large_;  // what found no place beside the head, without a limit
};

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_RESERVATION_H_
