#include "coordinator/rendezvous.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <optional>
#include <thread>

#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// One rank's call and what it is answered.
struct Caller {
  Rendezvous& rendezvous;
  Rendezvous::Call call;
  std::optional<absl::StatusOr<std::string>> answer;
  int answers = 0;

  Caller(Rendezvous& rendezvous, int rank, int world_size, int pid, int attempt = 1, const std::string& job = "job-1")
      : rendezvous(rendezvous) {
    call.who.set_job_id(job);
    call.who.set_attempt(attempt);
    call.who.set_rank(rank);
    call.who.set_world_size(world_size);
    call.who.set_pid(pid);
    call.who.set_hostname("here");
    call.id = this;
    rendezvous.Arrive(call, absl::StrCat("bytes of ", rank), [this](absl::StatusOr<std::string> given) {
      answer = std::move(given);
      ++answers;
    });
  }
  Caller(const Caller&) = delete;
  std::string Error() const {
    return answer.has_value() && !answer->ok() ? std::string(answer->status().message()) : "";
  }
  bool Met() const { return answer.has_value() && answer->ok() && **answer == "bytes of 0" && answers == 1; }
};

TEST(RendezvousTest, AllGetTheBytesOfRank0OnceAllHaveCome) {
  Rendezvous rendezvous;
  Caller two(rendezvous, 2, 3, 12), zero(rendezvous, 0, 3, 10);
  EXPECT_FALSE(two.answer || zero.answer);
  Caller one(rendezvous, 1, 3, 11);
  EXPECT_TRUE(zero.Met() && one.Met() && two.Met());
  Caller alone(rendezvous, 0, 1, 10, 1, "job-2");
  EXPECT_TRUE(alone.Met());
}

TEST(RendezvousTest, JobsDoNotMix) {
  Rendezvous rendezvous;
  Caller a(rendezvous, 0, 2, 1, 1, "job-a"), b(rendezvous, 1, 2, 2, 1, "job-b");
  EXPECT_FALSE(a.answer || b.answer);
}

TEST(RendezvousTest, WhoIsMissingIsNamed) {
  Rendezvous rendezvous;
  Caller one(rendezvous, 1, 4, 11), three(rendezvous, 3, 4, 13);
  rendezvous.Expire(one.call);
  EXPECT_THAT(one.Error(), HasSubstr("ranks 0, 2 of 4 of job job-1, attempt 1, did not come"));
  EXPECT_EQ(one.answer->status().code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(three.answer);
  // They come late, and the one that asks again is with them.
  Caller zero(rendezvous, 0, 4, 10), two(rendezvous, 2, 4, 12);
  EXPECT_TRUE(three.Met() && zero.Met() && two.Met());
  Caller again(rendezvous, 1, 4, 11);
  EXPECT_TRUE(again.Met());
  rendezvous.Expire(three.call);  // an alarm that comes too late
  EXPECT_EQ(three.answers, 1);
}

TEST(RendezvousTest, ManyMissingRanksAreCounted) {
  Rendezvous rendezvous;
  Caller zero(rendezvous, 0, 1000, 10);
  rendezvous.Expire(zero.call);
  EXPECT_THAT(zero.Error(), HasSubstr("19, 20 and 979 more of 1000"));
}

TEST(RendezvousTest, ACallThatIsGoneIsNotAnsweredAndItsRankMayComeAgain) {
  Rendezvous rendezvous;
  Caller lost(rendezvous, 1, 2, 11);
  Caller again(rendezvous, 1, 2, 11);  // before the coordinator sees that the first is gone
  rendezvous.Forget(lost.call);
  Caller zero(rendezvous, 0, 2, 10);
  EXPECT_TRUE(again.Met() && zero.Met());
  EXPECT_FALSE(lost.answer);
}

TEST(RendezvousTest, TwoProcessesWithOneNumberAreAnErrorForAll) {
  Rendezvous rendezvous;
  Caller zero(rendezvous, 0, 3, 10), one(rendezvous, 1, 3, 11), other(rendezvous, 1, 3, 99), late(rendezvous, 2, 3, 12);
  for (const Caller* caller : {&zero, &one, &other, &late}) {
    EXPECT_THAT(caller->Error(), AllOf(HasSubstr("rank 1 is on here (process 11) and on here (process 99)")));
    EXPECT_EQ(caller->answers, 1);
  }
}

TEST(RendezvousTest, AnotherWorldSizeIsAnErrorForAll) {
  Rendezvous rendezvous;
  Caller zero(rendezvous, 0, 3, 10), one(rendezvous, 1, 4, 11), late(rendezvous, 2, 3, 12);
  for (const Caller* caller : {&zero, &one, &late}) {
    EXPECT_THAT(caller->Error(), HasSubstr("3 ranks or, says rank 1 on here (process 11), 4"));
  }
}

TEST(RendezvousTest, ANewAttemptBeginsAnew) {
  Rendezvous rendezvous;
  Caller old(rendezvous, 1, 2, 11);
  Caller zero(rendezvous, 0, 2, 20, /*attempt=*/2);
  EXPECT_THAT(old.Error(), HasSubstr("attempt 2 has begun"));
  EXPECT_FALSE(zero.answer) << "it met a rank of the attempt before";
  Caller one(rendezvous, 1, 2, 21, /*attempt=*/2);
  EXPECT_TRUE(zero.Met() && one.Met());
}

TEST(RendezvousTest, GatheringsOfLongAgoAreForgotten) {
  Rendezvous rendezvous;
  Caller waits(rendezvous, 0, 2, 1, 1, "a-job");
  for (int i = 0; i < 3000; ++i) Caller(rendezvous, 0, 1, 1, 1, absl::StrCat("job-", i));
  Caller comes(rendezvous, 1, 2, 2, 1, "a-job");
  EXPECT_TRUE(waits.Met() && comes.Met());
}

TEST(RendezvousTest, RanksMayComeFromManyThreads) {
  Rendezvous rendezvous;
  std::vector<std::thread> threads;
  std::vector<std::unique_ptr<Caller>> callers(16);
  for (int rank = 0; rank < 16; ++rank) {
    threads.emplace_back([&, rank] { callers[rank] = std::make_unique<Caller>(rendezvous, rank, 16, 100 + rank); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const auto& caller : callers) EXPECT_TRUE(caller->Met());
}

}  // namespace
}  // namespace simpo
