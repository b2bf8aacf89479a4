#include "coordinator/liveness.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace simpo {
namespace {

using std::chrono::milliseconds;

constexpr double kLatestStepWeight = 0.1;  // in busy_seconds
// A straggler is reported when it has been for so many steps, by such a factor and by so much time.
constexpr int kStragglerSteps = 20;
constexpr double kStragglerFactor = 1.5;
constexpr double kStragglerSeconds = 0.05;
// A step of usual length is no stall.
constexpr double kStalledSteps = 5;

int64_t Seconds(std::chrono::steady_clock::duration time) {
  return std::chrono::duration_cast<std::chrono::seconds>(time).count();
}

// Nothing: the phase has no limit of its own.
std::optional<milliseconds> LimitOf(const std::string& phase, const LivenessLimits& limits) {
  if (phase == "load") return limits.load;
  if (phase == "train") return limits.step;
  if (phase == "eval") return limits.eval;
  if (phase == "checkpoint" || phase == "export") return limits.checkpoint;
  return std::nullopt;
}

bool IsWaiting(const RankHealth& health) { return health.heartbeat.collective().waiting_seconds() > 0; }

std::string CollectiveName(const v1::LastCollective& collective) {
  return absl::StrCat(collective.verb(), " ", collective.number(), " (", collective.bytes(), " bytes)");
}

// The rank that keeps the others from getting on. Ranks take part in the same collectives in the same order,
// so it is the one that has come least far; among those, one that waits for the others is not it.
size_t FindCulprit(const std::vector<RankHealth>& ranks) {
  size_t culprit = ranks.size();
  const auto key = [&](size_t rank) {
    return std::pair(ranks[rank].heartbeat.collective().number(), IsWaiting(ranks[rank]));
  };
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    if (!ranks[rank].attached || ranks[rank].finished) continue;
    if (culprit == ranks.size() || key(rank) < key(culprit)) culprit = rank;
  }
  return culprit;
}

// The rank that has not got on for `longest(rank)`, and what it and those who wait for it are in.
template <typename Longest>
std::optional<std::string> FindStall(SteadyTime now, const std::vector<RankHealth>& ranks, Longest longest) {
  // Before every rank has told where it is, nobody can be blamed.
  bool any_stalled = false;
  for (const RankHealth& health : ranks) {
    if (health.finished) continue;
    if (!health.attached || health.heartbeat.phase().empty()) return std::nullopt;
    const std::optional<milliseconds> limit = longest(health);
    any_stalled |= limit && now - health.last_moved > *limit;
  }
  if (!any_stalled) return std::nullopt;
  const size_t rank = FindCulprit(ranks);
  const RankHealth& culprit = ranks[rank];
  // The others may wait for one that is slow, but gets on.
  const std::optional<milliseconds> limit = longest(culprit);
  if (!limit || now - culprit.last_moved <= *limit) return std::nullopt;
  std::string text = absl::StrCat(NameRank(rank, culprit), " has not got on for ", Seconds(now - culprit.last_moved),
                                  " s (limit ", Seconds(*limit), " s): it is ", DescribeRank(culprit));
  size_t waiting = 0, first = ranks.size();  // in a later collective, or in the one that the culprit has not begun
  bool all_the_same = true;
  for (size_t other = 0; other < ranks.size(); ++other) {
    if (other == rank || ranks[other].finished || !IsWaiting(ranks[other])) continue;
    ++waiting;
    all_the_same &= ranks[other].heartbeat.collective().number() == culprit.heartbeat.collective().number();
    if (first == ranks.size()) first = other;
  }
  if (waiting > 0 && IsWaiting(culprit) && all_the_same) {
    absl::StrAppend(&text, "; all ranks wait, so the network between them may be the cause");
  } else if (waiting > 0) {
    absl::StrAppend(&text, "; ", waiting == 1 ? NameRank(first, ranks[first]) : absl::StrCat(waiting, " ranks"),
                    waiting == 1 ? " waits" : " wait", " for it in ",
                    CollectiveName(ranks[first].heartbeat.collective()));
  }
  return text;
}

}  // namespace

void TakeHeartbeat(const v1::Heartbeat& heartbeat, SteadyTime now, RankHealth* health) {
  const v1::Heartbeat& before = health->heartbeat;
  if (heartbeat.phase() != before.phase() || heartbeat.step() != before.step() || heartbeat.moves() != before.moves()) {
    health->last_moved = now;
  }
  if (heartbeat.step() > before.step() && heartbeat.last_step_seconds() > 0) {
    const double busy = std::max(1e-9, heartbeat.last_step_seconds() - heartbeat.last_step_wait_seconds());
    const double weight = std::max(kLatestStepWeight, 1.0 / (health->steps_heard + 1));
    health->busy_seconds += weight * (busy - health->busy_seconds);
    ++health->steps_heard;
  }
  health->heartbeat = heartbeat;
}

std::string NameRank(size_t rank, const RankHealth& health) {
  return health.hostname.empty() ? absl::StrCat("rank ", rank)
                                 : absl::StrCat("rank ", rank, " (", health.hostname, ")");
}

std::string DescribeCollective(const v1::Heartbeat& heartbeat) {
  if (!heartbeat.has_collective()) return "";
  const v1::LastCollective& collective = heartbeat.collective();
  if (collective.waiting_seconds() <= 0) return absl::StrCat("not waiting since ", CollectiveName(collective));
  return absl::StrFormat("waiting for %s for %.0f s", CollectiveName(collective), collective.waiting_seconds());
}

std::string DescribeRank(const RankHealth& health) {
  const v1::Heartbeat& heartbeat = health.heartbeat;
  if (heartbeat.phase().empty()) return "";
  std::string text = absl::StrCat("in ", heartbeat.phase());
  if (heartbeat.step() > 0) absl::StrAppend(&text, " after step ", heartbeat.step());
  if (heartbeat.has_collective()) absl::StrAppend(&text, ", ", DescribeCollective(heartbeat));
  return text;
}

std::optional<HungRank> FindHungRank(SteadyTime now, std::optional<SteadyTime> gang_started,
                                     const std::vector<RankHealth>& ranks, const LivenessLimits& limits) {
  if (!gang_started || ranks.empty()) return std::nullopt;
  SteadyTime last_finished = *gang_started;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    const RankHealth& health = ranks[rank];
    last_finished = std::max(last_finished, health.last_heard);
    if (health.finished) continue;
    if (!health.attached && now - *gang_started > limits.attach) {
      return HungRank{absl::StrCat("rank ", rank, " did not report within ", Seconds(limits.attach),
                                   " s of the gang's start; see `simpoctl logs JOB --rank -1`")};
    }
    if (health.attached && now - health.last_heard > limits.heartbeat) {
      const std::string last = DescribeRank(health);
      return HungRank{
          absl::StrCat(NameRank(rank, health), " has been silent for ", Seconds(now - health.last_heard), " s (limit ",
                       Seconds(limits.heartbeat), " s)", last.empty() ? "" : "; it was last ", last),
          /*of_machine=*/true};
    }
  }
  const bool all_finished =
      std::all_of(ranks.begin(), ranks.end(), [](const RankHealth& health) { return health.finished; });
  if (all_finished && now - last_finished > limits.exit) {
    return HungRank{
        absl::StrCat("all ranks have finished, but the gang did not end within ", Seconds(limits.exit), " s")};
  }
  std::optional<std::string> stall =
      FindStall(now, ranks, [&](const RankHealth& health) { return LimitOf(health.heartbeat.phase(), limits); });
  if (!stall) return std::nullopt;
  return HungRank{*std::move(stall)};
}

std::optional<std::string> FindStalledRank(SteadyTime now, const std::vector<RankHealth>& ranks,
                                           const LivenessLimits& limits) {
  return FindStall(now, ranks, [&](const RankHealth& health) -> std::optional<milliseconds> {
    const std::string& phase = health.heartbeat.phase();
    if (phase != "train" && phase != "eval") return std::nullopt;
    const milliseconds slow(static_cast<int64_t>(kStalledSteps * 1000 * health.heartbeat.last_step_seconds()));
    return std::max(limits.stalled, slow);
  });
}

std::optional<Straggler> FindStraggler(const std::vector<RankHealth>& ranks) {
  if (ranks.size() < 2) return std::nullopt;
  size_t slowest = 0;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    if (ranks[rank].steps_heard < kStragglerSteps) return std::nullopt;
    if (ranks[rank].busy_seconds > ranks[slowest].busy_seconds) slowest = rank;
  }
  std::vector<double> others;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    if (rank != slowest) others.push_back(ranks[rank].busy_seconds);
  }
  const auto middle = others.begin() + static_cast<std::ptrdiff_t>(others.size() / 2);
  std::nth_element(others.begin(), middle, others.end());
  const double busy = ranks[slowest].busy_seconds;
  if (busy < kStragglerFactor * *middle || busy - *middle < kStragglerSeconds) return std::nullopt;
  return Straggler{static_cast<int>(slowest),
                   absl::StrFormat("%s holds the others up: it is busy for %.3g s of a step, the others for %.3g s "
                                   "(median); they wait for it. Look at its machine: clock, temperature, other load",
                                   NameRank(slowest, ranks[slowest]), busy, *middle)};
}

}  // namespace simpo
