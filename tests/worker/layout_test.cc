// One job on different layouts: ranks, ZeRO stages, micro-batches, activation checkpointing, and with a
// stop in between. How the work is split never changes what is learned.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>

#include "absl/strings/str_format.h"
#include "tests/worker/golden.h"
#include "tests/worker/io/test_files.h"
#include "tests/worker/io/thread_collectives.h"
#include "worker/evaluate.h"
#include "worker/pack.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;

constexpr double kLayoutTolerance = 1e-5;

// Metrics that depend on the clock.
const std::vector<std::string> kTimes = {"tokens_per_second", "step_seconds", "mfu"};

std::vector<Metrics> WithoutTimes(std::vector<Metrics> steps) {
  for (Metrics& metrics : steps) {
    for (const std::string& name : kTimes) metrics.erase(name);
  }
  return steps;
}

class Layout : public testing::Test {
 protected:
  // The job of a golden trajectory with batches of 7 of its 22 pairs: the fourth step of each epoch
  // has a single pair, fewer than there are ranks.
  static JobConfig UnevenJob(const Golden& golden, const std::string& trajectory) {
    JobConfig config = JobOf(golden.Trajectory(trajectory));
    config.per_device_train_batch_size = 0;
    config.gradient_accumulation_steps = 0;
    config.global_batch_size = 7;
    return config;
  }

  RunResult Run(const RunOptions& options) {
    return RunTraining(golden_, golden_.pairs, options, dir_ / std::to_string(++runs_));
  }
  fs::path last_dir() const { return dir_ / std::to_string(runs_); }

  TempDir dir_;
  const Golden golden_{"tied"};
  JobConfig job_ = UnevenJob(golden_, "smoothing_sft_decay_cosine");
  int runs_ = 0;
};

// Every stage on 1, 2 and 4 ranks, with and without activation checkpointing, offload, accumulation and
// token budgets, against the run on one rank at stage 0. Prints the table of the largest deviations.
TEST_F(Layout, EveryLayoutGivesOneTrajectory) {
  job_.save_strategy = "steps";
  job_.save_steps = job_.max_steps;
  JobConfig plain = job_;
  plain.zero_stage = 0;
  const std::vector<Metrics> want = WithoutTimes(Run({.config = plain}).steps);
  ASSERT_EQ(want.size(), 20u);
  const std::map<std::string, at::Tensor> updates = Updates(golden_, last_dir());
  EXPECT_GE(want[0].at("loss") - want[16].at("loss"), 0.2) << "nothing was learned that could differ";

  struct Variant {
    const char* name;
    bool checkpointing = false, offload = false;
    int max_pairs = 0, max_tokens = 0;  // of a micro-batch
  };
  const std::vector<Variant> variants = {
      {.name = "plain"},
      {.name = "checkpointing", .checkpointing = true},
      {.name = "offload", .offload = true},
      {.name = "4 micro-batches", .max_pairs = 2},
      {.name = "token budget", .max_tokens = 60},
      {.name = "all of them", .checkpointing = true, .offload = true, .max_tokens = 100},
  };
  std::string table = "largest deviation of 20 steps from one rank at stage 0\nstage ranks";
  for (const Variant& variant : variants) table += absl::StrFormat(" %16s", variant.name);
  for (const int zero_stage : {0, 1, 2, 3}) {
    for (const int ranks : {1, 2, 4}) {
      table += absl::StrFormat("\n%5d %5d", zero_stage, ranks);
      for (const Variant& variant : variants) {
        JobConfig job = job_;
        job.zero_stage = zero_stage;
        job.gradient_checkpointing = variant.checkpointing;
        job.offload_optimizer = variant.offload ? "cpu" : "none";
        job.per_device_train_batch_size = variant.max_pairs;
        job.max_tokens_per_micro_batch = variant.max_tokens;
        std::string worst;
        const std::vector<Metrics> got = WithoutTimes(Run({.config = job, .ranks = ranks}).steps);
        const double deviation = LargestDifference(got, want, &worst);
        table += absl::StrFormat(" %16.1e", deviation);
        EXPECT_LE(deviation, kLayoutTolerance)
            << variant.name << ", " << ranks << " ranks, stage " << zero_stage << ": " << worst;
        for (const auto& [name, update] : Updates(golden_, last_dir())) {
          EXPECT_LE(Distance(update, updates.at(name)), 5e-3)
              << variant.name << ", " << ranks << " ranks, stage " << zero_stage << ": " << name;
        }
      }
    }
  }
  std::printf("%s\n", table.c_str());
}

TEST_F(Layout, Bf16OnSeveralRanksIsTheSameRun) {
  job_.torch_dtype = "bfloat16";
  const std::vector<Metrics> want = WithoutTimes(Run({.config = job_}).steps);
  const std::vector<Metrics> got = WithoutTimes(Run({.config = job_, .ranks = 4}).steps);
  // The products of a rank's pairs are rounded to bf16 before the ranks add them up.
  ASSERT_EQ(got.size(), want.size());
  for (size_t i = 0; i < got.size(); ++i) EXPECT_NEAR(got[i].at("loss"), want[i].at("loss"), 2e-2) << "step " << i + 1;
}

TEST_F(Layout, MicroBatchBudgetsGiveOneTrajectory) {
  const std::vector<Metrics> want = WithoutTimes(Run({.config = job_}).steps);
  for (const int max_tokens : {1, 60, 150}) {
    for (const int max_pairs : {0, 2}) {
      SCOPED_TRACE(testing::Message() << max_tokens << " tokens, " << max_pairs << " pairs");
      job_.max_tokens_per_micro_batch = max_tokens;
      job_.per_device_train_batch_size = max_pairs;
      std::string worst;
      EXPECT_LE(LargestDifference(WithoutTimes(Run({.config = job_}).steps), want, &worst), kLayoutTolerance) << worst;
    }
  }
}

TEST_F(Layout, GradientCheckpointingChangesNothing) {
  const std::vector<Metrics> want = WithoutTimes(Run({.config = job_}).steps);
  job_.gradient_checkpointing = true;
  EXPECT_EQ(WithoutTimes(Run({.config = job_}).steps), want);
}

TEST_F(Layout, TheSameRunTwiceIsBitIdentical) {
  job_.shuffle = true;
  const std::vector<Metrics> want = WithoutTimes(Run({.config = job_, .ranks = 2}).steps);
  EXPECT_EQ(WithoutTimes(Run({.config = job_, .ranks = 2}).steps), want);
  job_.seed = 43;
  EXPECT_NE(WithoutTimes(Run({.config = job_, .ranks = 2}).steps), want);
}

TEST_F(Layout, OptimizerStateIsSharded) {
  job_.max_steps = 1;
  auto optimizer_bytes = [&](int ranks, int zero_stage, const std::string& dtype) {
    job_.zero_stage = zero_stage;
    job_.torch_dtype = dtype;
    Run({.config = job_, .ranks = ranks});
    const Json manifest = Json::parse(ReadText(last_dir() / "run_manifest.json"));
    std::vector<int64_t> bytes;
    for (const Json& rank : manifest["ranks"]) bytes.push_back(rank["optimizer_bytes"]);
    EXPECT_EQ(bytes.size(), static_cast<size_t>(ranks));
    return bytes;
  };
  const int64_t parameters = golden_.config.NumParameters();
  const auto buckets = golden_.config.num_layers + 2;
  for (const auto& [dtype, per_parameter] : {std::pair("float32", 8), std::pair("bfloat16", 12)}) {
    for (const int ranks : {1, 2, 4}) {
      // Each tensor begins at, and each rank's slice of a bucket is padded to, 16 elements.
      const auto tensors = static_cast<int64_t>(ModelWeights(golden_.config).size());
      const int64_t padding = 16 * (tensors + buckets * ranks);
      for (const int64_t bytes : optimizer_bytes(ranks, 1, dtype)) {
        EXPECT_GE(bytes, parameters * per_parameter / ranks) << dtype << " on " << ranks << " ranks";
        EXPECT_LE(bytes, (parameters + padding) * per_parameter / ranks) << dtype << " on " << ranks << " ranks";
      }
      for (const int64_t bytes : optimizer_bytes(ranks, 0, dtype)) EXPECT_GE(bytes, parameters * per_parameter);
    }
  }
}

TEST_F(Layout, PairsAndTokensAreCountedOnce) {
  double tokens = 0;
  for (const OwnedPair& pair : golden_.pairs) tokens += static_cast<double>(pair.chosen.size() + pair.rejected.size());
  for (const int ranks : {1, 4}) {
    const std::vector<Metrics> steps = Run({.config = job_, .ranks = ranks}).steps;
    ASSERT_EQ(steps.size(), 20u);
    EXPECT_EQ(steps[3].at("num_input_tokens_seen"), tokens);  // one epoch
    EXPECT_EQ(steps[3].at("epoch"), 1);
    EXPECT_EQ(steps[19].at("num_input_tokens_seen"), 5 * tokens);
    EXPECT_DOUBLE_EQ(steps[0].at("epoch"), 7.0 / 22);
  }
}

TEST_F(Layout, StopAndResumeIsBitIdentical) {
  job_.shuffle = true;
  job_.save_strategy = "end";
  for (const int ranks : {1, 2}) {
    for (const std::string dtype : {"float32", "bfloat16"}) {
      SCOPED_TRACE(testing::Message() << ranks << " ranks, " << dtype);
      job_.torch_dtype = dtype;
      const std::vector<Metrics> want = WithoutTimes(Run({.config = job_, .ranks = ranks}).steps);
      const std::string want_model = ReadText(last_dir() / "final/model.safetensors");
      // Within an epoch, at its end, and after the first step.
      const fs::path dir = dir_ / std::to_string(++runs_);
      bool resume = false;
      for (const int64_t stop : {1, 4, 11}) {
        const RunResult part = RunTraining(
            golden_, golden_.pairs, {.config = job_, .ranks = ranks, .resume = resume, .stop_after_step = stop}, dir);
        EXPECT_EQ(part.outcome, TrainOutcome::kStopped);
        EXPECT_EQ(part.steps.size(), static_cast<size_t>(stop));
        EXPECT_FALSE(fs::exists(dir / "final"));
        resume = true;
      }
      const RunResult rest = RunTraining(golden_, golden_.pairs, {.config = job_, .ranks = ranks, .resume = true}, dir);
      EXPECT_EQ(rest.outcome, TrainOutcome::kDone);
      EXPECT_EQ(WithoutTimes(rest.steps), want);
      EXPECT_TRUE(ReadText(dir / "final/model.safetensors") == want_model);
    }
  }
}

TEST_F(Layout, ResumesOnAnotherNumberOfRanks) {
  const std::vector<Metrics> want = WithoutTimes(Run({.config = job_, .ranks = 4}).steps);
  const fs::path dir = dir_ / "resumed";
  RunTraining(golden_, golden_.pairs, {.config = job_, .ranks = 4, .stop_after_step = 6}, dir);
  const RunResult rest = RunTraining(golden_, golden_.pairs, {.config = job_, .ranks = 1, .resume = true}, dir);
  EXPECT_LE(LargestDifference(WithoutTimes(rest.steps), want), kLayoutTolerance);
}

TEST_F(Layout, AResumedRunKeepsItsGlobalBatch) {
  const std::vector<Metrics> want = WithoutTimes(Run({.config = job_}).steps);
  const fs::path dir = dir_ / "resumed";
  RunTraining(golden_, golden_.pairs, {.config = job_, .stop_after_step = 6}, dir);
  job_.global_batch_size = 16;
  const RunResult rest = RunTraining(golden_, golden_.pairs, {.config = job_, .resume = true}, dir);
  EXPECT_EQ(WithoutTimes(rest.steps), want);
}

// Every rank says so, and what to do; no metrics are written that are no numbers.
TEST_F(Layout, ARunThatDivergesEndsWithAnError) {
  job_.learning_rate = 1e30;
  fs::create_directories(dir_ / "diverged");
  TrainOptions options{.config = job_,
                       .output_dir = dir_ / "diverged",
                       .model_dir = golden_.dir,
                       .tokenizer_dir = golden_.dir,
                       .model = golden_.config};
  options.data.train_cache = dir_ / "train.tokens";
  ASSERT_TRUE(WriteTokenizedDataset(options.data.train_cache, golden_.pairs, 0).ok());
  ThreadWorld::Run(2, [&](Collectives& comm) {
    const absl::StatusOr<TrainOutcome> outcome = Train(options, comm);
    ASSERT_FALSE(outcome.ok());
    EXPECT_EQ(outcome.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(outcome.status().message()),
                testing::AllOf(testing::HasSubstr("step 3"), testing::HasSubstr("diverged"),
                               testing::HasSubstr("learning_rate")));
  });
  EXPECT_EQ(ReadMetrics(dir_ / "diverged/metrics.jsonl").size(), 2u);
}

}  // namespace
}  // namespace simpo
