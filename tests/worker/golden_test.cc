// Loss, metrics, gradients and trajectories against tests/goldens, which an implementation of its own
// (tests/parity/reference.py, on transformers, fp64) made; and that wrong ones are told from right ones.
#include "tests/worker/golden.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>

#include "tests/worker/io/test_files.h"
#include "tests/worker/io/thread_collectives.h"
#include "worker/adamw.h"
#include "worker/evaluate.h"
#include "worker/shard/load_weights.h"
#include "worker/train_step.h"

namespace simpo {
namespace {

using Json = nlohmann::json;

constexpr double kStaticTolerance = 1e-5;
constexpr double kGradientTolerance = 1e-4;
constexpr double kTrajectoryTolerance = 1e-4;
constexpr double kUpdateTolerance = 1e-3;
constexpr double kTensorUpdateTolerance = 5e-3;  // Adam turns tiny gradients (of biases) and their rounding into steps
constexpr double kBf16GradientTolerance = 4e-2;
constexpr double kBf16UpdateTolerance = 5e-2;

// One batch through ForwardBackward, in micro-batches of `micro_batch` pairs.
struct Step {
  std::unique_ptr<Collectives> comm = MakeSingleRankCollectives();
  ShardedParams params;
  Metrics metrics;

  Step(const Golden& golden, const SimpoLoss& loss, size_t micro_batch, at::ScalarType dtype = at::kFloat)
      : params(golden.config, {.compute_dtype = dtype}, *comm) {
    EXPECT_TRUE(LoadWeights(*golden.weights, params).ok());
    const Decoder decoder(golden.config, params);
    const auto count = golden.numbers["static_pairs"].get<size_t>();
    const std::vector<TokenizedPair> pairs = Views(std::span(golden.pairs).first(count));
    GlobalBatchSize global{.pairs = static_cast<double>(count), .chosen_tokens = 0};
    for (const TokenizedPair& pair : pairs) {
      global.chosen_tokens += static_cast<double>(pair.chosen.size()) - pair.chosen_prompt_length;
    }
    SimpoStats stats;
    for (size_t i = 0; i < count; i += micro_batch) {
      const PackedBatch batch =
          Pack(std::span(pairs).subspan(i, std::min(micro_batch, count - i)), golden.config.rope.SharedAnglesUpTo());
      stats += ForwardBackward(decoder, params, batch, loss, global, /*gradient_checkpointing=*/false, /*last=*/false);
    }
    metrics = StatsToMetrics(stats, loss, "");
    metrics["grad_norm"] = GlobalGradNorm(params, *comm);
  }
};

class GoldenModel : public testing::TestWithParam<std::string> {};
INSTANTIATE_TEST_SUITE_P(, GoldenModel, testing::ValuesIn(GoldenModels()), [](const auto& info) { return info.param; });

TEST_P(GoldenModel, LossAndMetricsOfOneBatch) {
  const Golden golden(GetParam());
  ASSERT_GE(golden.numbers["static_fp64"].size(), 7u);
  for (const char* reference : {"static_fp64", "static_fp32"}) {
    for (const auto& [name, variant] : golden.numbers[reference].items()) {
      SCOPED_TRACE(std::string(reference) + " " + name);
      ASSERT_GT(variant["smallest_margin"].get<double>(), 1e-5) << "accuracies would not be exact";
      const Metrics want = MetricsOf(variant["metrics"]);
      const Step step(golden, LossOf(variant["loss"]), /*micro_batch=*/8);
      for (const auto& [metric, value] : want) {
        ASSERT_TRUE(step.metrics.contains(metric)) << metric;
        EXPECT_LE(Difference(step.metrics.at(metric), value), kStaticTolerance)
            << metric << ": " << step.metrics.at(metric) << " is not " << value;
      }
      EXPECT_EQ(step.metrics.at("rewards/accuracies"), want.at("rewards/accuracies"));
    }
  }
}

TEST_P(GoldenModel, GradientOfEveryTensor) {
  const Golden golden(GetParam());
  for (const std::string variant : {"everything", "hinge_sft"}) {
    for (const size_t micro_batch : {8, 3, 1}) {
      const Step step(golden, LossOf(golden.numbers["static_fp64"][variant]["loss"]), micro_batch);
      size_t tensors = 0;
      for (const Bucket& bucket : step.params.buckets()) {
        for (const ParamSlot& slot : bucket.slots) {
          const at::Tensor want = golden.Tensor("gradient/" + variant + "/" + slot.spec.name);
          EXPECT_LE(Distance(SlotOf(bucket.grads, slot), want), kGradientTolerance)
              << variant << ", " << slot.spec.name;
          ++tensors;
        }
      }
      EXPECT_EQ(tensors, ModelWeights(golden.config).size());
    }
  }
}

TEST_P(GoldenModel, Bf16LossAndGradients) {
  const Golden golden(GetParam());
  const Json& variant = golden.numbers["static_fp64"]["everything"];
  const Step step(golden, LossOf(variant["loss"]), /*micro_batch=*/8, at::kBFloat16);
  EXPECT_NEAR(step.metrics.at("loss"), variant["metrics"]["loss"].get<double>(), 2e-2);
  double error = 0;
  double norm = 0;
  for (const Bucket& bucket : step.params.buckets()) {
    for (const ParamSlot& slot : bucket.slots) {
      const at::Tensor want = golden.Tensor("gradient/everything/" + slot.spec.name);
      error += (SlotOf(bucket.grads, slot).to(at::kDouble) - want).pow(2).sum().item<double>();
      norm += want.pow(2).sum().item<double>();
    }
  }
  EXPECT_LE(std::sqrt(error / norm), kBf16GradientTolerance);
}

// The pair losses that a model gives do not depend on what else is in its micro-batch.
TEST_P(GoldenModel, MicroBatchesDoNotChangeTheMetrics) {
  const Golden golden(GetParam());
  const SimpoLoss loss = LossOf(golden.numbers["static_fp64"]["everything"]["loss"]);
  const Step whole(golden, loss, 8);
  for (const size_t micro_batch : {1, 3, 5}) {
    EXPECT_LE(LargestDifference({Step(golden, loss, micro_batch).metrics}, {whole.metrics}), kStaticTolerance);
  }
}

// Forward only, on any number of ranks: the metrics of the same pairs.
TEST_P(GoldenModel, Evaluation) {
  const Golden golden(GetParam());
  const TempDir dir;
  const auto count = golden.numbers["static_pairs"].get<size_t>();
  ASSERT_TRUE(WriteTokenizedDataset(dir / "eval.tokens", std::span(golden.pairs).first(count), 0).ok());
  const std::unique_ptr<TokenizedDataset> data = TokenizedDataset::Open(dir / "eval.tokens").value();
  for (const auto& [name, variant] : golden.numbers["static_fp64"].items()) {
    for (const int ranks : {1, 3, 9}) {
      ThreadWorld::Run(ranks, [&, &name = name, &variant = variant](Collectives& comm) {
        at::set_num_threads(1);
        ShardedParams params(golden.config, ShardingOptions(), comm);
        ASSERT_TRUE(LoadWeights(*golden.weights, params).ok());
        const Decoder decoder(golden.config, params);
        const Metrics got =
            Evaluate(decoder, params, *data, LossOf(variant["loss"]), /*max_tokens=*/64, /*max_pairs=*/0, comm);
        for (const auto& [metric, value] : MetricsOf(variant["metrics"])) {
          if (metric == "grad_norm") continue;
          ASSERT_TRUE(got.contains("eval_" + metric)) << metric;
          EXPECT_LE(Difference(got.at("eval_" + metric), value), kStaticTolerance)
              << name << ", " << metric << ", " << ranks;
        }
      });
    }
  }
}

// A golden trajectory, and runs of Train() on its rows.
class Trajectory : public testing::Test {
 protected:
  Trajectory(const std::string& model, const std::string& name)
      : golden_(model), name_(name), numbers_(golden_.Trajectory(name)) {
    for (const Json& step : numbers_["steps"]) {
      want_.push_back(MetricsOf(step));
      smallest_margin_ = std::min(smallest_margin_, want_.back().at("smallest_margin"));
      want_.back().erase("smallest_margin");
    }
  }

  RunResult Run(const std::string& dtype) {
    JobConfig config = JobOf(numbers_);
    config.torch_dtype = dtype;
    config.save_strategy = "steps";
    config.save_steps = config.max_steps;
    return RunTraining(golden_, golden_.pairs, {.config = config}, dir_.path());
  }

  // Of the run's summed updates from the reference's.
  struct UpdateDistance {
    double whole = 0;
    double farthest = 0;  // of any one tensor, by its own norm
    std::string farthest_name;
  };
  UpdateDistance CompareUpdates() const {
    UpdateDistance distance;
    double error = 0;
    double norm = 0;
    for (const auto& [name, update] : Updates(golden_, dir_.path())) {
      const at::Tensor want = golden_.Tensor("update/" + name_ + "/" + name);
      error += (update - want).pow(2).sum().item<double>();
      norm += want.pow(2).sum().item<double>();
      if (const double mine = Distance(update, want); mine > distance.farthest) {
        distance.farthest = mine;
        distance.farthest_name = name;
      }
    }
    distance.whole = std::sqrt(error / norm);
    return distance;
  }

  TempDir dir_;
  Golden golden_;
  const std::string name_;
  const Json& numbers_;
  std::vector<Metrics> want_;
  double smallest_margin_ = 1;
};

class GoldenTrajectory : public Trajectory, public testing::WithParamInterface<std::pair<std::string, std::string>> {
 protected:
  GoldenTrajectory() : Trajectory(GetParam().first, GetParam().second) {}
};
INSTANTIATE_TEST_SUITE_P(, GoldenTrajectory, testing::ValuesIn(GoldenTrajectories()),
                         [](const auto& info) { return info.param.first + "_" + info.param.second; });

TEST_P(GoldenTrajectory, TwentySteps) {
  const std::vector<Metrics> got = Run("float32").steps;
  ASSERT_EQ(got.size(), 20u);
  ASSERT_GT(smallest_margin_, 1e-5);
  std::string worst;
  const double largest = LargestDifference(got, want_, &worst);
  EXPECT_LE(largest, kTrajectoryTolerance) << worst;
  // The first and the nineteenth step see the same pairs.
  EXPECT_GE(got[0].at("loss") - got[18].at("loss"), 0.2);
  EXPECT_EQ(got[0].at("learning_rate"), 0);
  const auto clipped =
      std::count_if(got.begin(), got.end(), [](const Metrics& m) { return m.at("clip_coefficient") < 1; });
  EXPECT_GT(clipped, 10);

  const UpdateDistance distance = CompareUpdates();
  EXPECT_LE(distance.whole, kUpdateTolerance);
  EXPECT_LE(distance.farthest, kTensorUpdateTolerance) << distance.farthest_name;
  std::printf("fp32: metrics within %.1e (%s), summed updates within %.1e of their norm, of any one tensor %.1e (%s)\n",
              largest, worst.c_str(), distance.whole, distance.farthest, distance.farthest_name.c_str());
}

// A tolerance that would let these pass would be worth nothing.
TEST_P(GoldenTrajectory, MistakesAreFound) {
  const std::vector<Metrics> got = Run("float32").steps;
  ASSERT_GE(numbers_["mutants"].size(), 5u);
  for (const auto& [name, mutant] : numbers_["mutants"].items()) {
    std::vector<Metrics> wrong;
    for (size_t step = 0; step < mutant["loss"].size(); ++step) wrong.push_back({{"loss", mutant["loss"][step]}});
    EXPECT_GT(LargestDifference(got, wrong), kTrajectoryTolerance) << name;
  }
}

TEST_P(GoldenTrajectory, Bf16Update) {
  const std::vector<Metrics> got = Run("bfloat16").steps;
  ASSERT_EQ(got.size(), want_.size());
  const double distance = CompareUpdates().whole;
  std::printf("bf16: summed updates within %.1e of their norm\n", distance);
  EXPECT_LE(distance, kBf16UpdateTolerance);
}

class GoldenFamily : public Trajectory, public testing::WithParamInterface<std::string> {
 protected:
  GoldenFamily() : Trajectory(GetParam(), "five_steps") {}
};
INSTANTIATE_TEST_SUITE_P(, GoldenFamily, testing::ValuesIn(GoldenFamilies()),
                         [](const auto& info) { return info.param; });

TEST_P(GoldenFamily, FiveSteps) {
  const std::vector<Metrics> got = Run("float32").steps;
  ASSERT_EQ(got.size(), 5u);
  ASSERT_GT(smallest_margin_, 1e-5);
  std::string worst;
  EXPECT_LE(LargestDifference(got, want_, &worst), kTrajectoryTolerance) << worst;
  const UpdateDistance distance = CompareUpdates();
  EXPECT_LE(distance.whole, kUpdateTolerance);
  EXPECT_LE(distance.farthest, kTensorUpdateTolerance) << distance.farthest_name;
}

// The trained model has the original's tensors, by name and shape and changed, and its configuration.
TEST_P(GoldenFamily, ExportLooksLikeTheOriginal) {
  ASSERT_FALSE(Run("float32").steps.empty());
  const auto exported = SafetensorsFile::Open(dir_ / "final" / "model.safetensors");
  ASSERT_TRUE(exported.ok()) << exported.status();
  const auto original = SafetensorsFile::Open(golden_.dir / "model.safetensors");
  ASSERT_TRUE(original.ok()) << original.status();
  ASSERT_EQ((*exported)->entries().size(), (*original)->entries().size());
  for (const SafetensorsEntry& entry : (*original)->entries()) {
    const SafetensorsEntry* mine = (*exported)->Find(entry.name);
    ASSERT_NE(mine, nullptr) << entry.name;
    EXPECT_EQ(mine->shape, entry.shape) << entry.name;
    EXPECT_FALSE(at::equal((*exported)->View(*mine), (*original)->View(entry))) << entry.name << " was not trained";
  }
  EXPECT_EQ(Json::parse(ReadText(dir_ / "final" / "config.json")), Json::parse(ReadText(golden_.dir / "config.json")));
}

}  // namespace
}  // namespace simpo
