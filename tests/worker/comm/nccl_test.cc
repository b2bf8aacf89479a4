// collectives_nccl.cc on a stand-in for libnccl and CUDA (stand_in.h): every sequence of calls, the
// numbers, and what happens when something fails.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <barrier>
#include <chrono>
#include <thread>

#include "tests/worker/comm/stand_in.h"
#include "worker/comm/collectives.h"

namespace simpo {
namespace {

using stand_in::Call;
using stand_in::Calls;
using stand_in::Count;
using stand_in::RunRanks;
using testing::AllOf;
using testing::Each;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// So short that a test ends soon, so long that a busy machine does not meet it by chance.
const NcclOptions kImpatient = {
    .timeout = milliseconds(700), .connect_timeout = milliseconds(700), .watch_interval = milliseconds(10)};

class Nccl : public testing::Test {
 protected:
  void SetUp() override { stand_in::Reset(); }
  void TearDown() override { EXPECT_THAT(stand_in::Problems(), IsEmpty()); }

  static void RunAll(int ranks, const std::function<void(Collectives&)>& rank_main) {
    EXPECT_THAT(RunRanks(ranks, rank_main), Each(""));
  }
};

// The device's calls without those that make and end the communicator.
std::vector<Call> VerbCalls(int device) {
  std::vector<Call> calls;
  for (const Call& call : Calls(device)) {
    if (call.name.find("Comm") == std::string::npos && call.name != "ncclGetUniqueId") calls.push_back(call);
  }
  return calls;
}

std::vector<std::string> Names(const std::vector<Call>& calls) {
  std::vector<std::string> names;
  for (const Call& call : calls) names.push_back(call.name + " on " + call.stream);
  return names;
}

TEST_F(Nccl, AllReduceSumsEveryTypeOnBothSides) {
  for (const int size : {1, 2, 3, 4}) {
    RunAll(size, [&](Collectives& comm) {
      EXPECT_EQ(comm.world_size(), size);
      for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kDouble, at::kLong}) {
        for (const int64_t numel : {0, 1, 5, 1000}) {
          const at::Tensor base = at::arange(numel, at::kLong).remainder(5).to(dtype);
          at::Tensor tensor = base * (comm.rank() + 1);
          comm.AllReduce(tensor);
          EXPECT_TRUE(at::equal(tensor, base * (size * (size + 1) / 2))) << dtype << " " << numel;
        }
      }
    });
  }
}

TEST_F(Nccl, ReduceScatterGivesEachRankItsSlice) {
  for (const int size : {1, 2, 3}) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      RunAll(size, [&](Collectives& comm) {
        const int64_t slice = 37;
        const at::Tensor base = at::arange(slice * size, at::kLong).remainder(7).to(dtype);
        at::Tensor tensor = base * (comm.rank() + 1);
        comm.ReduceScatter(tensor);
        EXPECT_TRUE(at::equal(tensor.narrow(0, comm.rank() * slice, slice),
                              base.narrow(0, comm.rank() * slice, slice) * (size * (size + 1) / 2)));
      });
    }
  }
}

TEST_F(Nccl, AllGatherAndBroadcastCarryAnyType) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kDouble, at::kLong, at::kByte, at::kInt}) {
    RunAll(3, [&](Collectives& comm) {
      const at::Tensor whole = at::arange(33, at::kLong).to(dtype);
      at::Tensor tensor = at::zeros_like(whole);
      tensor.narrow(0, comm.rank() * 11, 11).copy_(whole.narrow(0, comm.rank() * 11, 11));
      comm.AllGather(tensor);
      EXPECT_TRUE(at::equal(tensor, whole)) << dtype;
      for (int root = 0; root < 3; ++root) {
        at::Tensor from_root = at::full({77}, comm.rank(), at::kLong).to(dtype);
        comm.Broadcast(from_root, root);
        EXPECT_TRUE(at::equal(from_root, at::full({77}, root, at::kLong).to(dtype)));
      }
    });
  }
}

// The order on the streams, the slices, the types and the counts of each verb on device memory.
TEST_F(Nccl, CallsOnDeviceMemory) {
  std::vector<at::Tensor> sums(2), scattered(2), gathered(2), sent(2);
  RunAll(2, [&](Collectives& comm) {
    const int rank = comm.rank();
    sums[rank] = at::ones({10}, at::kFloat);
    scattered[rank] = at::ones({10}, at::kBFloat16);
    gathered[rank] = at::ones({10}, at::kFloat);
    sent[rank] = at::ones({10}, at::kBFloat16);
    comm.AllReduce(sums[rank]);
    comm.ReduceScatter(scattered[rank]);
    comm.AllGather(gathered[rank]);
    comm.Broadcast(sent[rank], 1);
  });
  for (int rank = 0; rank < 2; ++rank) {
    const std::vector<Call> calls = VerbCalls(rank);
    ASSERT_EQ(calls.size(), 20u);
    for (size_t verb = 0; verb < 4; ++verb) {
      const std::vector<Call> its(calls.begin() + verb * 5, calls.begin() + verb * 5 + 5);
      ASSERT_THAT(Names(its), ElementsAre("RecordEvent on current", "StreamWaitEvent on comm",
                                          testing::MatchesRegex("nccl.* on comm"), "RecordEvent on comm",
                                          "StreamWaitEvent on current"));
      EXPECT_EQ(its[0].event, its[1].event);
      EXPECT_EQ(its[3].event, its[4].event);
      EXPECT_NE(its[0].event, its[3].event);
    }
    const auto expect = [&](size_t verb, const char* name, const at::Tensor& tensor, size_t from, size_t to,
                            size_t count, ncclDataType_t type, int root) {
      const Call& call = calls[verb * 5 + 2];
      const auto* data = static_cast<const char*>(tensor.data_ptr());
      EXPECT_EQ(call.name, name);
      EXPECT_EQ(call.from, data + from) << name;
      EXPECT_EQ(call.to, data + to) << name;
      EXPECT_EQ(call.count, count) << name;
      EXPECT_EQ(call.type, type) << name;
      EXPECT_EQ(call.root, root) << name;
    };
    const auto r = static_cast<size_t>(rank);
    expect(0, "ncclAllReduce", sums[rank], 0, 0, 10, ncclFloat32, -1);
    expect(1, "ncclReduceScatter", scattered[rank], 0, r * 5 * 2, 5, ncclBfloat16, -1);
    expect(2, "ncclAllGather", gathered[rank], r * 5 * 4, 0, 20, ncclUint8, -1);
    expect(3, "ncclBroadcast", sent[rank], 0, 0, 20, ncclUint8, 1);
  }
}

// Votes and statistics: through pinned memory to the device and back, all in the order of the comm stream.
TEST_F(Nccl, HostMemoryIsStaged) {
  for (const at::ScalarType dtype : {at::kDouble, at::kLong}) {
    stand_in::Reset();
    std::vector<at::Tensor> votes(2);
    std::vector<std::vector<bool>> places(2);
    RunAll(2, [&](Collectives& comm) {
      at::Tensor& mine = votes[comm.rank()] = at::ones({3}, dtype);
      Pending pending = comm.BeginAllReduce(mine);
      for (const Call& call : VerbCalls(comm.rank())) {
        if (call.name == "CopyAsync") {
          places[comm.rank()] = {stand_in::IsPinnedMemory(call.from), stand_in::IsDeviceMemory(call.to)};
          break;
        }
      }
      pending.Wait();
      EXPECT_TRUE(at::equal(mine, at::full({3}, 2, dtype)));
    });
    for (int rank = 0; rank < 2; ++rank) {
      const std::vector<Call> calls = VerbCalls(rank);
      ASSERT_THAT(Names(calls), ElementsAre("RecordEvent on current", "StreamWaitEvent on comm", "CopyAsync on comm",
                                            "ncclAllReduce on comm", "CopyAsync on comm", "RecordEvent on comm"));
      EXPECT_THAT(places[rank], ElementsAre(true, true));
      EXPECT_EQ(calls[2].to, calls[3].from);
      EXPECT_EQ(calls[3].from, calls[3].to);
      EXPECT_EQ(calls[4].from, calls[2].to);
      EXPECT_EQ(calls[4].to, calls[2].from);
      EXPECT_EQ(calls[2].count, 24u);
      EXPECT_EQ(calls[3].count, 3u);
      EXPECT_EQ(calls[3].type, dtype == at::kDouble ? ncclFloat64 : ncclInt64);
      EXPECT_EQ(calls[4].count, 24u);
      EXPECT_FALSE(stand_in::IsPinnedMemory(calls[2].from)) << "the staging memory is never given back";
      EXPECT_FALSE(stand_in::IsDeviceMemory(calls[2].to)) << "the staging memory is never given back";
    }
  }
}

// The current stream still computes what a collective takes, and goes on with what it gives; the host is
// ahead of both.
TEST_F(Nccl, StreamsAreOrderedAndTheHostIsNotHeldUp) {
  std::atomic<bool> open = false;
  std::barrier all_are_ahead(2);
  RunAll(2, [&](Collectives& comm) {
    stand_in::SetInStep(false);
    at::Tensor tensor = at::zeros({8}, at::kFloat);
    at::Tensor result = at::zeros({8}, at::kFloat);
    stand_in::LaunchOnCurrentStream([&, rank = comm.rank()] {
      while (!open) std::this_thread::yield();
      tensor.fill_(rank + 1);
    });
    Pending pending = comm.BeginAllReduce(tensor);
    pending.Wait();
    stand_in::LaunchOnCurrentStream([&] { result.copy_(tensor); });
    all_are_ahead.arrive_and_wait();  // a host that blocks never gets here
    open = true;
    stand_in::SynchronizeCurrentStream();
    EXPECT_TRUE(at::equal(result, at::full({8}, 3, at::kFloat)));
  });
}

TEST_F(Nccl, SeveralAreUnderWayInTheirOrder) {
  RunAll(3, [&](Collectives& comm) {
    std::vector<at::Tensor> tensors;
    std::vector<Pending> pending;
    for (int i = 0; i < 20; ++i) {
      tensors.push_back(at::full({3}, i + comm.rank(), i % 3 == 0 ? at::kLong : at::kFloat));
      pending.push_back(comm.BeginAllReduce(tensors.back()));
    }
    for (int i = 19; i >= 0; --i) {  // in any order
      pending[i].Wait();
      EXPECT_EQ(tensors[i][0].item<double>(), 3 * i + 3);
    }
  });
}

// Memory is the caller's again after Wait, at once: a bucket that stage 3 releases must not live on.
TEST_F(Nccl, NothingHoldsTheTensorAfterWait) {
  RunAll(2, [&](Collectives& comm) {
    at::Tensor tensor = at::ones({4}, at::kFloat);
    Pending pending = comm.BeginAllGather(tensor);
    EXPECT_GT(tensor.use_count(), 1u) << "it may be freed while it travels";
    pending.Wait();
    EXPECT_EQ(tensor.use_count(), 1u);
  });
}

TEST_F(Nccl, ABarrierWaitsForAll) {
  std::atomic<int> here = 0;
  RunAll(4, [&](Collectives& comm) {
    for (int i = 1; i <= 20; ++i) {
      ++here;
      comm.Barrier();
      EXPECT_GE(here.load(), 4 * i);
      comm.Barrier();
    }
  });
}

TEST_F(Nccl, SentBytesAreCountedAsOverMpi) {
  RunAll(4, [&](Collectives& comm) {
    at::Tensor tensor = at::zeros({1000}, at::kFloat);
    comm.AllReduce(tensor);
    comm.ReduceScatter(tensor);
    comm.AllGather(tensor);
    comm.Broadcast(tensor, 2);
    EXPECT_EQ(comm.sent().all_reduce, 6000);
    EXPECT_EQ(comm.sent().reduce_scatter, 3000);
    EXPECT_EQ(comm.sent().all_gather, 3000);
    EXPECT_EQ(comm.sent().broadcast, comm.rank() == 2 ? 4000 : 0);
  });
}

// ncclInProgress: the next call, and the event, come only when the one before is through.
TEST_F(Nccl, CallsThatAreInProgressArePolled) {
  stand_in::Reset({.in_progress_polls = 5});
  RunAll(2, [&](Collectives& comm) {
    at::Tensor tensor = at::ones({4}, at::kFloat);
    for (int i = 0; i < 3; ++i) comm.AllReduce(tensor);
    EXPECT_TRUE(at::equal(tensor, at::full({4}, 8, at::kFloat)));
  });
}

TEST_F(Nccl, AHealthyCommunicatorIsFinalizedAndDestroyed) {
  RunAll(2, [](Collectives& comm) { comm.Barrier(); });
  for (int rank = 0; rank < 2; ++rank) {
    EXPECT_EQ(Count(rank, "ncclGetUniqueId"), rank == 0 ? 1 : 0);
    EXPECT_EQ(Count(rank, "ncclCommInitRankConfig"), 1);
    EXPECT_EQ(Count(rank, "ncclCommFinalize"), 1);
    EXPECT_EQ(Count(rank, "ncclCommDestroy"), 1);
    EXPECT_EQ(Count(rank, "ncclCommAbort"), 0);
  }
}

void ExpectAbortedOnce(int rank) {
  EXPECT_EQ(Count(rank, "ncclCommAbort"), 1) << "rank " << rank;
  EXPECT_EQ(Count(rank, "ncclCommFinalize"), 0) << "rank " << rank;
  EXPECT_EQ(Count(rank, "ncclCommDestroy"), 0) << "rank " << rank;
}

// Reduces until it throws, at most 1000 times.
void ReduceOften(Collectives& comm) {
  for (int i = 0; i < 1000; ++i) {
    at::Tensor tensor = at::ones({1024}, at::kFloat);
    comm.AllReduce(tensor);
    at::Tensor votes = at::zeros({2}, at::kLong);
    comm.AllReduce(votes);
  }
}

TEST_F(Nccl, ACallThatFailsThrowsAndAbortsOnEveryRank) {
  stand_in::Reset({.call_errors = {{{1, 4}, ncclSystemError}}});
  const std::vector<std::string> errors = RunRanks(3, ReduceOften, kImpatient);
  EXPECT_THAT(errors[1], AllOf(HasSubstr("rank 1 of 3, all-reduce 5 (4096 bytes)"), HasSubstr("NCCL result 2"),
                               HasSubstr("what the stand-in says"), HasSubstr("NCCL_DEBUG=INFO")));
  // The others wait for it in vain, and say for what.
  for (const int rank : {0, 2}) {
    EXPECT_THAT(errors[rank], AllOf(HasSubstr("all-reduce 5 (4096 bytes)"), HasSubstr("not done after 0.7 s"),
                                    HasSubstr("SIMPO_NCCL_TIMEOUT_S")));
  }
  for (int rank = 0; rank < 3; ++rank) ExpectAbortedOnce(rank);
}

TEST_F(Nccl, AnErrorFoundLaterThrows) {
  stand_in::Reset({.async_errors = {{{0, 6}, ncclInternalError}}, .hangs = {{{0, 6}, true}}});
  const std::vector<std::string> errors = RunRanks(2, ReduceOften, kImpatient);
  EXPECT_THAT(errors[0], AllOf(HasSubstr("rank 0 of 2, with all-reduce 7 (4096 bytes) under way"),
                               HasSubstr("NCCL result 3"), HasSubstr("NCCL_DEBUG=INFO")));
  EXPECT_THAT(errors[1], HasSubstr("all-reduce 7 (4096 bytes): not done after 0.7 s"));
  for (int rank = 0; rank < 2; ++rank) ExpectAbortedOnce(rank);
}

TEST_F(Nccl, ACollectiveThatHangsIsNamedAndAborted) {
  stand_in::Reset({.hangs = {{{1, 3}, true}}});
  const std::vector<std::string> errors = RunRanks(2, ReduceOften, kImpatient);
  for (int rank = 0; rank < 2; ++rank) {
    EXPECT_THAT(errors[rank],
                AllOf(HasSubstr("all-reduce 4 (16 bytes): not done after 0.7 s"), HasSubstr("another rank is gone")));
    ExpectAbortedOnce(rank);
  }
}

// A later collective that queues behind the one that hangs is not blamed.
TEST_F(Nccl, TheFirstThatHangsIsBlamed) {
  stand_in::Reset({.hangs = {{{0, 1}, true}}});
  const std::vector<std::string> errors = RunRanks(
      1,
      [](Collectives& comm) {
        at::Tensor tensor = at::ones({4}, at::kFloat);
        comm.AllReduce(tensor);
        comm.AllGather(tensor);
        for (int i = 0; i < 5; ++i) comm.Broadcast(tensor, 0);
      },
      kImpatient);
  EXPECT_THAT(errors[0], HasSubstr("all-gather 2 (16 bytes)"));
}

TEST_F(Nccl, APeerThatDiesEndsTheOthersSoon) {
  const auto begin = Clock::now();
  const std::vector<std::string> errors =
      RunRanks(4,
               [](Collectives& comm) {
                 if (comm.rank() != 2) return ReduceOften(comm);
                 at::Tensor tensor = at::ones({1024}, at::kFloat);
                 comm.AllReduce(tensor);
                 stand_in::Die(2);
                 throw std::runtime_error("killed");
               },
               {.timeout = std::chrono::minutes(10), .watch_interval = milliseconds(10)});
  EXPECT_LT(Clock::now() - begin, std::chrono::seconds(10)) << "they waited for the time-out";
  for (const int rank : {0, 1, 3}) {
    EXPECT_THAT(errors[rank], AllOf(HasSubstr("all-reduce 2 (16 bytes) under way"), HasSubstr("NCCL result 6")));
    ExpectAbortedOnce(rank);
  }
}

TEST_F(Nccl, WhatComesAfterAFailureThrowsTheSame) {
  stand_in::Reset({.hangs = {{{0, 1}, true}}});
  RunRanks(
      1,
      [](Collectives& comm) {
        at::Tensor tensor = at::ones({4}, at::kFloat);
        comm.AllReduce(tensor);
        at::Tensor votes = at::ones({4}, at::kLong);
        std::string first;
        try {
          comm.AllReduce(votes);
        } catch (const std::exception& error) {
          first = error.what();
        }
        EXPECT_THAT(first, HasSubstr("not done after"));
        EXPECT_TRUE(at::equal(votes, at::ones({4}, at::kLong))) << "what an aborted collective left was taken";
        for (int i = 0; i < 3; ++i) {
          try {
            comm.AllGather(tensor);
            ADD_FAILURE() << "it goes on";
          } catch (const std::exception& error) {
            EXPECT_EQ(error.what(), first);
          }
        }
      },
      kImpatient);
  ExpectAbortedOnce(0);
  EXPECT_EQ(Count(0, "ncclAllGather"), 0);
}

// The rank must get away although NCCL does not: its process ends, and with it all of this.
TEST_F(Nccl, AnAbortThatHangsHoldsNobodyUp) {
  stand_in::Reset({.hangs = {{{0, 0}, true}}, .abort_hangs = true});
  RunRanks(
      1,
      [](Collectives& comm) {
        at::Tensor votes = at::ones({4}, at::kLong);
        EXPECT_ANY_THROW(comm.AllReduce(votes));
        // Only now, so that the communicator can be taken down.
        std::thread([] { stand_in::Reset(); }).detach();
      },
      kImpatient);
}

TEST_F(Nccl, ARankThatNeverJoinsIsNotWaitedForForEver) {
  const auto share = [](const std::string& id) { return id; };
  try {
    MakeNcclCollectives(0, 2, share, kImpatient);
    ADD_FAILURE() << "a rank is missing";
  } catch (const std::exception& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr("rank 0 of 2, joining the communicator of 2 ranks: not done after 0.7"),
                                    HasSubstr("NCCL_DEBUG=INFO")));
  }
  EXPECT_EQ(Count(0, "ncclCommAbort"), 1);
}

TEST_F(Nccl, WorkThatIsUnderWayAtTheEndIsAborted) {
  stand_in::Reset({.hangs = {{{0, 0}, true}}});
  RunRanks(1, [](Collectives& comm) {
    at::Tensor tensor = at::ones({4}, at::kFloat);
    stand_in::SetInStep(false);
    comm.AllReduce(tensor);
  });
  ExpectAbortedOnce(0);
}

TEST_F(Nccl, MistakesOfTheCallerThrow) {
  RunAll(2, [](Collectives& comm) {
    EXPECT_ANY_THROW(comm.AllReduce(at::ones({4}, at::kByte)));
    EXPECT_ANY_THROW(comm.AllReduce(at::ones({4, 4}, at::kFloat).t()));
    EXPECT_ANY_THROW(comm.AllGather(at::ones({5}, at::kFloat)));
    EXPECT_ANY_THROW(comm.ReduceScatter(at::ones({5}, at::kFloat)));
  });
}

}  // namespace
}  // namespace simpo
