#ifndef SIMPO_COORDINATOR_PLACEMENT_H_
#define SIMPO_COORDINATOR_PLACEMENT_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace simpo {

// A job that waits for slots.
struct WaitingJob {
  std::string id;
  int priority = 0;           // higher first
  int64_t sequence = 0;       // order of submission; lower first among equals
  int slots = 0;              // all of them or none
  int64_t not_before_ms = 0;  // end of the pause after a fault; 0: none
};

struct PlacementDecision {
  std::vector<std::string> start;              // in this order
  std::map<std::string, std::string> reasons;  // of every job that goes on waiting: why
};

// Which jobs start now. By priority, then age; nothing passes a job that is next and waits for slots,
// so a big job cannot starve. Jobs in a pause, and those that never fit in `slots_total`, are passed.
// Pure.
PlacementDecision DecidePlacement(int64_t now_ms, int slots_total, int slots_taken, std::vector<WaitingJob> waiting);

// Slots of a gang: threads_per_rank for each rank, where 0 stands for an equal share of all slots, at
// least one.
int ThreadsPerRank(int threads_per_rank, int ranks, int slots_total);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_PLACEMENT_H_
