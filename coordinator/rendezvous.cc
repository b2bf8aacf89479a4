#include "coordinator/rendezvous.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

constexpr size_t kMaxGatherings = 1000;
constexpr int kMaxNamed = 20;

std::string Process(const v1::Hello& who) { return absl::StrCat(who.hostname(), " (process ", who.pid(), ")"); }

}  // namespace

void Rendezvous::Arrive(const Call& call, std::string bytes, Answer answer) {
  const v1::Hello& who = call.who;
  Answers answers;
  {
    const std::lock_guard lock(mutex_);
    Gathering& gathering = Open(who, answers);
    const auto earlier = gathering.ranks.find(who.rank());
    if (gathering.failed.ok() && earlier != gathering.ranks.end() && earlier->second.process != Process(who)) {
      gathering.failed = absl::FailedPreconditionError(absl::StrCat(
          "two processes have one number: rank ", who.rank(), " is on ", earlier->second.process, " and on ",
          Process(who), ". Every process of the gang needs a RANK (or JOB_COMPLETION_INDEX) of its own."));
    } else if (gathering.failed.ok() && who.world_size() != gathering.world_size) {
      gathering.failed = absl::FailedPreconditionError(absl::StrCat(
          "the ranks disagree on the size of the gang: ", gathering.world_size, " ranks or, says rank ", who.rank(),
          " on ", Process(who), ", ", who.world_size(), ". WORLD_SIZE must be the same everywhere."));
    }
    if (!gathering.failed.ok()) {
      answers.emplace_back(std::move(answer), gathering.failed);
      AnswerAll(gathering, gathering.failed, answers);
    } else {
      gathering.ranks[who.rank()] = {.process = Process(who), .call = call.id, .answer = std::move(answer)};
      if (who.rank() == 0) gathering.bytes = std::move(bytes);
      if (static_cast<int>(gathering.ranks.size()) == gathering.world_size) {
        AnswerAll(gathering, gathering.bytes, answers);
      }
    }
  }
  for (auto& [reply, result] : answers) reply(std::move(result));
}

Rendezvous::Gathering& Rendezvous::Open(const v1::Hello& who, Answers& answers) {
  if (gatherings_.size() >= kMaxGatherings && !gatherings_.contains(who.job_id())) {
    // Of jobs that trained or ended long ago.
    std::erase_if(gatherings_, [](const auto& item) {
      return std::none_of(item.second.ranks.begin(), item.second.ranks.end(),
                          [](const auto& rank) { return rank.second.call != nullptr; });
    });
  }
  Gathering& gathering = gatherings_[who.job_id()];
  if (gathering.attempt == who.attempt()) return gathering;
  AnswerAll(gathering, absl::FailedPreconditionError(absl::StrCat("attempt ", who.attempt(), " has begun")), answers);
  gathering = {.attempt = who.attempt(), .world_size = who.world_size()};
  return gathering;
}

void Rendezvous::AnswerAll(Gathering& gathering, const absl::StatusOr<std::string>& answer, Answers& answers) {
  for (auto& [number, rank] : gathering.ranks) {
    if (rank.call != nullptr) answers.emplace_back(std::move(rank.answer), answer);
    rank.call = nullptr;
    rank.answer = nullptr;
  }
}

Rendezvous::Answer Rendezvous::TakeAnswer(const Call& call) {
  const auto gathering = gatherings_.find(call.who.job_id());
  if (gathering == gatherings_.end()) return nullptr;
  const auto rank = gathering->second.ranks.find(call.who.rank());
  if (rank == gathering->second.ranks.end() || rank->second.call != call.id) return nullptr;
  rank->second.call = nullptr;
  return std::exchange(rank->second.answer, nullptr);
}

void Rendezvous::Expire(const Call& call) {
  Answer answer;
  std::string missing;
  {
    const std::lock_guard lock(mutex_);
    answer = TakeAnswer(call);
    if (!answer) return;
    const Gathering& gathering = gatherings_[call.who.job_id()];
    int count = 0;
    for (int rank = 0; rank < gathering.world_size; ++rank) {
      if (gathering.ranks.contains(rank)) continue;
      if (++count <= kMaxNamed) absl::StrAppend(&missing, missing.empty() ? "" : ", ", rank);
    }
    if (count > kMaxNamed) absl::StrAppend(&missing, " and ", count - kMaxNamed, " more");
    missing = absl::StrCat(count == 1 ? "rank " : "ranks ", missing, " of ", gathering.world_size, " of job ",
                           call.who.job_id(), ", attempt ", call.who.attempt(), ", did not come. See their logs.");
  }
  answer(absl::UnavailableError(missing));
}

void Rendezvous::Forget(const Call& call) {
  Answer answer;  // goes when the lock has gone
  const std::lock_guard lock(mutex_);
  answer = TakeAnswer(call);
}

}  // namespace simpo
