// The collectives over MPI, and a golden trajectory through them. Every rank runs every test:
//   mpirun -n 3 mpi_test
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <mpi.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <thread>

#include "tests/worker/golden.h"
#include "tests/worker/io/test_files.h"
#include "worker/comm/collectives.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

class Mpi : public testing::Test {
 protected:
  const std::unique_ptr<Collectives> comm_ = MakeMpiCollectives();
  const int rank_ = comm_->rank();
  const int size_ = comm_->world_size();
  // 1 + 2 + ... + size
  const int64_t sum_ = static_cast<int64_t>(size_) * (size_ + 1) / 2;

  void RunGoldenTrajectory(int zero_stage, bool offload);
};

TEST_F(Mpi, AllReduceSums) {
  ASSERT_GT(size_, 1) << "start this with mpirun -n 2 or more";
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kLong}) {
    for (const int64_t numel : {0, 1, 1000, 300001}) {
      const at::Tensor base = at::arange(numel, dtype).remainder(1000);
      at::Tensor tensor = base * (rank_ + 1);
      comm_->AllReduce(tensor);
      EXPECT_TRUE(at::equal(tensor, base * sum_)) << numel;
    }
  }
}

TEST_F(Mpi, ReduceScatterGivesEachRankItsSlice) {
  const int64_t slice = 1003;
  const at::Tensor base = at::arange(slice * size_, at::kFloat);
  at::Tensor tensor = base * (rank_ + 1);
  comm_->ReduceScatter(tensor);
  EXPECT_TRUE(at::equal(tensor.narrow(0, rank_ * slice, slice), base.narrow(0, rank_ * slice, slice) * sum_));
}

TEST_F(Mpi, AllGatherSpreadsEverySlice) {
  const int64_t slice = 1002;
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kLong}) {
    const at::Tensor whole = at::arange(slice * size_, at::kLong).remainder(251).to(dtype);
    at::Tensor tensor = at::zeros_like(whole);
    tensor.narrow(0, rank_ * slice, slice).copy_(whole.narrow(0, rank_ * slice, slice));
    comm_->AllGather(tensor);
    EXPECT_TRUE(at::equal(tensor, whole));
  }
}

TEST_F(Mpi, BroadcastComesFromItsRoot) {
  for (int root = 0; root < size_; ++root) {
    at::Tensor tensor = at::full({77}, rank_, at::kLong);
    comm_->Broadcast(tensor, root);
    EXPECT_TRUE(at::equal(tensor, at::full({77}, root, at::kLong)));
  }
}

TEST_F(Mpi, WhatARankIsInCanBeSeenFromOutside) {
  RankActivity& activity = comm_->activity();
  comm_->Barrier();
  const RankActivity::State before = activity.Now();
  EXPECT_STREQ(before.verb, "barrier");
  EXPECT_EQ(before.waiting_s, 0);
  at::Tensor tensor = at::zeros({1000 * size_}, at::kFloat);
  if (rank_ == 0) std::this_thread::sleep_for(std::chrono::milliseconds(300));  // the others wait for it
  std::atomic<bool> done = false;
  double longest_wait = 0;
  std::thread watcher([&] {
    for (; !done; std::this_thread::sleep_for(std::chrono::milliseconds(5))) {
      longest_wait = std::max(longest_wait, activity.Now().waiting_s);
    }
  });
  comm_->AllReduce(tensor);
  done = true;
  watcher.join();
  const RankActivity::State after = activity.Now();
  EXPECT_EQ(after.collectives, before.collectives + 1);
  EXPECT_STREQ(after.verb, "all-reduce");
  EXPECT_EQ(after.bytes, 4000 * size_);
  EXPECT_GT(after.moves, before.moves);
  EXPECT_EQ(after.waiting_s, 0);
  if (rank_ == 1) {
    EXPECT_GT(longest_wait, 0.1);
    EXPECT_GT(after.waited_s - before.waited_s, 0.1);
  }
}

// By the ring formulas.
TEST_F(Mpi, SentBytesAreCounted) {
  const int64_t bytes = 4 * 1000 * size_;
  const int64_t share = bytes / size_ * (size_ - 1);
  at::Tensor tensor = at::zeros({1000 * size_}, at::kFloat);
  const int64_t before = comm_->sent().total();
  comm_->AllReduce(tensor);
  EXPECT_EQ(comm_->sent().total() - before, 2 * share);
  comm_->ReduceScatter(tensor);
  EXPECT_EQ(comm_->sent().total() - before, 3 * share);
  comm_->AllGather(tensor);
  EXPECT_EQ(comm_->sent().total() - before, 4 * share);
}

// Sums of small integers, exact in bf16.
TEST_F(Mpi, Bf16IsSummed) {
  for (const int64_t slice : {16, 4096}) {
    const at::Tensor base = at::arange(slice * size_, at::kLong).remainder(32).to(at::kBFloat16);
    at::Tensor scattered = base * (rank_ + 1);
    comm_->ReduceScatter(scattered);
    EXPECT_TRUE(at::equal(scattered.narrow(0, rank_ * slice, slice), base.narrow(0, rank_ * slice, slice) * sum_));
    at::Tensor reduced = base * (rank_ + 1);
    comm_->AllReduce(reduced);
    EXPECT_TRUE(at::equal(reduced, base * sum_));
  }
}

// Many under way at once, waited for from the last to the first, some by their handle's end only.
TEST_F(Mpi, WhatIsBegunRunsInOrderWhateverIsWaitedForFirst) {
  constexpr int64_t kSlice = 4096;
  std::vector<at::Tensor> sums, wholes;
  std::vector<Pending> pending;
  for (int i = 0; i < 20; ++i) {
    sums.push_back(at::full({kSlice * size_}, (rank_ + 1) * (i + 1), at::kFloat));
    wholes.push_back(at::full({kSlice * size_}, rank_ + 100 * i, at::kFloat));
    pending.push_back(comm_->BeginReduceScatter(sums.back()));
    pending.push_back(comm_->BeginAllGather(wholes.back()));
  }
  at::Tensor vote = at::ones({1}, at::kLong);
  comm_->AllReduce(vote);
  EXPECT_EQ(vote.item<int64_t>(), size_);
  for (size_t i = pending.size(); i-- > 10;) pending[i].Wait();
  pending.clear();
  for (int i = 0; i < 20; ++i) {
    EXPECT_TRUE(at::equal(sums[i].narrow(0, rank_ * kSlice, kSlice), at::full({kSlice}, sum_ * (i + 1), at::kFloat)));
    for (int rank = 0; rank < size_; ++rank) {
      EXPECT_TRUE(
          at::equal(wholes[i].narrow(0, rank * kSlice, kSlice), at::full({kSlice}, rank + 100 * i, at::kFloat)));
    }
  }
}

// At every stage; 3 and offload together too.
TEST_F(Mpi, AGoldenTrajectory) {
  for (const int zero_stage : {0, 1, 2, 3}) RunGoldenTrajectory(zero_stage, /*offload=*/zero_stage == 3);
}

void Mpi::RunGoldenTrajectory(int zero_stage, bool offload) {
  SCOPED_TRACE(testing::Message() << "stage " << zero_stage);
  at::set_num_threads(1);
  const Golden golden("tied");
  const nlohmann::json& trajectory = golden.Trajectory("smoothing_sft_decay_cosine");
  // Rank 0 chooses the folder and writes the data.
  std::string folder(512, '\0');
  std::optional<TempDir> dir;
  if (rank_ == 0) {
    dir.emplace();
    std::copy_n(dir->path().string().begin(), std::min<size_t>(dir->path().string().size(), 511), folder.begin());
    ASSERT_TRUE(WriteTokenizedDataset(*dir / "train.tokens", golden.pairs, 0).ok());
  }
  at::Tensor bytes = at::from_blob(folder.data(), {512}, at::kByte);
  comm_->Broadcast(bytes, 0);
  const fs::path output = folder.c_str();
  TrainOptions options{.config = JobOf(trajectory),
                       .output_dir = output,
                       .model_dir = golden.dir,
                       .tokenizer_dir = golden.dir,
                       .model = golden.config};
  options.config.zero_stage = zero_stage;
  options.config.offload_optimizer = offload ? "cpu" : "none";
  options.data.train_cache = output / "train.tokens";
  const absl::StatusOr<TrainOutcome> outcome = Train(options, *comm_);
  ASSERT_TRUE(outcome.ok()) << outcome.status();
  if (rank_ == 0) {
    const std::vector<Metrics> got = ReadMetrics(output / "metrics.jsonl");
    std::vector<Metrics> want;
    for (const nlohmann::json& step : trajectory["steps"]) {
      want.push_back(MetricsOf(step));
      want.back().erase("smallest_margin");
    }
    std::string worst;
    EXPECT_LE(LargestDifference(got, want, &worst), 1e-4) << worst;
  }
  comm_->Barrier();
}

}  // namespace
}  // namespace simpo

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  int provided = 0;
  MPI_Init_thread(&argc, &argv, MPI_THREAD_SERIALIZED, &provided);
  const int result = RUN_ALL_TESTS();
  MPI_Finalize();
  return result;
}
