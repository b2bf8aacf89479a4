#include "worker/train_step.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <vector>

namespace simpo {
namespace {

// Buckets: the embeddings, one per layer, the head.
constexpr int64_t kEmbeddings = 0;
int64_t BucketOf(int64_t layer) { return layer + 1; }

// The head's own bucket, and that of the embeddings where the head is the same weight. Where it is not,
// the gather of bucket `next` begins meanwhile.
void GatherHead(const Decoder& decoder, ShardedParams& params, int64_t next) {
  const bool tied = decoder.config().tie_word_embeddings;
  params.Gather(BucketOf(decoder.num_layers()), tied ? -1 : next);
  if (tied) params.Gather(kEmbeddings);
}
void ReleaseHead(const Decoder& decoder, ShardedParams& params) {
  params.Release(BucketOf(decoder.num_layers()));
  if (decoder.config().tie_word_embeddings) params.Release(kEmbeddings);
}

}  // namespace

SimpoStats ForwardBackward(const Decoder& decoder, ShardedParams& params, const PackedBatch& batch,
                           const SimpoLoss& loss, const GlobalBatchSize& global, bool gradient_checkpointing,
                           bool last) {
  const int64_t layers = decoder.num_layers();
  const int64_t head = BucketOf(layers);
  const BatchContext context = decoder.MakeContext(batch, params.compute_dtype(), params.options().device);
  std::vector<at::Tensor> inputs(layers);
  std::vector<at::Tensor> outputs(layers);  // with their graphs, unless checkpointing

  params.Gather(kEmbeddings, BucketOf(0));
  at::Tensor hidden_TH = decoder.Embed(batch.input_ids_T);
  params.Release(kEmbeddings);
  for (int64_t i = 0; i < layers; ++i) {
    params.Gather(BucketOf(i), BucketOf(i) + 1);
    inputs[i] = hidden_TH.detach().requires_grad_(true);
    at::AutoGradMode grad_mode(!gradient_checkpointing);
    hidden_TH = decoder.Layer(i, inputs[i], context);
    if (!gradient_checkpointing) outputs[i] = hidden_TH;
    params.Release(BucketOf(i));
  }

  GatherHead(decoder, params, BucketOf(layers - 1));
  params.OpenGrads(head);
  if (decoder.config().tie_word_embeddings) params.OpenGrads(kEmbeddings);
  ScoredBatch scored = ScoreResponses(decoder, hidden_TH, batch, loss, global, /*with_gradients=*/true);
  ReleaseHead(decoder, params);
  params.ReduceGrads(head, last);

  at::Tensor grad_TH = std::move(scored.grad_TH);
  for (int64_t i = layers - 1; i >= 0; --i) {
    params.Gather(BucketOf(i), i > 0 ? BucketOf(i - 1) : -1);
    params.OpenGrads(BucketOf(i));
    if (gradient_checkpointing) {
      at::AutoGradMode grad_mode(true);
      outputs[i] = decoder.Layer(i, inputs[i], context);
    }
    grad_TH = torch::autograd::grad({outputs[i]}, {inputs[i]}, {grad_TH})[0];
    outputs[i].reset();
    inputs[i].reset();
    params.Release(BucketOf(i));
    params.ReduceGrads(BucketOf(i), last);
  }
  params.OpenGrads(kEmbeddings);
  decoder.EmbedBackward(grad_TH, batch.input_ids_T);
  params.ReduceGrads(kEmbeddings, last);
  return scored.stats;
}

SimpoStats ForwardOnly(const Decoder& decoder, ShardedParams& params, const PackedBatch& batch, const SimpoLoss& loss,
                       const std::function<void(int64_t layer, const at::Tensor& hidden_TH)>& observe) {
  at::NoGradGuard no_grad;
  const BatchContext context = decoder.MakeContext(batch, params.compute_dtype(), params.options().device);
  params.Gather(kEmbeddings, BucketOf(0));
  at::Tensor hidden_TH = decoder.Embed(batch.input_ids_T);
  params.Release(kEmbeddings);
  if (observe) observe(-1, hidden_TH);
  for (int64_t i = 0; i < decoder.num_layers(); ++i) {
    params.Gather(BucketOf(i), BucketOf(i) + 1);
    hidden_TH = decoder.Layer(i, hidden_TH, context);
    params.Release(BucketOf(i));
    if (observe) observe(i, hidden_TH);
  }
  GatherHead(decoder, params, /*next=*/-1);
  const SimpoStats stats = ScoreResponses(decoder, hidden_TH, batch, loss, {}, /*with_gradients=*/false).stats;
  ReleaseHead(decoder, params);
  return stats;
}

}  // namespace simpo
