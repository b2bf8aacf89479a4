#ifndef SIMPO_COORDINATOR_PREEMPTION_H_
#define SIMPO_COORDINATOR_PREEMPTION_H_

#include <cstdint>
#include <vector>

#include "coordinator/cluster.h"

namespace simpo {

// Whom to ask to leave so that a gang of this shape and priority can start: gangs of lower priority, from
// as low a level as is enough, on each node as few as possible, and the youngest among equals. Empty when
// nothing helps, or when there will be room anyway once those have left that were asked already. Pure.
std::vector<int64_t> FindVictims(const Cluster& cluster, const GangShape& head, int priority);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_PREEMPTION_H_
