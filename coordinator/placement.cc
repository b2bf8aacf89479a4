#include "coordinator/placement.h"

#include <algorithm>
#include <tuple>

#include "absl/strings/str_cat.h"

namespace simpo {

PlacementDecision DecidePlacement(int64_t now_ms, int slots_total, int slots_taken, std::vector<WaitingJob> waiting) {
  std::sort(waiting.begin(), waiting.end(), [](const WaitingJob& a, const WaitingJob& b) {
    return std::tuple(-a.priority, a.sequence) < std::tuple(-b.priority, b.sequence);
  });
  PlacementDecision decision;
  int free = slots_total - slots_taken;
  int ahead = 0;  // jobs that come first and wait for slots
  for (const WaitingJob& job : waiting) {
    if (job.slots > slots_total) {
      decision.reasons[job.id] =
          absl::StrCat("can never start here: it needs ", job.slots, " slots and this coordinator has ", slots_total,
                       "; cancel it or restart the coordinator with --slots ", job.slots);
    } else if (job.not_before_ms > now_ms) {
      decision.reasons[job.id] = absl::StrCat("waiting: the next attempt follows after a pause, in ",
                                              (job.not_before_ms - now_ms + 999) / 1000, " s");
    } else if (ahead > 0) {
      decision.reasons[job.id] = absl::StrCat("waiting: ", ahead, ahead == 1 ? " job" : " jobs", " ahead, ",
                                              std::max(free, 0), " of ", slots_total, " slots free, needs ", job.slots);
      ++ahead;
    } else if (job.slots > free) {
      decision.reasons[job.id] =
          absl::StrCat("waiting: ", std::max(free, 0), " of ", slots_total, " slots free, needs ", job.slots);
      ++ahead;
    } else {
      free -= job.slots;
      decision.start.push_back(job.id);
    }
  }
  return decision;
}

int ThreadsPerRank(int threads_per_rank, int ranks, int slots_total) {
  if (threads_per_rank > 0) return threads_per_rank;
  return std::max(1, slots_total / std::max(1, ranks));
}

}  // namespace simpo
