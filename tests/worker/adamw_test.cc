#include "worker/adamw.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/worker/golden.h"
#include "tests/worker/io/thread_collectives.h"
#include "worker/shard/load_weights.h"

namespace simpo {
namespace {

// Different for every element and in every update.
at::Tensor Gradient(const ParamSlot& slot, int64_t update) {
  const at::Tensor wave = at::arange(slot.numel, at::kDouble).mul(0.37 * static_cast<double>(update)).sin();
  return (wave * 0.01).view(slot.spec.shape);
}

// Each rank brings its share.
void FillGradient(ShardedParams& params, int64_t update, int ranks) {
  params.ZeroGrads();
  for (int64_t i = 0; i < params.num_buckets(); ++i) {
    params.OpenGrads(i);
    for (const ParamSlot& slot : params.buckets()[i].slots) {
      SlotOf(params.buckets()[i].grads, slot).copy_(Gradient(slot, update) / ranks);
    }
    params.ReduceGrads(i, /*last_micro_batch=*/true);
  }
  params.FinishReduce();
}

// Algorithm 2 of arXiv 1711.05101 with the learning rate inside the decay, as torch has it; fp64.
struct PlainAdamW {
  at::Tensor weight, m, v;
  explicit PlainAdamW(const at::Tensor& start)
      : weight(start.to(at::kDouble)), m(at::zeros_like(weight)), v(at::zeros_like(weight)) {}
  void Step(const at::Tensor& grad, const AdamWOptions& options, double rate, int64_t t) {
    weight = weight * (1 - rate * options.weight_decay);
    m = options.beta1 * m + (1 - options.beta1) * grad;
    v = options.beta2 * v + (1 - options.beta2) * grad * grad;
    const at::Tensor m_hat = m / (1 - std::pow(options.beta1, t));
    const at::Tensor v_hat = v / (1 - std::pow(options.beta2, t));
    weight = weight - rate * m_hat / (v_hat.sqrt() + options.epsilon);
  }
};

std::vector<ShardingOptions> Layouts() {
  std::vector<ShardingOptions> layouts;
  for (const int zero_stage : {0, 1, 2, 3}) {
    for (const bool offload : {false, true}) {
      layouts.push_back({.zero_stage = zero_stage, .offload_optimizer = offload, .poison_released = true});
    }
  }
  return layouts;
}

TEST(AdamW, EqualsThePlainFormulaOnEveryLayout) {
  const Golden golden("tied");  // has biases
  const AdamWOptions options{.beta1 = 0.8, .beta2 = 0.95, .epsilon = 1e-6, .weight_decay = 0.2};
  for (const int ranks : {1, 3}) {
    for (const ShardingOptions& sharding : Layouts()) {
      ThreadWorld::Run(ranks, [&](Collectives& comm) {
        ShardedParams params(golden.config, sharding, comm);
        ASSERT_TRUE(LoadWeights(*golden.weights, params).ok());
        std::map<std::string, PlainAdamW> want;
        params.GatherAll();
        for (const Bucket& bucket : params.buckets()) {
          for (const ParamSlot& slot : bucket.slots) {
            want.emplace(slot.spec.name, PlainAdamW(SlotOf(bucket.weights, slot)));
          }
        }
        params.ReleaseAll();
        for (int64_t update = 1; update <= 6; ++update) {
          const double rate = 0.01 / static_cast<double>(update);
          const double clip = update == 3 ? 0.25 : 1;
          FillGradient(params, update, ranks);
          for (const Bucket& bucket : params.buckets()) {
            for (const ParamSlot& slot : bucket.slots) {
              AdamWOptions mine = options;
              // Neither biases nor norms decay.
              if (slot.spec.shape.size() == 1) mine.weight_decay = 0;
              want.at(slot.spec.name).Step(Gradient(slot, update) * clip, mine, rate, update);
            }
          }
          AdamWStep(params, options, rate, clip, update);
        }
        params.GatherAll();
        for (const auto& [name, plain] : want) {
          EXPECT_TRUE(at::allclose(params.Find(name)->value().to(at::kDouble), plain.weight, 1e-5, 1e-6))
              << name << " on " << ranks << " ranks, stage " << sharding.zero_stage;
        }
      });
    }
  }
}

TEST(AdamW, Bf16WeightsAreRoundedMasters) {
  const Golden golden("untied");
  const std::unique_ptr<Collectives> comm = MakeSingleRankCollectives();
  ShardedParams params(golden.config, {.compute_dtype = at::kBFloat16}, *comm);
  ASSERT_TRUE(LoadWeights(*golden.weights, params).ok());
  // Too small for bf16 to see at once, but the masters add them up.
  const at::Tensor before = params.Find("model.norm.weight")->value().clone();
  for (int64_t update = 1; update <= 40; ++update) {
    for (Bucket& bucket : params.buckets()) bucket.grads.fill_(1);
    AdamWStep(params, {}, /*learning_rate=*/1e-3, /*clip=*/1, update);
    if (update == 1) {
      EXPECT_TRUE(at::equal(params.Find("model.norm.weight")->value(), before));
    }
  }
  const at::Tensor moved = (before.to(at::kFloat) - params.Find("model.norm.weight")->value().to(at::kFloat));
  EXPECT_NEAR(moved.mean().item<double>(), 0.04, 2e-3);
}

TEST(GlobalGradNorm, IsTheSameOnEveryLayout) {
  const Golden golden("untied");
  for (const int ranks : {1, 2, 4}) {
    for (const ShardingOptions& sharding : Layouts()) {
      ThreadWorld::Run(ranks, [&](Collectives& comm) {
        ShardedParams params(golden.config, sharding, comm);
        FillGradient(params, /*update=*/1, ranks);
        double sum = 0;
        for (const Bucket& bucket : params.buckets()) {
          for (const ParamSlot& slot : bucket.slots) sum += Gradient(slot, 1).pow(2).sum().item<double>();
        }
        EXPECT_NEAR(GlobalGradNorm(params, comm), std::sqrt(sum), 1e-6)
            << ranks << " ranks, stage " << sharding.zero_stage;
      });
    }
  }
}

TEST(ClipCoefficient, IsTorchs) {
  EXPECT_EQ(ClipCoefficient(0.5, 1.0), 1);
  EXPECT_DOUBLE_EQ(ClipCoefficient(4.0, 1.0), 1.0 / (4.0 + 1e-6));
  EXPECT_EQ(ClipCoefficient(1e9, 0), 1);  // 0 switches clipping off
  EXPECT_EQ(ClipCoefficient(0, 1), 1);
}

}  // namespace
}  // namespace simpo
