#include "worker/model/decoder.h"

#include <ATen/ATen.h>

#include <string>

#include "absl/strings/str_cat.h"

namespace simpo {
namespace {

// `parts` as one weight when each begins where the one before ends; else unchanged.
std::vector<WeightRef> Fuse(const std::vector<WeightRef>& parts) {
  WeightRef joined = parts.front();
  for (size_t i = 1; i < parts.size(); ++i) {
    joined = joined->JoinedWith(*parts[i]);
    if (!joined) return parts;
  }
  return {joined};
}

Projection MakeProjection(const ShardedParams& params, const std::string& prefix,
                          const std::vector<std::string>& names) {
  Projection projection;
  for (const std::string& name : names) {
    projection.weights.push_back(params.Find(prefix + name + ".weight"));
    const std::string bias = prefix + name + ".bias";
    if (params.Has(bias)) projection.biases.push_back(params.Find(bias));
  }
  std::vector<WeightRef> weights = Fuse(projection.weights);
  std::vector<WeightRef> biases = projection.biases.empty() ? projection.biases : Fuse(projection.biases);
  if (biases.empty() || biases.size() == weights.size()) return {std::move(weights), std::move(biases)};
  return projection;
}

at::Tensor Project(const at::Tensor& x, const Projection& projection) {
  std::vector<at::Tensor> outputs;
  for (size_t i = 0; i < projection.weights.size(); ++i) {
    outputs.push_back(Linear(x, projection.weights[i], projection.biases.empty() ? WeightRef{} : projection.biases[i]));
  }
  return outputs.size() == 1 ? outputs.front() : at::cat(outputs, 1);
}

}  // namespace

Decoder::Decoder(const ModelConfig& config, const ShardedParams& params) : config_(config) {
  embedding_ = params.Find("model.embed_tokens.weight");
  final_norm_ = params.Find("model.norm.weight");
  head_ = config.tie_word_embeddings ? embedding_ : params.Find("lm_head.weight");
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const std::string prefix = absl::StrCat("model.layers.", i, ".");
    layers_.push_back({.input_norm = params.Find(prefix + "input_layernorm.weight"),
                       .post_attention_norm = params.Find(prefix + "post_attention_layernorm.weight"),
                       .qkv = MakeProjection(params, prefix + "self_attn.", {"q_proj", "k_proj", "v_proj"}),
                       .output = MakeProjection(params, prefix + "self_attn.", {"o_proj"}),
                       .gate_up = MakeProjection(params, prefix + "mlp.", {"gate_proj", "up_proj"}),
                       .down = MakeProjection(params, prefix + "mlp.", {"down_proj"})});
  }
}

BatchContext Decoder::MakeContext(const PackedBatch& batch, at::ScalarType compute_dtype) const {
  return {.rotary = ComputeRotaryAngles(config_.rope, config_.head_dim, batch.positions_T),
          .attention = std::make_shared<const AttentionPlan>(batch.pairs, compute_dtype)};
}

at::Tensor Decoder::Embed(const at::Tensor& input_ids_T) const {
  return simpo::Embed(embedding_->value(), input_ids_T);
}

void Decoder::EmbedBackward(const at::Tensor& grad_TH, const at::Tensor& input_ids_T) const {
  // transformers makes the embedding with padding_idx: that row has no gradient as an input.
  simpo::EmbedBackward(grad_TH, input_ids_T, config_.pad_token_id.value_or(-1), embedding_->grad());
}

at::Tensor Decoder::Layer(int64_t index, const at::Tensor& x_TH, const BatchContext& context) const {
  const LayerWeights& layer = layers_[index];
  const int64_t heads = config_.num_heads;
  const int64_t kv_heads = config_.num_kv_heads;

  const at::Tensor attention_input = RmsNorm(x_TH, layer.input_norm, config_.rms_norm_eps);
  const at::Tensor qkv = Project(attention_input, layer.qkv).view({-1, heads + 2 * kv_heads, config_.head_dim});
  const at::Tensor rotated = ApplyRotary(qkv, heads + kv_heads, context.rotary.cos_TD, context.rotary.sin_TD);
  const at::Tensor attended = PairAttention(rotated, heads, kv_heads, context.attention);
  const at::Tensor after_attention = x_TH + Project(attended, layer.output);

  const at::Tensor mlp_input = RmsNorm(after_attention, layer.post_attention_norm, config_.rms_norm_eps);
  return after_attention + Project(SwiGlu(Project(mlp_input, layer.gate_up)), layer.down);
}

at::Tensor Decoder::FinalNorm(const at::Tensor& rows_NH) const {
  return RmsNorm(rows_NH, final_norm_, config_.rms_norm_eps);
}

}  // namespace simpo
