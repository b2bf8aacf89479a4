// Runs of Train() that save: the best model, the cost of errors, and going on in another layout.
#include <ATen/Parallel.h>
#include <errno.h>
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "common/file_system.h"
#include "tests/worker/golden.h"
#include "tests/worker/io/test_files.h"
#include "tests/worker/io/thread_collectives.h"
#include "worker/shard/checkpoint.h"
#include "worker/shard/export_hf.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

// Keeps the events, and stops the run after a step.
class Listener : public CoordinatorClient {
 public:
  explicit Listener(int64_t stop_after) : stop_after_(stop_after) {}
  void SetPhase(std::string_view, int64_t, int64_t) override {}
  void SetLastStep(double, double) override {}
  void ReportStep(std::string_view split, int64_t step, const Metrics&) override {
    stop_ |= split == "train" && step == stop_after_;
  }
  void ReportEvent(std::string_view type, std::string_view message, int64_t step) override {
    events_[std::string(type)].push_back({step, std::string(message)});
  }
  std::optional<Command> TakeCommand() override {
    return std::exchange(stop_, false) ? std::optional(Command::kStop) : std::nullopt;
  }
  void Finish(int, std::string_view, int) override {}

  std::map<std::string, std::vector<std::pair<int64_t, std::string>>> events_;

 private:
  const int64_t stop_after_;
  bool stop_ = false;
};

// A disk without room for files whose path contains one of these words.
class FullDisk : public FileSystem {
 public:
  explicit FullDisk(std::set<std::string> words) : words_(std::move(words)) {}
  int Open(const fs::path& path, int flags, mode_t mode) override {
    for (const std::string& word : words_) {
      if ((flags & O_CREAT) != 0 && path.string().find(word) != std::string::npos) {
        errno = ENOSPC;
        return -1;
      }
    }
    return FileSystem::Open(path, flags, mode);
  }

 private:
  const std::set<std::string> words_;
};

class CheckpointPolicyTest : public testing::Test {
 protected:
  struct Options {
    JobConfig config;
    int ranks = 1;
    bool resume = false;
    int64_t stop_after_step = 0;
    bool with_eval = false;
  };
  struct Result {
    absl::StatusOr<TrainOutcome> outcome = TrainOutcome::kDone;
    std::map<std::string, std::vector<std::pair<int64_t, std::string>>> events;
  };

  Result Run(const fs::path& output_dir, const Options& options) {
    fs::create_directories(output_dir);
    TrainOptions train{.config = options.config,
                       .output_dir = output_dir,
                       .model_dir = golden_.dir,
                       .tokenizer_dir = golden_.dir,
                       .model = golden_.config,
                       .resume_latest = options.resume};
    train.data.train_cache = output_dir / "train.tokens";
    EXPECT_TRUE(WriteTokenizedDataset(train.data.train_cache, golden_.pairs, 0).ok());
    if (options.with_eval) {
      train.data.eval_cache = output_dir / "eval.tokens";
      EXPECT_TRUE(
          WriteTokenizedDataset(*train.data.eval_cache, {golden_.pairs.begin(), golden_.pairs.begin() + 5}, 0).ok());
    }
    Listener listener(options.stop_after_step);
    std::vector<absl::StatusOr<TrainOutcome>> outcomes(options.ranks);
    ThreadWorld::Run(options.ranks, [&](Collectives& comm) {
      at::set_num_threads(1);
      TrainOptions mine = train;
      if (comm.rank() == 0) mine.coordinator = &listener;
      outcomes[comm.rank()] = Train(mine, comm);
    });
    for (const auto& outcome : outcomes) EXPECT_EQ(outcome.status().code(), outcomes[0].status().code());
    return {outcomes[0], listener.events_};
  }

  static std::vector<Metrics> Losses(const fs::path& dir) {
    std::vector<Metrics> steps = ReadMetrics(dir / "metrics.jsonl");
    for (Metrics& metrics : steps) {
      for (const char* name : {"tokens_per_second", "step_seconds", "mfu"}) metrics.erase(name);
    }
    return steps;
  }

  TempDir dir_;
  const Golden golden_{"tied"};
  JobConfig job_ = [this] {
    JobConfig config = JobOf(golden_.Trajectory("smoothing_sft_decay_cosine"));
    config.max_steps = 8;
    config.recovery_minutes = 0;
    return config;
  }();
};

// By the rules of transformers' Trainer: the first of the strictly best, and its checkpoint is spared.
TEST_F(CheckpointPolicyTest, TheBestCheckpointIsSparedAndExported) {
  job_.load_best_model_at_end = true;
  job_.eval_strategy = job_.save_strategy = "steps";
  job_.eval_steps = job_.save_steps = 2;
  struct Case {
    std::string metric, greater;
    bool greater_is_better;
  };
  std::set<int64_t> best_steps;
  for (const Case& c : {Case{"eval_loss", "", false}, Case{"loss", "true", true}, Case{"rewards/margins", "", true},
                        Case{"eval_rewards/margins", "false", false}}) {
    for (const int64_t stop_after : {0, 5}) {
      for (const int limit : {1, 2}) {
        SCOPED_TRACE(testing::Message() << c.metric << " " << c.greater << ", limit " << limit << ", stop "
                                        << stop_after);
        job_.metric_for_best_model = c.metric;
        job_.greater_is_better = c.greater;
        job_.save_total_limit = limit;
        const fs::path dir = dir_ / "run";
        fs::remove_all(dir);
        if (stop_after > 0) {
          const Result part = Run(dir, {.config = job_, .ranks = 2, .stop_after_step = stop_after, .with_eval = true});
          ASSERT_EQ(part.outcome.value(), TrainOutcome::kStopped);
        }
        const Result result = Run(dir, {.config = job_, .ranks = 2, .resume = stop_after > 0, .with_eval = true});
        ASSERT_TRUE(result.outcome.ok()) << result.outcome.status();

        const std::string name = c.metric.starts_with("eval_") ? c.metric : "eval_" + c.metric;
        int64_t step = 0, best_step = 0;
        double best = 0;
        for (const Metrics& metrics : ReadMetrics(dir / "eval_metrics.jsonl")) {
          step += 2;
          const double value = metrics.at(name);
          if (best_step == 0 || (c.greater_is_better ? value > best : value < best)) best = value, best_step = step;
        }
        ASSERT_EQ(step, 8);
        best_steps.insert(best_step);
        std::set<std::string> left = {CheckpointName(best_step), CheckpointName(8)};
        if (limit == 2 && best_step == 8) left.insert(CheckpointName(6));
        EXPECT_EQ(NamesIn(dir / "checkpoints"), left);
        ASSERT_TRUE(ExportCheckpoint(dir / "checkpoints" / CheckpointName(best_step), dir / "best").ok());
        EXPECT_TRUE(ReadText(dir / "best/model.safetensors") == ReadText(dir / "final/model.safetensors"));
        const std::string said = result.events.at("exported").at(0).second;
        EXPECT_EQ(said.find("the best checkpoint") != std::string::npos, best_step != 8) << said;
      }
    }
  }
  EXPECT_TRUE(best_steps.contains(2)) << "no case tells the best from the last";
  EXPECT_TRUE(best_steps.contains(8));
}

TEST_F(CheckpointPolicyTest, TheBestNeedsEvaluations) {
  job_.load_best_model_at_end = true;
  job_.eval_strategy = job_.save_strategy = "epoch";
  const absl::Status status = Run(dir_ / "run", {.config = job_, .ranks = 2}).outcome.status();
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("load_best_model_at_end"));
}

TEST_F(CheckpointPolicyTest, AnotherLayoutGoesOnWithTheSameLosses) {
  struct Layout {
    int ranks, zero_stage;
    std::string offload = "none";
  };
  job_.max_steps = 20;
  const fs::path whole = dir_ / "whole";
  ASSERT_TRUE(Run(whole, {.config = job_}).outcome.ok());
  const std::vector<Metrics> want = Losses(whole);
  ASSERT_EQ(want.size(), 20U);
  const std::vector<std::pair<Layout, Layout>> moves = {
      {{2, 1}, {4, 1}}, {{4, 1}, {1, 1}},        {{2, 3}, {2, 1}},        {{2, 1}, {2, 3}}, {{3, 2}, {1, 0}},
      {{1, 0}, {4, 3}}, {{2, 3, "cpu"}, {2, 2}}, {{4, 2}, {3, 1, "cpu"}}, {{4, 3}, {1, 1}}, {{2, 3}, {4, 3}}};
  double largest = 0;
  for (size_t i = 0; i < moves.size(); ++i) {
    const auto& [from, to] = moves[i];
    SCOPED_TRACE(testing::Message() << from.ranks << " ranks, stage " << from.zero_stage << " to " << to.ranks
                                    << ", stage " << to.zero_stage);
    const fs::path dir = dir_ / ("moved" + std::to_string(i));
    for (const Layout& layout : {from, to}) {
      job_.zero_stage = layout.zero_stage;
      job_.offload_optimizer = layout.offload;
      const bool resume = fs::exists(dir);
      const Result result =
          Run(dir, {.config = job_, .ranks = layout.ranks, .resume = resume, .stop_after_step = resume ? 0 : 7});
      ASSERT_TRUE(result.outcome.ok()) << result.outcome.status();
    }
    const std::vector<Metrics> got = Losses(dir);
    ASSERT_EQ(got.size(), 20U);
    const double difference = LargestDifference(got, want);
    EXPECT_LE(difference, 1e-5);
    largest = std::max(largest, difference);
  }
  std::printf("resume in another layout: largest deviation %.2g\n", largest);
}

// Every step saves while the one before may still be written; nothing of it is seen in the training.
TEST_F(CheckpointPolicyTest, SavingChangesNothing) {
  ASSERT_TRUE(Run(dir_ / "quiet", {.config = job_, .ranks = 2}).outcome.ok());
  job_.recovery_minutes = 1e-9;
  job_.save_strategy = "steps";
  job_.save_steps = 3;
  const Result result = Run(dir_ / "saving", {.config = job_, .ranks = 2});
  ASSERT_TRUE(result.outcome.ok());
  EXPECT_EQ(Losses(dir_ / "saving"), Losses(dir_ / "quiet"));
  EXPECT_THAT(NamesIn(dir_ / "saving/checkpoints"), ElementsAre("step-000003", "step-000006"));
  EXPECT_GE(result.events.at("checkpoint").size(), 3U);
  for (const auto& [step, message] : result.events.at("checkpoint")) {
    EXPECT_THAT(message, AllOf(HasSubstr(CheckpointName(step)), HasSubstr("in the background")));
  }
}

TEST_F(CheckpointPolicyTest, ARecoveryCheckpointThatFailsIsSaidAndTriedAgain) {
  job_.recovery_minutes = 1e-9;
  FullDisk disk({"step-000001", "step-000002", "step-000003"});
  const ScopedFileSystem scoped(disk);
  const Result result = Run(dir_ / "run", {.config = job_, .ranks = 2, .stop_after_step = 7});
  ASSERT_TRUE(result.outcome.ok()) << result.outcome.status();
  const auto& [step, message] = result.events.at("checkpoint_failed").at(0);
  EXPECT_EQ(step, 1);
  EXPECT_THAT(message, AllOf(HasSubstr("No space left"), HasSubstr("step-000001"), HasSubstr("training goes on")));
  EXPECT_GE(result.events.at("checkpoint").size(), 1U);
  EXPECT_THAT(NamesIn(dir_ / "run/checkpoints"), ElementsAre("step-000007"));
}

TEST_F(CheckpointPolicyTest, ASaveThatWasAskedForAndFailsEndsTheRun) {
  job_.save_strategy = "steps";
  job_.save_steps = 2;
  FullDisk disk({"step-000004"});
  const ScopedFileSystem scoped(disk);
  const Result result = Run(dir_ / "run", {.config = job_, .ranks = 2});
  EXPECT_EQ(result.outcome.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(
      std::string(result.outcome.status().message()),
      AllOf(HasSubstr("checkpoint after step 4"), HasSubstr("No space left"), HasSubstr("Earlier checkpoints")));
  EXPECT_THAT(NamesIn(dir_ / "run/checkpoints"), ElementsAre("step-000002"));
}

// The run's end waits for what is under way.
TEST_F(CheckpointPolicyTest, TheLastStepsCheckpointIsKept) {
  job_.save_strategy = "steps";
  job_.save_steps = 8;
  ASSERT_TRUE(Run(dir_ / "run", {.config = job_, .ranks = 2}).outcome.ok());
  EXPECT_THAT(NamesIn(dir_ / "run/checkpoints"), ElementsAre("step-000008"));
  // A run that diverges loses none either.
  job_.learning_rate = 1e30;
  job_.save_steps = 1;
  EXPECT_FALSE(Run(dir_ / "diverged", {.config = job_, .ranks = 2}).outcome.ok());
  EXPECT_THAT(NamesIn(dir_ / "diverged/checkpoints"), testing::Contains("step-000001"));
}

}  // namespace
}  // namespace simpo
