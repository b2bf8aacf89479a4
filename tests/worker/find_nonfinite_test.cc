#include "worker/find_nonfinite.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "tests/worker/golden.h"
#include "tests/worker/io/thread_collectives.h"
#include "worker/shard/load_weights.h"
#include "worker/train_step.h"

namespace simpo {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

class FindNonFiniteTest : public testing::TestWithParam<int> {
 protected:
  // Two ranks with two micro-batches of one pair each; `spoil` acts before the walk, `spoil_grads` after.
  NonFinite Find(const std::function<void(ShardedParams&)>& spoil,
                 const std::function<void(ShardedParams&)>& spoil_grads = {}) {
    NonFinite found;
    const std::vector<TokenizedPair> pairs = Views(golden_.pairs);
    ThreadWorld::Run(2, [&](Collectives& comm) {
      at::set_num_threads(1);
      ShardedParams params(golden_.config, {.zero_stage = GetParam()}, comm);
      EXPECT_TRUE(LoadWeights(*golden_.weights, params).ok());
      spoil(params);
      params.SpreadAll();
      const Decoder decoder(golden_.config, params);
      std::vector<PackedBatch> mine;
      for (int i = 0; i < 2; ++i) mine.push_back(Pack(std::span(pairs).subspan(2 * comm.rank() + i, 1)));
      const SimpoLoss loss;
      params.ZeroGrads();
      for (const PackedBatch& batch : mine) {
        ForwardBackward(decoder, params, batch, loss, {.pairs = 4}, /*gradient_checkpointing=*/false,
                        &batch == &mine.back());
      }
      params.FinishReduce();
      if (spoil_grads) spoil_grads(params);
      const NonFinite mine_found = FindNonFinite(decoder, params, mine, loss, comm);
      if (comm.rank() == 0) found = mine_found;
    });
    return found;
  }

  // Sets one element of a master, on the rank that owns it.
  static void SetMaster(ShardedParams& params, const std::string& name, int64_t element, float value) {
    for (Bucket& bucket : params.buckets()) {
      for (const ParamSlot& slot : bucket.slots) {
        const int64_t place = slot.offset + element - bucket.owned_begin;
        if (slot.spec.name == name && place >= 0 && place < bucket.master.numel()) bucket.master[place] = value;
      }
    }
  }

  const Golden golden_{"untied"};
  const int64_t layers_ = golden_.config.num_layers;
};
INSTANTIATE_TEST_SUITE_P(Stages, FindNonFiniteTest, testing::Values(1, 3));

TEST_P(FindNonFiniteTest, ABrokenWeightIsNamed) {
  const NonFinite found =
      Find([](ShardedParams& params) { SetMaster(params, "model.layers.1.mlp.up_proj.weight", 5, kNan); });
  EXPECT_EQ(found.ToString(layers_), "the weight model.layers.1.mlp.up_proj.weight, before the step");
}

// A token that only the second micro-batch of rank 1 has is as large as fp32 can say, and what the first
// layer adds to it is large.
TEST_P(FindNonFiniteTest, TheLayerTheRankAndTheMicroBatchAreNamed) {
  const OwnedPair& last = golden_.pairs[3];
  int32_t only = -1;
  for (int32_t token : last.chosen) {
    bool elsewhere = token == last.chosen.back();
    for (int i = 0; i < 3; ++i) {
      for (const auto* side : {&golden_.pairs[i].chosen, &golden_.pairs[i].rejected}) {
        elsewhere = elsewhere || std::find(side->begin(), side->end(), token) != side->end();
      }
    }
    if (!elsewhere) only = token;
  }
  ASSERT_GE(only, 0);
  const NonFinite found = Find([&](ShardedParams& params) {
    const ModelConfig& config = golden_.config;
    for (int64_t i = 0; i < config.hidden_size; ++i) {
      SetMaster(params, "model.embed_tokens.weight", only * config.hidden_size + i, i % 2 == 0 ? 3.4e38f : -3.4e38f);
    }
    const int64_t numel = config.hidden_size * config.num_heads * config.head_dim;
    for (int64_t i = 0; i < numel; ++i) SetMaster(params, "model.layers.0.self_attn.o_proj.weight", i, 1e37f);
  });
  EXPECT_EQ(found.ToString(layers_), "the output of layer 0 on rank 1, micro-batch 2");
}

TEST_P(FindNonFiniteTest, ABrokenGradientIsNamedFromTheHeadDown) {
  const NonFinite found = Find([](ShardedParams&) {},
                               [](ShardedParams& params) {
                                 for (const int64_t bucket : {0, 2}) params.buckets()[bucket].grad_shard.fill_(kNan);
                               });
  EXPECT_EQ(found.kind, NonFinite::Kind::kGradient);
  EXPECT_NE(found.weight.find("model.layers.1."), std::string::npos) << found.weight;
}

TEST_P(FindNonFiniteTest, NothingIsMadeUp) {
  EXPECT_EQ(Find([](ShardedParams&) {}).kind, NonFinite::Kind::kUnknown);
}

}  // namespace
}  // namespace simpo
