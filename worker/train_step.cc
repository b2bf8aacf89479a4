#include "worker/train_step.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd.h>

#include <vector>

namespace simpo {

SimpoStats ForwardBackward(const Decoder& decoder, const ShardedParams& params, const PackedBatch& batch,
                           const SimpoLoss& loss, const GlobalBatchSize& global, bool gradient_checkpointing) {
  const BatchContext context = decoder.MakeContext(batch, params.compute_dtype());
  std::vector<at::Tensor> inputs(decoder.num_layers());
  std::vector<at::Tensor> outputs(decoder.num_layers());  // with their graphs, unless checkpointing

  at::Tensor hidden_TH = decoder.Embed(batch.input_ids_T);
  for (int64_t i = 0; i < decoder.num_layers(); ++i) {
    inputs[i] = hidden_TH.detach().requires_grad_(true);
    at::AutoGradMode grad_mode(!gradient_checkpointing);
    hidden_TH = decoder.Layer(i, inputs[i], context);
    if (!gradient_checkpointing) outputs[i] = hidden_TH;
  }

  ScoredBatch scored = ScoreResponses(decoder, hidden_TH, batch, loss, global, /*with_gradients=*/true);

  at::Tensor grad_TH = std::move(scored.grad_TH);
  for (int64_t i = decoder.num_layers() - 1; i >= 0; --i) {
    if (gradient_checkpointing) {
      at::AutoGradMode grad_mode(true);
      outputs[i] = decoder.Layer(i, inputs[i], context);
    }
    grad_TH = torch::autograd::grad({outputs[i]}, {inputs[i]}, {grad_TH})[0];
    outputs[i].reset();
    inputs[i].reset();
  }
  decoder.EmbedBackward(grad_TH, batch.input_ids_T);
  return scored.stats;
}

SimpoStats ForwardOnly(const Decoder& decoder, const ShardedParams& params, const PackedBatch& batch,
                       const SimpoLoss& loss) {
  at::NoGradGuard no_grad;
  const BatchContext context = decoder.MakeContext(batch, params.compute_dtype());
  at::Tensor hidden_TH = decoder.Embed(batch.input_ids_T);
  for (int64_t i = 0; i < decoder.num_layers(); ++i) hidden_TH = decoder.Layer(i, hidden_TH, context);
  return ScoreResponses(decoder, hidden_TH, batch, loss, {}, /*with_gradients=*/false).stats;
}

}  // namespace simpo
