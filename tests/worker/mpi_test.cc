// The collectives over MPI, and a golden trajectory through them. Every rank runs every test:
//   mpirun -n 3 mpi_test
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <mpi.h>

#include <cmath>

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

TEST_F(Mpi, AGoldenTrajectory) {
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
  MPI_Init(&argc, &argv);
  const int result = RUN_ALL_TESTS();
  MPI_Finalize();
  return result;
}
