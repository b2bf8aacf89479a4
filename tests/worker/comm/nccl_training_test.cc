// Whole runs of Train() whose collectives are NCCL's, on the stand-in, against the same runs over the tests'
// threads: every ZeRO stage, offload and reduce_dtype, to the last bit.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/comm/stand_in.h"
#include "tests/worker/golden.h"
#include "tests/worker/io/test_files.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

class NcclTraining : public testing::TestWithParam<int> {  // ZeRO stage
 protected:
  void TearDown() override { EXPECT_THAT(stand_in::Problems(), testing::IsEmpty()); }

  static std::vector<Metrics> WithoutTimes(std::vector<Metrics> steps) {
    for (Metrics& metrics : steps) {
      for (const char* name : {"tokens_per_second", "step_seconds", "mfu"}) metrics.erase(name);
    }
    return steps;
  }

  JobConfig Job() const {
    JobConfig config = JobOf(golden_.Trajectory("smoothing_sft_decay_cosine"));
    config.zero_stage = GetParam();
    config.max_steps = 6;
    config.save_strategy = "steps";
    config.save_steps = 6;
    return config;
  }

  std::vector<Metrics> RunOverNccl(const JobConfig& config, int ranks, const fs::path& dir) {
    fs::create_directories(dir);
    TrainOptions options{.config = config,
                         .output_dir = dir,
                         .model_dir = golden_.dir,
                         .tokenizer_dir = golden_.dir,
                         .model = golden_.config};
    options.data.train_cache = dir / "train.tokens";
    EXPECT_TRUE(WriteTokenizedDataset(options.data.train_cache, golden_.pairs, /*dropped_pairs=*/0).ok());
    stand_in::Reset({.in_progress_polls = 1});
    const auto rank_main = [&](Collectives& comm) {
      at::set_num_threads(1);
      const absl::StatusOr<TrainOutcome> outcome = Train(options, comm);
      EXPECT_TRUE(outcome.ok()) << outcome.status();
    };
    EXPECT_THAT(stand_in::RunRanks(ranks, rank_main), testing::Each(""));
    return ReadMetrics(dir / "metrics.jsonl");
  }

  void ExpectTheSameRun(const JobConfig& config, int ranks) {
    const fs::path plain = dir_ / std::to_string(++runs_), nccl = dir_ / std::to_string(++runs_);
    const RunResult want = RunTraining(golden_, golden_.pairs, {.config = config, .ranks = ranks}, plain);
    ASSERT_EQ(want.steps.size(), 6u);
    EXPECT_EQ(WithoutTimes(RunOverNccl(config, ranks, nccl)), WithoutTimes(want.steps));
    EXPECT_TRUE(ReadText(nccl / "final/model.safetensors") == ReadText(plain / "final/model.safetensors"));
    const std::map<std::string, at::Tensor> updates = Updates(golden_, nccl);
    for (const auto& [name, update] : Updates(golden_, plain)) {
      EXPECT_TRUE(at::equal(updates.at(name), update)) << name;
    }
  }

  TempDir dir_;
  const Golden golden_{"tied"};
  int runs_ = 0;
};

TEST_P(NcclTraining, IsTheSameRun) {
  for (const int ranks : {1, 2, 3}) {
    SCOPED_TRACE(testing::Message() << ranks << " ranks");
    ExpectTheSameRun(Job(), ranks);
  }
}

TEST_P(NcclTraining, IsTheSameRunInBf16WithOffload) {
  JobConfig config = Job();
  config.torch_dtype = "bfloat16";
  config.reduce_dtype = "bfloat16";
  config.offload_optimizer = "cpu";
  ExpectTheSameRun(config, 2);
}

// What travels per step is what the stage is to send, through the right verb.
TEST_P(NcclTraining, TheStageChoosesTheVerbs) {
  RunOverNccl(Job(), 2, dir_ / "run");
  const int stage = GetParam();
  for (int rank = 0; rank < 2; ++rank) {
    int reduced_buckets = 0, scattered = 0, gathered = 0;
    for (const stand_in::Call& call : stand_in::Calls(rank)) {
      reduced_buckets += call.name == "ncclAllReduce" && call.type == ncclFloat32 ? 1 : 0;
      scattered += call.name == "ncclReduceScatter" ? 1 : 0;
      gathered += call.name == "ncclAllGather" ? 1 : 0;
    }
    const int steps = 6;
    const auto buckets = static_cast<int>(golden_.config.num_layers) + 2;
    EXPECT_EQ(reduced_buckets > 0, stage == 0) << reduced_buckets;
    EXPECT_EQ(scattered > 0, stage > 0) << scattered;
    if (stage == 0) {
      EXPECT_EQ(reduced_buckets % steps, 0);
    }
    if (stage == 1) {
      EXPECT_EQ(scattered % steps, 0);
    }
    if (stage == 1 || stage == 2) {
      EXPECT_GE(gathered, steps * (buckets - 1));
    }
    if (stage == 3) {
      EXPECT_GE(gathered, 2 * steps * (buckets - 1));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Stages, NcclTraining, testing::Values(0, 1, 2, 3));

}  // namespace
}  // namespace simpo
