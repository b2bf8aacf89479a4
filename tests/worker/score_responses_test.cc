#include "worker/score_responses.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "tests/worker/golden.h"
#include "worker/shard/load_weights.h"
#include "worker/train_step.h"

namespace simpo {
namespace {

// The golden model's embedding as hidden state: what the layers would make of it does not matter here.
struct Head {
  Golden golden{"untied"};
  std::unique_ptr<Collectives> comm = MakeSingleRankCollectives();
  ShardedParams params{golden.config, ShardingOptions(), *comm};
  PackedBatch batch = Pack(Views(golden.pairs));
  SimpoLoss loss{.label_smoothing = 0.1, .sft_weight = 0.3};
  GlobalBatchSize global{.pairs = 22, .chosen_tokens = 200};

  Head() { EXPECT_TRUE(LoadWeights(*golden.weights, params).ok()); }
  ScoredBatch Score(bool with_gradients, int64_t max_logits) {
    params.ZeroGrads();
    const Decoder decoder(golden.config, params);
    return ScoreResponses(decoder, decoder.Embed(batch.input_ids_T), batch, loss, global, with_gradients, max_logits);
  }
  at::Tensor HeadGrad() const { return params.Find("lm_head.weight")->grad().clone(); }
};

// All rows at once, pairs in groups, and pairs cut into pieces of a row (passed over twice).
TEST(ScoreResponses, ABoundOnLogitsChangesNothing) {
  Head head;
  const int64_t vocab = head.golden.config.vocab_size;
  const ScoredBatch want = head.Score(true, int64_t{1} << 25);
  const at::Tensor want_head = head.HeadGrad();
  ASSERT_GT(want.grad_TH.abs().max().item<double>(), 0);
  for (const int64_t rows : {1, 2, 7, 40, 100}) {
    const ScoredBatch got = head.Score(true, rows * vocab);
    EXPECT_TRUE(at::allclose(got.grad_TH, want.grad_TH, 1e-4, 1e-6)) << rows;
    EXPECT_TRUE(at::allclose(head.HeadGrad(), want_head, 1e-4, 1e-6)) << rows;
    const auto a = got.stats.ToArray();
    const auto b = want.stats.ToArray();
    for (size_t i = 0; i < a.size(); ++i) EXPECT_LE(Difference(a[i], b[i]), 1e-6) << rows << " rows, field " << i;
  }
}

TEST(ScoreResponses, WithoutGradientsTheStatsAreTheSame) {
  Head head;
  const auto want = head.Score(true, int64_t{1} << 25).stats.ToArray();
  const ScoredBatch got = head.Score(false, int64_t{1} << 25);
  EXPECT_EQ(got.stats.ToArray(), want);
  EXPECT_FALSE(got.grad_TH.defined());
  EXPECT_EQ(head.HeadGrad().abs().max().item<double>(), 0);
}

// Rows that predict no response token get no gradient.
TEST(ScoreResponses, PromptsHaveNoGradient) {
  Head head;
  const at::Tensor grad_TH = head.Score(true, int64_t{1} << 25).grad_TH;
  at::Tensor scored = at::zeros({grad_TH.size(0)}, at::kBool);
  scored.index_fill_(0, head.batch.head_rows_N, true);
  const at::Tensor rest = grad_TH.index({scored.logical_not()});
  ASSERT_GT(rest.size(0), 0);
  EXPECT_EQ(rest.abs().max().item<double>(), 0);
}

TEST(ScoreResponses, TokensOfPlainSequencesAreCounted) {
  Head head;
  double tokens = 0;
  for (const OwnedPair& pair : head.golden.pairs)
    tokens += static_cast<double>(pair.chosen.size() + pair.rejected.size());
  EXPECT_EQ(head.Score(false, int64_t{1} << 25).stats.source_tokens, tokens);
  EXPECT_LT(static_cast<double>(head.batch.input_ids_T.numel()), tokens);
}

}  // namespace
}  // namespace simpo
