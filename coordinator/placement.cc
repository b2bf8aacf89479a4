#include "coordinator/placement.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "coordinator/preemption.h"

namespace simpo {
namespace {

// How many jobs behind the head are looked at in one decision; those beyond have their turn later.
constexpr int kBackfillDepth = 1'000;
// 2^22 is more than any two priorities of job files differ by.
constexpr int kMostGains = 22;

int GainAfter(int64_t steps) { return (1 << std::min<int64_t>(steps, kMostGains)) - 1; }

std::string Ordinal(int number) {
  const int last = number % 10;
  const bool teens = number / 10 % 10 == 1;
  return absl::StrCat(number, teens ? "th" : last == 1 ? "st" : last == 2 ? "nd" : last == 3 ? "rd" : "th");
}

std::string Slots(int count) { return absl::StrCat(count, count == 1 ? " slot" : " slots"); }

std::string NeedOf(const GangShape& shape) {
  if (shape.nodes == 1) return absl::StrCat("it needs ", Slots(shape.slots_per_node));
  return absl::StrCat("it needs ", Slots(shape.slots_per_node), " on each of ", shape.nodes, " nodes");
}

}  // namespace

Scheduler::Scheduler(Options options) : options_(std::move(options)), cluster_(options_.nodes) {
  for (const auto& [label, slots] : options_.label_quotas) {
    quota_of_label_[label] = static_cast<int>(quotas_.size());
    quotas_.push_back({.whose = absl::StrCat("label ", label), .slots = slots});
  }
}

std::vector<int> Scheduler::QuotasOf(const JobOwner& owner) {
  std::vector<int> result;
  if (!options_.user_quotas.empty()) {
    auto known = quota_of_user_.find(owner.user);
    if (known == quota_of_user_.end()) {
      auto named = options_.user_quotas.find(owner.user);
      if (named == options_.user_quotas.end()) named = options_.user_quotas.find("*");
      const bool limited = named != options_.user_quotas.end();
      known = quota_of_user_.insert({owner.user, limited ? static_cast<int>(quotas_.size()) : -1}).first;
      if (limited) {
        quotas_.push_back({.whose = owner.user.empty() ? "the user without a name" : absl::StrCat("user ", owner.user),
                           .slots = named->second});
      }
    }
    if (known->second >= 0) result.push_back(known->second);
  }
  if (quota_of_label_.empty()) return result;
  for (const auto& [key, value] : owner.labels) {
    const auto found = quota_of_label_.find(absl::StrCat(key, "=", value));
    if (found != quota_of_label_.end()) result.push_back(found->second);
  }
  return result;
}

const Scheduler::Quota* Scheduler::Exceeded(const Waiting& waiting) const {
  for (int index : waiting.quotas) {
    const Quota& quota = quotas_[index];
    if (quota.used + waiting.job.shape.slots() > quota.slots) return &quota;
  }
  return nullptr;
}

void Scheduler::Count(const RunningJob& job, int sign) {
  int slots = 0;
  for (const NodeShare& share : job.where) slots += share.slots;
  for (int quota : job.quotas) quotas_[quota].used += sign * slots;
}

std::string Scheduler::NeverStarts(const GangShape& shape, const JobOwner& owner) {
  for (int index : QuotasOf(owner)) {
    const Quota& quota = quotas_[index];
    if (shape.slots() > quota.slots) {
      return absl::StrCat(NeedOf(shape), ", and ", quota.whose, " may have ", quota.slots,
                          " at a time; ask for fewer, or raise the quota in the coordinator's config file");
    }
  }
  const int large_enough = cluster_.NodesWithTotal(shape.slots_per_node, /*even_if_down=*/true);
  if (large_enough >= shape.nodes) return "";
  const std::vector<Node>& nodes = cluster_.nodes();
  if (nodes.size() == 1 && shape.nodes == 1) {
    return absl::StrCat(NeedOf(shape), " and this coordinator has ", nodes[0].slots,
                        "; cancel it or restart the coordinator with --slots ", shape.slots_per_node);
  }
  return absl::StrCat(NeedOf(shape), ", and ", large_enough, " of ", nodes.size(),
                      nodes.size() == 1 ? " node has" : " nodes have", " as many; ask for fewer or smaller nodes");
}

void Scheduler::SetGain(Waiting& waiting, int64_t now_ms) {
  if (options_.starvation_ms <= 0) return;
  const int64_t steps = std::max<int64_t>(0, now_ms - waiting.job.waiting_since_ms) / options_.starvation_ms;
  waiting.gain = GainAfter(steps);
  if (steps >= kMostGains) return;
  promotions_.insert({waiting.job.waiting_since_ms + (steps + 1) * options_.starvation_ms, waiting.job.sequence});
}

void Scheduler::Promote(int64_t now_ms) {
  while (!promotions_.empty() && promotions_.begin()->first <= now_ms) {
    const int64_t sequence = promotions_.begin()->second;
    promotions_.erase(promotions_.begin());
    Waiting& waiting = waiting_.at(sequence);
    line_.erase({waiting.rank(), sequence, nullptr});
    SetGain(waiting, now_ms);
    line_.insert({waiting.rank(), sequence, &waiting});
  }
}

void Scheduler::LeaveLine(int64_t sequence) {
  const auto found = waiting_.find(sequence);
  if (found == waiting_.end()) return;
  Waiting& waiting = found->second;
  if (head_ == &waiting) head_ = nullptr;
  line_.erase({waiting.rank(), sequence, nullptr});
  if (options_.starvation_ms > 0 && waiting.never.empty()) {
    const int64_t since = waiting.job.waiting_since_ms;
    for (int64_t steps = 1; steps <= kMostGains; ++steps) {
      if (GainAfter(steps - 1) != waiting.gain) continue;
      promotions_.erase({since + steps * options_.starvation_ms, sequence});
    }
  }
  untold_.erase(sequence);
  waiting_.erase(found);
}

void Scheduler::Wait(WaitingJob job) {
  Remove(job.sequence);
  const int64_t sequence = job.sequence;
  Waiting& waiting = waiting_[sequence];
  untold_.insert(sequence);
  waiting.never = NeverStarts(job.shape, job.owner);
  waiting.quotas = QuotasOf(job.owner);
  waiting.job = std::move(job);
  if (!waiting.never.empty()) return;
  // The gain comes with the next decision, which knows the time.
  if (options_.starvation_ms > 0) {
    promotions_.insert({waiting.job.waiting_since_ms + options_.starvation_ms, sequence});
  }
  line_.insert({waiting.rank(), sequence, &waiting});
}

void Scheduler::Run(RunningJob job, const JobOwner& owner) {
  LeaveLine(job.sequence);
  GiveBack(job.sequence);
  job.quotas = QuotasOf(owner);
  Count(job, 1);
  cluster_.Put(std::move(job));
}

void Scheduler::GiveBack(int64_t sequence) {
  if (const auto job = cluster_.Remove(sequence)) Count(*job, -1);
}

void Scheduler::Remove(int64_t sequence) {
  LeaveLine(sequence);
  GiveBack(sequence);
  makes_room_for_.erase(sequence);
}

bool Scheduler::SetNodeUp(const std::string& name, bool up) {
  const auto node = cluster_.by_name().find(name);
  if (node == cluster_.by_name().end()) return false;
  cluster_.SetUp(node->second, up);
  return true;
}

bool Scheduler::NodesAreDown(const GangShape& shape) const {
  return cluster_.NodesWithTotal(shape.slots_per_node, /*even_if_down=*/false) < shape.nodes;
}

void Scheduler::Start(Waiting& waiting, NodeShares where, int64_t now_ms, PlacementDecision* decision) {
  const WaitingJob& job = waiting.job;
  RunningJob running{.sequence = job.sequence,
                     .id = job.id,
                     .priority = job.priority + waiting.gain,
                     .started_ms = now_ms,
                     .ends_by_ms = job.time_left_ms > 0 ? now_ms + job.time_left_ms : kNever,
                     .where = std::move(where),
                     .quotas = std::move(waiting.quotas)};
  decision->start.push_back({.sequence = job.sequence, .where = running.where, .gain = waiting.gain});
  LeaveLine(job.sequence);
  Count(running, 1);
  cluster_.Put(std::move(running));
}

PlacementDecision Scheduler::Decide(int64_t now_ms) {
  Promote(now_ms);
  PlacementDecision decision;
  head_ = nullptr;
  room_at_ms_ = kNever;
  std::optional<Reservation> kept;
  int looked_at = 0;  // behind the head
  for (auto place = line_.begin(); place != line_.end();) {
    Waiting& waiting = *place++->waiting;
    const WaitingJob& job = waiting.job;
    if (head_ != nullptr && cluster_.slots_free() <= 0) break;
    if (job.not_before_ms > now_ms || Exceeded(waiting) != nullptr || NodesAreDown(job.shape)) continue;
    // Those that may not start are passed without being counted: many of them keep nobody waiting.
    if (head_ != nullptr && ++looked_at > kBackfillDepth) break;
    if (head_ == nullptr) {
      if (std::optional<NodeShares> where = cluster_.Fit(job.shape)) {
        Start(waiting, *std::move(where), now_ms, &decision);
      } else {
        head_ = &waiting;
        // First, so that nobody is let into slots that are about to be cleared.
        if (options_.preemption) Preempt(&decision);
        kept.emplace(cluster_, job.shape, now_ms);
        room_at_ms_ = kept->room_at_ms();
      }
      continue;
    }
    const int64_t ends_by_ms = job.time_left_ms > 0 ? now_ms + job.time_left_ms : kNever;
    if (std::optional<NodeShares> where = kept->FitBeside(job.shape, ends_by_ms)) {
      const NodeShares shares = *where;
      Start(waiting, *std::move(where), now_ms, &decision);
      kept->Started(shares, ends_by_ms);
    }
  }
  return decision;
}

void Scheduler::Preempt(PlacementDecision* decision) {
  const WaitingJob& winner = head_->job;
  for (int64_t victim : FindVictims(cluster_, winner.shape, winner.priority)) {
    RunningJob job = *cluster_.Remove(victim);
    job.leaving = true;
    cluster_.Put(std::move(job));
    makes_room_for_[victim] = winner.id;
    decision->preempt.push_back({.victim = victim, .winner = winner.sequence});
  }
}

void Scheduler::Explain(int64_t now_ms, int first, int from, int count,
                        const std::function<void(int64_t, std::string)>& tell) {
  const auto tell_from = [&](int number, int end) {
    if (number > in_line()) return;
    for (auto place = line_.find_by_order(number - 1); place != line_.end() && number < end; ++place, ++number) {
      untold_.erase(place->sequence);
      tell(place->sequence, Reason(*place->waiting, number, now_ms));
    }
  };
  tell_from(1, first + 1);
  tell_from(std::max(from, first + 1), from + count);
  for (int64_t sequence : std::exchange(untold_, {})) {
    const Waiting& waiting = waiting_.at(sequence);
    if (!waiting.never.empty()) {
      tell(sequence, absl::StrCat("can never start here: ", waiting.never));
      continue;
    }
    const auto place = static_cast<int>(line_.order_of_key({waiting.rank(), sequence, nullptr})) + 1;
    tell(sequence, Reason(waiting, place, now_ms));
  }
}

std::string Scheduler::Room(const GangShape& shape) const {
  const int free = std::max(0, cluster_.slots_free());
  if (cluster_.nodes().size() == 1) {
    return absl::StrCat(free, " of ", cluster_.slots_total(), " slots free, needs ", shape.slots());
  }
  if (shape.nodes == 1) {
    return absl::StrCat(free, " of ", cluster_.slots_total(), " slots free, at most ", cluster_.LargestFree(),
                        " on one node, needs ", shape.slots_per_node);
  }
  return absl::StrCat(Slots(shape.slots_per_node), " are free on ", cluster_.NodesWithFree(shape.slots_per_node),
                      " of ", cluster_.nodes().size(), " nodes, needs ", shape.nodes);
}

std::string Scheduler::Reason(const Waiting& waiting, int place, int64_t now_ms) const {
  const WaitingJob& job = waiting.job;
  if (job.not_before_ms > now_ms) {
    return absl::StrCat("waiting: the next attempt follows after a pause, in ",
                        (job.not_before_ms - now_ms + 999) / 1000, " s");
  }
  std::string line = absl::StrCat("waiting: ", Ordinal(place), " of ", line_.size(), " in the queue");
  const Waiting& front = *line_.begin()->waiting;
  if (place > 1) absl::StrAppend(&line, ", behind ", front.job.id);
  if (place > 2) absl::StrAppend(&line, " and ", place - 2, " more");
  if (waiting.gain > 0) absl::StrAppend(&line, ", priority raised by ", waiting.gain, " for its long wait");
  if (const Quota* quota = Exceeded(waiting)) {
    return absl::StrCat(line, "; ", quota->whose, " has ", quota->used, " of at most ", Slots(quota->slots), ", needs ",
                        job.shape.slots());
  }
  if (NodesAreDown(job.shape)) {
    return absl::StrCat(line, "; ", NeedOf(job.shape), ", and nodes that are large enough are down or drained");
  }
  absl::StrAppend(&line, "; ", Room(job.shape));
  if (&waiting != head_) {
    const bool fits = cluster_.NodesWithFree(job.shape.slots_per_node) >= job.shape.nodes;
    if (fits && head_ != nullptr) absl::StrAppend(&line, "; they are kept for ", head_->job.id);
    return line;
  }
  for (const auto& [victim, winner] : makes_room_for_) {
    if (winner != job.id) continue;
    return absl::StrCat(line, "; job ", cluster_.running().at(victim).id, " is making room for it");
  }
  if (room_at_ms_ == kNever) return line;
  if (room_at_ms_ <= now_ms) return absl::StrCat(line, "; gangs that are ending make room for it");
  return absl::StrCat(line, "; time limits make room for it by ",
                      absl::FormatTime("%Y-%m-%d %H:%M:%SZ", absl::FromUnixMillis(room_at_ms_), absl::UTCTimeZone()));
}

int ThreadsPerRank(int threads_per_rank, int ranks, int slots_total) {
  if (threads_per_rank > 0) return threads_per_rank;
  return std::max(1, slots_total / std::max(1, ranks));
}

}  // namespace simpo
