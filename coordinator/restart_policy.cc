#include "coordinator/restart_policy.h"

#include <signal.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

constexpr std::array<std::pair<ExitMeaning, const char*>, 4> kNames = {{
    {ExitMeaning::kDone, "done"},
    {ExitMeaning::kRefused, "fail"},
    {ExitMeaning::kJobFault, "restart"},
    {ExitMeaning::kMachineFault, "machine"},
}};

bool WasLost(const v1::Attempt& attempt) { return attempt.fault() != v1::FAULT_KIND_UNSPECIFIED; }

// How many attempts at the end of `attempts` have ended after the same checkpoint, as far back as `counts` is true.
template <typename Counts>
int InARow(const std::vector<v1::Attempt>& attempts, Counts counts) {
  int count = 0;
  for (auto attempt = attempts.rbegin(); attempt != attempts.rend() && counts(*attempt); ++attempt) {
    ++count;
    const int64_t before = attempt + 1 == attempts.rend() ? 0 : (attempt + 1)->checkpoint_step();
    if (attempt->checkpoint_step() > before) break;
  }
  return count;
}

// Between 0 and 1; FNV-1a, since it must be the same after a restart.
double Fraction(std::string_view text) {
  uint64_t hash = 14695981039346656037u;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
  return static_cast<double>(hash >> 11) / static_cast<double>(uint64_t{1} << 53);
}

}  // namespace

std::optional<ExitMeaning> ParseExitMeaning(const std::string& name) {
  for (const auto& [meaning, known] : kNames) {
    if (name == known) return meaning;
  }
  return std::nullopt;
}

ExitMeaning MeaningOf(const RestartPolicy& policy, const AttemptEnd& end) {
  // A gang that did all its work has done it, whatever it was thought to be.
  if (end.exit_code == 0) return ExitMeaning::kDone;
  if (end.seen) return *end.seen == v1::FAULT_KIND_MACHINE ? ExitMeaning::kMachineFault : ExitMeaning::kJobFault;
  if (!end.exit_code) return ExitMeaning::kMachineFault;
  if (const auto told = policy.exit_codes.find(*end.exit_code); told != policy.exit_codes.end()) return told->second;
  switch (*end.exit_code) {
    case 2:
    case 3:
      return ExitMeaning::kRefused;
    case 127:
    case 128 + SIGHUP:
    case 128 + SIGTERM:
      return ExitMeaning::kMachineFault;
    default:
      return ExitMeaning::kJobFault;
  }
}

Verdict Judge(const RestartPolicy& policy, const v1::Job& job, const std::vector<v1::Attempt>& attempts,
              const AttemptEnd& end) {
  Verdict verdict{.meaning = MeaningOf(policy, end)};
  if (verdict.meaning == ExitMeaning::kMachineFault) {
    verdict.again = job.machine_faults() < policy.max_machine_faults;
    if (!verdict.again) {
      verdict.why_not = absl::StrCat("the machine has failed it ", job.machine_faults() + 1,
                                     " times (max_machine_faults is ", policy.max_machine_faults, ")");
    }
  } else if (verdict.meaning == ExitMeaning::kJobFault) {
    // The one that has just ended does not say its fault yet.
    const int in_a_row = InARow(attempts, [&](const v1::Attempt& attempt) {
      return &attempt == &attempts.back() || attempt.fault() == v1::FAULT_KIND_JOB;
    });
    const int64_t checkpoint = attempts.empty() ? 0 : attempts.back().checkpoint_step();
    if (job.restarts() >= job.max_restarts()) {
      verdict.why_not =
          absl::StrCat("given up after ", attempts.size(), attempts.size() == 1 ? " attempt" : " attempts",
                       " (max_restarts is ", job.max_restarts(), ")");
    } else if (in_a_row >= policy.max_without_progress) {
      verdict.why_not =
          absl::StrCat("given up: ", in_a_row, " attempts in a row have ended ",
                       checkpoint > 0 ? absl::StrCat("after the checkpoint of step ", checkpoint, " and before another")
                                      : std::string("before the first checkpoint"),
                       ", and the next would too");
    } else {
      verdict.again = true;
    }
  }
  return verdict;
}

std::chrono::milliseconds PauseBeforeNext(const RestartPolicy& policy, const v1::Job& job,
                                          const std::vector<v1::Attempt>& attempts) {
  const int in_a_row = std::max(1, InARow(attempts, WasLost));
  const double longest = static_cast<double>(policy.longest_pause.count());
  const double pause = static_cast<double>(policy.first_pause.count()) * std::exp2(std::min(30, in_a_row - 1));
  const double jitter = 1 + policy.jitter * Fraction(absl::StrCat(job.id(), "/", attempts.size()));
  return std::chrono::milliseconds(static_cast<int64_t>(std::min(longest, pause) * jitter));
}

}  // namespace simpo
