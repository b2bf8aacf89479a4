#ifndef SIMPO_WORKER_MODEL_DECODER_H_
#define SIMPO_WORKER_MODEL_DECODER_H_

#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "worker/model/attention.h"
#include "worker/model/model_config.h"
#include "worker/model/ops.h"
#include "worker/model/rope.h"
#include "worker/pack.h"
#include "worker/shard/sharded_params.h"

namespace simpo {

// What every layer needs to know of a micro-batch.
struct BatchContext {
  RotaryAngles rotary;
  std::shared_ptr<const AttentionPlan> attention;
};

// One or more weights that multiply the same input, side by side in the output. One matrix product
// where they lie side by side in the bucket, else one each.
struct Projection {
  std::vector<WeightRef> weights;
  std::vector<WeightRef> biases;  // as many, or none
};

// One decoder layer's weights; null where the family has none.
struct LayerWeights {
  WeightRef norm_before_attention, norm_after_attention, norm_before_mlp, norm_after_mlp;
  WeightRef q_norm, k_norm;
  Projection qkv, output, gate_up, down;
};

// The decoder as a list of layers that the training step walks itself (train_step.cc). The weights
// are views of `params`, which must outlive it. Shape letters: T tokens, H hidden.
class Decoder {
 public:
  Decoder(const ModelConfig& config, const ShardedParams& params);

  int64_t num_layers() const { return config_.num_layers; }
  const ModelConfig& config() const { return config_; }

  BatchContext MakeContext(const PackedBatch& batch, at::ScalarType compute_dtype, at::Device device = at::kCPU) const;
  // hidden_TH of the input ids, which may be on any device.
  at::Tensor Embed(const at::Tensor& input_ids_T) const;
  void EmbedBackward(const at::Tensor& grad_TH, const at::Tensor& input_ids_T) const;
  // One layer; builds a graph if x requires gradients and gradient mode is on.
  at::Tensor Layer(int64_t index, const at::Tensor& x_TH, const BatchContext& context) const;
  // Final norm of the rows that the head scores.
  at::Tensor FinalNorm(const at::Tensor& rows_NH) const;
  const WeightRef& head() const { return head_; }

 private:
  // Of how embeddings are scaled in a model of `dtype`: 1 where they are not.
  double EmbeddingScale(at::ScalarType dtype) const;
  // x as it is where the family has no such norm.
  at::Tensor Norm(const at::Tensor& x_TH, const WeightRef& weight) const;

  ModelConfig config_;
  WeightRef embedding_, final_norm_, head_;
  std::vector<LayerWeights> layers_;
};

}  // namespace simpo

#endif  // SIMPO_WORKER_MODEL_DECODER_H_
