#include "coordinator/liveness.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

int64_t Seconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration_cast<std::chrono::seconds>(time).count();
}

}  // namespace

std::optional<std::string> FindHungRank(SteadyTime now, std::optional<SteadyTime> gang_started,
                                        const std::vector<RankHealth>& ranks, const LivenessLimits& limits) {
  if (!gang_started || ranks.empty()) return std::nullopt;
  SteadyTime last_finished = *gang_started;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const RankHealth& health = ranks[rank];
    last_finished = std::max(last_finished, health.last_heard);
    if (health.finished) continue;
    if (!health.attached && now - *gang_started > limits.attach) {
      return absl::StrCat("rank ", rank, " did not report within ", Seconds(limits.attach), " s of the gang's start");
    }
    if (health.attached && now - health.last_heard > limits.heartbeat) {
      return absl::StrCat("rank ", rank, " has been silent for ", Seconds(now - health.last_heard), " s (limit ",
                          Seconds(limits.heartbeat), " s)");
    }
  }
  const bool all_finished =
      std::all_of(ranks.begin(), ranks.end(), [](const RankHealth& health) { return health.finished; });
  if (all_finished && now - last_finished > limits.exit) {
    return absl::StrCat("all ranks have finished, but the gang did not end within ", Seconds(limits.exit), " s");
  }
  return std::nullopt;
}

}  // namespace simpo
