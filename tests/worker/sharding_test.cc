// What ZeRO promises: bytes held and bytes sent per rank as the formulas say, never more whole weights
// than two buckets, and the same gradients whatever is given back in between.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>

#include "tests/worker/golden.h"
#include "tests/worker/io/thread_collectives.h"
#include "worker/adamw.h"
#include "worker/sampler.h"
#include "worker/train_step.h"

namespace simpo {
namespace {

// Large enough that neither padding nor embeddings weigh much.
ModelConfig SomeModel(bool tied) {
  ModelConfig config;
  config.model_type = "llama";
  config.vocab_size = 96;
  config.hidden_size = 64;
  config.intermediate_size = 192;
  config.num_layers = 4;
  config.num_heads = 4;
  config.num_kv_heads = 2;
  config.head_dim = 16;
  config.max_position_embeddings = 256;
  config.tie_word_embeddings = tied;
  return config;
}

std::vector<OwnedPair> SomePairs() {
  std::vector<OwnedPair> pairs;
  for (int i = 0; i < 8; ++i) {
    OwnedPair pair{.chosen_prompt_length = 6, .rejected_prompt_length = 6};
    for (int t = 0; t < 14; ++t) pair.chosen.push_back((7 * i + 5 * t) % 96);
    pair.rejected = pair.chosen;
    for (int t = 8; t < 14; ++t) pair.rejected[t] = (11 * i + 3 * t + 1) % 96;
    pairs.push_back(pair);
  }
  return pairs;
}

// The same weights on every layout.
void FillWeights(ShardedParams& params) {
  for (Bucket& bucket : params.buckets()) {
    for (const ParamSlot& slot : bucket.slots) {
      at::Tensor values = at::arange(slot.numel, at::kDouble).mul(0.7).add(static_cast<double>(slot.offset)).sin();
      values = slot.spec.shape.size() == 1 ? values.mul(0.1).add(1) : values.mul(0.2);
      const int64_t begin = std::max(slot.offset, bucket.owned_begin);
      const int64_t end = std::min(slot.offset + slot.numel, bucket.owned_begin + bucket.master.numel());
      if (begin >= end) continue;
      bucket.master.narrow(0, begin - bucket.owned_begin, end - begin)
          .copy_(values.narrow(0, begin - slot.offset, end - begin));
    }
  }
  params.SpreadAll();
}

// What one rank has seen of a step.
struct Outcome {
  std::map<std::string, at::Tensor> gradients;  // whole
  ShardedParams::Bytes bytes;
  Collectives::Traffic sent;    // in the second step, when nothing is new
  int64_t largest_buckets = 0;  // bytes of weights in the two largest
  int64_t parameters = 0;
};

// Two steps of `micro_batches` micro-batches on `ranks` ranks; rank 0's view.
Outcome RunSteps(const ModelConfig& config, const ShardingOptions& sharding, int ranks, int64_t micro_batches,
                 bool checkpointing = false) {
  Outcome outcome;
  const std::vector<OwnedPair> owned = SomePairs();
  const std::vector<TokenizedPair> pairs = Views(owned);
  std::vector<int64_t> all(pairs.size()), tokens;
  for (size_t i = 0; i < pairs.size(); ++i) all[i] = static_cast<int64_t>(i);
  for (const TokenizedPair& pair : pairs) tokens.push_back(PackedSize(pair));
  const auto max_pairs = static_cast<int64_t>(pairs.size()) / ranks / micro_batches;
  ThreadWorld::Run(ranks, [&](Collectives& comm) {
    at::set_num_threads(1);
    ShardedParams params(config, sharding, comm);
    FillWeights(params);
    const Decoder decoder(config, params);
    const SimpoLoss loss{.sft_weight = 0.1};
    const auto mine = MicroBatchesOfRank(all, tokens, /*max_tokens=*/1000, max_pairs, comm.rank(), ranks);
    ASSERT_EQ(mine.size(), static_cast<size_t>(micro_batches));
    Collectives::Traffic before;
    for (int step = 1; step <= 2; ++step) {
      before = comm.sent();
      params.ZeroGrads();
      for (const auto& indices : mine) {
        std::vector<TokenizedPair> batch;
        for (int64_t i : indices) batch.push_back(pairs[i]);
        ForwardBackward(decoder, params, Pack(batch), loss, {.pairs = 8, .chosen_tokens = 64}, checkpointing,
                        &indices == &mine.back());
      }
      params.FinishReduce();
      if (step == 1) {
        for (const Bucket& bucket : params.buckets()) {
          at::Tensor whole = at::zeros({bucket.numel}, at::kFloat);
          whole.narrow(0, bucket.owned_begin, bucket.grad_shard.numel()).copy_(bucket.grad_shard);
          if (sharding.zero_stage > 0) comm.AllGather(whole);
          if (comm.rank() != 0) continue;
          for (const ParamSlot& slot : bucket.slots) outcome.gradients[slot.spec.name] = SlotOf(whole, slot).clone();
        }
      }
      AdamWStep(params, {}, /*learning_rate=*/1e-3, /*clip=*/1, step);
    }
    const Collectives::Traffic after = comm.sent();
    const ShardedParams::Bytes bytes = params.MemoryBytes();
    if (comm.rank() != 0) return;
    outcome.sent = {.all_reduce = after.all_reduce - before.all_reduce,
                    .reduce_scatter = after.reduce_scatter - before.reduce_scatter,
                    .all_gather = after.all_gather - before.all_gather};
    outcome.bytes = bytes;
    std::vector<int64_t> sizes;
    for (const Bucket& bucket : params.buckets()) {
      sizes.push_back(bucket.numel * static_cast<int64_t>(bucket.weight_shard.element_size()));
    }
    std::sort(sizes.rbegin(), sizes.rend());
    outcome.largest_buckets = sizes[0] + sizes[1];
    outcome.parameters = config.NumParameters();
  });
  return outcome;
}

// Stage 3 finds every weight again, in place: what is released is overwritten with NaN, and a stale view
// of it would poison the gradients.
TEST(Sharding, ReleasedBucketsLeaveTheGradientsAlone) {
  for (const bool tied : {false, true}) {
    const ModelConfig config = SomeModel(tied);
    const Outcome want = RunSteps(config, {.zero_stage = 0}, /*ranks=*/1, /*micro_batches=*/1);
    for (const int zero_stage : {2, 3}) {
      for (const int ranks : {1, 2, 4}) {
        for (const bool checkpointing : {false, true}) {
          SCOPED_TRACE(testing::Message() << "stage " << zero_stage << ", " << ranks << " ranks, checkpointing "
                                          << checkpointing << ", tied " << tied);
          const Outcome got = RunSteps(config, {.zero_stage = zero_stage, .poison_released = true}, ranks,
                                       /*micro_batches=*/2, checkpointing);
          ASSERT_EQ(got.gradients.size(), want.gradients.size());
          for (const auto& [name, gradient] : got.gradients) {
            EXPECT_LE(Distance(gradient, want.gradients.at(name)), 1e-5) << name;
          }
          EXPECT_LE(got.bytes.peak_gathered, zero_stage == 3 ? got.largest_buckets + (tied ? 64 * 4 * ranks : 0) : 0);
        }
      }
    }
  }
}

// Bytes held and sent against the formulas: with Psi parameters, N ranks, c bytes per compute value and
// A micro-batches per step.
TEST(Sharding, BytesHeldAndSentAreThoseOfTheFormulas) {
  std::printf("stage ranks dtype  A  held/formula  sent/formula  whole weights beside the shard/two buckets\n");
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const double c = dtype == at::kFloat ? 4 : 2;
    for (const int zero_stage : {0, 1, 2, 3}) {
      for (const int ranks : {2, 4}) {
        for (const int64_t accumulation : {1, 2}) {
          const Outcome got =
              RunSteps(SomeModel(false), {.compute_dtype = dtype, .zero_stage = zero_stage}, ranks, accumulation);
          const auto psi = static_cast<double>(got.parameters);
          const double n = ranks;
          const auto a = static_cast<double>(accumulation);
          const double master = dtype == at::kFloat ? 4 : 0;  // in fp32 the weight is the master
          const double held[] = {(c + 16 - master) * psi, (c + 4) * psi + (12 - master) * psi / n,
                                 c * psi + (16 - master) * psi / n, (c + 16 - master) * psi / n};
          const double sent[] = {8, 4 + c, 4 * a + c, (4 + 2 * c) * a};
          const double held_ratio =
              static_cast<double>(got.bytes.weights + got.bytes.grads + got.bytes.optimizer) / held[zero_stage];
          const double sent_ratio = static_cast<double>(got.sent.total()) / (sent[zero_stage] * psi * (n - 1) / n);
          const double live = static_cast<double>(got.bytes.peak_gathered) / static_cast<double>(got.largest_buckets);
          std::printf("%5d %5d  %s %2ld  %12.4f  %12.4f  %12.4f\n", zero_stage, ranks,
                      dtype == at::kFloat ? "fp32" : "bf16", accumulation, held_ratio, sent_ratio, live);
          EXPECT_NEAR(held_ratio, 1, 0.05);
          EXPECT_NEAR(sent_ratio, 1, 0.05);
          EXPECT_LE(live, 1);
          EXPECT_LE(static_cast<double>(got.bytes.peak_open_grads), 4 / c * static_cast<double>(got.largest_buckets));
          EXPECT_GT(live, zero_stage == 3 ? 0.5 : -1);
        }
      }
    }
  }
}

// Halves what travels to be summed; the rounding stays that of bf16.
TEST(Sharding, Bf16ReductionHalvesTheTraffic) {
  const ModelConfig config = SomeModel(false);
  for (const int zero_stage : {0, 1, 2, 3}) {
    const Outcome want = RunSteps(config, {.zero_stage = zero_stage}, /*ranks=*/2, /*micro_batches=*/2);
    const Outcome got = RunSteps(config, {.zero_stage = zero_stage, .reduce_dtype = at::kBFloat16}, 2, 2);
    EXPECT_EQ(got.sent.reduce_scatter + got.sent.all_reduce, (want.sent.reduce_scatter + want.sent.all_reduce) / 2);
    for (const auto& [name, gradient] : got.gradients) {
      EXPECT_LE(Distance(gradient, want.gradients.at(name)), 1e-2) << name << ", stage " << zero_stage;
      EXPECT_GT(Distance(gradient, want.gradients.at(name)), 0) << name;
    }
  }
}

// On the device nothing of the optimizer and no gradient stays.
TEST(Sharding, OffloadHoldsWeightsOnly) {
  for (const int zero_stage : {1, 2, 3}) {
    const Outcome got = RunSteps(SomeModel(false), {.zero_stage = zero_stage, .offload_optimizer = true}, 2, 2);
    EXPECT_GT(got.bytes.peak_open_grads, 0);
    EXPECT_LE(got.bytes.peak_open_grads, got.largest_buckets);
    const auto shard = static_cast<double>(got.parameters) / 2;
    EXPECT_NEAR(static_cast<double>(got.bytes.grads), 4 * shard, 0.2 * shard);
    EXPECT_NEAR(static_cast<double>(got.bytes.optimizer), 12 * shard, 0.6 * shard);
  }
}

}  // namespace
}  // namespace simpo
