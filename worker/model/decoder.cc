#include "worker/model/decoder.h"

#include <ATen/ATen.h>

#include <cmath>
#include <string>

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
  const bool fused = config.fused_projections;
  const std::vector<std::string> qkv =
      fused ? std::vector<std::string>{"qkv_proj"} : std::vector<std::string>{"q_proj", "k_proj", "v_proj"};
  const std::vector<std::string> gate_up =
      fused ? std::vector<std::string>{"gate_up_proj"} : std::vector<std::string>{"gate_proj", "up_proj"};
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const std::string prefix = c10::str("model.layers.", i, ".");
    const auto norm = [&](const char* name) {
      return name == nullptr ? WeightRef{} : params.Find(c10::str(prefix, name, ".weight"));
    };
    const bool qk_norm = config.qk_norm != QkNorm::kNone;
    layers_.push_back({.norm_before_attention = norm(config.layer_norms.before_attention),
                       .norm_after_attention = norm(config.layer_norms.after_attention),
                       .norm_before_mlp = norm(config.layer_norms.before_mlp),
                       .norm_after_mlp = norm(config.layer_norms.after_mlp),
                       .q_norm = norm(qk_norm ? "self_attn.q_norm" : nullptr),
                       .k_norm = norm(qk_norm ? "self_attn.k_norm" : nullptr),
                       .qkv = MakeProjection(params, prefix + "self_attn.", qkv),
                       .output = MakeProjection(params, prefix + "self_attn.", {"o_proj"}),
                       .gate_up = MakeProjection(params, prefix + "mlp.", gate_up),
                       .down = MakeProjection(params, prefix + "mlp.", {"down_proj"})});
  }
}

BatchContext Decoder::MakeContext(const PackedBatch& batch, at::ScalarType compute_dtype, at::Device device) const {
  RotaryAngles rotary = ComputeRotaryAngles(config_, batch);
  const std::vector<int64_t> windows = config_.windows.empty() ? std::vector<int64_t>{0} : config_.windows;
  return {.rotary = {.cos_TR = rotary.cos_TR.to(device), .sin_TR = rotary.sin_TR.to(device)},
          .attention = std::make_shared<const AttentionPlan>(batch.pairs, windows, compute_dtype, device)};
}

double Decoder::EmbeddingScale(at::ScalarType dtype) const {
  if (!config_.scaled_embeddings) return 1;
  // Rounded as the embeddings are, which Gemma was trained with: in bf16 the root of 3072 is 55.5.
  const double root = std::sqrt(static_cast<double>(config_.hidden_size));
  return at::scalar_tensor(root, at::TensorOptions(dtype)).item<double>();
}

at::Tensor Decoder::Embed(const at::Tensor& input_ids_T) const {
  const at::Tensor table = embedding_->value();
  const at::Tensor rows_TH = simpo::Embed(table, input_ids_T.to(table.device()));
  const double scale = EmbeddingScale(table.scalar_type());
  return scale == 1 ? rows_TH : rows_TH * scale;
}

void Decoder::EmbedBackward(const at::Tensor& grad_TH, const at::Tensor& input_ids_T) const {
  const double scale = EmbeddingScale(grad_TH.scalar_type());
  // transformers makes the embedding with padding_idx: that row has no gradient as an input.
  simpo::EmbedBackward(scale == 1 ? grad_TH : grad_TH * scale, input_ids_T.to(grad_TH.device()),
                       config_.pad_token_id.value_or(-1), embedding_->grad());
}

at::Tensor Decoder::Norm(const at::Tensor& x_TH, const WeightRef& weight) const {
  return weight ? RmsNorm(x_TH, weight, config_.norm_style, config_.rms_norm_eps) : x_TH;
}

at::Tensor Decoder::Layer(int64_t index, const at::Tensor& x_TH, const BatchContext& context) const {
  const LayerWeights& layer = layers_[index];
  const int64_t heads = config_.num_heads;
  const int64_t kv_heads = config_.num_kv_heads;
  const double divisor =
      config_.query_pre_attn_scalar > 0 ? config_.query_pre_attn_scalar : static_cast<double>(config_.head_dim);
  const AttentionConfig attention{.heads = heads,
                                  .kv_heads = kv_heads,
                                  .scale = 1 / std::sqrt(divisor),
                                  .window = config_.Window(index),
                                  .softcap = config_.attn_logit_softcapping};

  const at::Tensor attention_input = Norm(x_TH, layer.norm_before_attention);
  at::Tensor qkv = Project(attention_input, layer.qkv).view({-1, heads + 2 * kv_heads, config_.head_dim});
  if (layer.q_norm) {
    qkv = QkNorms(qkv, heads, kv_heads, layer.q_norm, layer.k_norm, config_.norm_style, config_.rms_norm_eps);
  }
  const at::Tensor rotated = ApplyRotary(qkv, heads + kv_heads, context.rotary.cos_TR, context.rotary.sin_TR);
  const at::Tensor attended = Project(PairAttention(rotated, attention, context.attention), layer.output);
  const at::Tensor after_attention = x_TH + Norm(attended, layer.norm_after_attention);

  const at::Tensor mlp_input = Norm(after_attention, layer.norm_before_mlp);
  const at::Tensor gated = GatedActivation(Project(mlp_input, layer.gate_up), config_.activation);
  return after_attention + Norm(Project(gated, layer.down), layer.norm_after_mlp);
}

at::Tensor Decoder::FinalNorm(const at::Tensor& rows_NH) const { return Norm(rows_NH, final_norm_); }

}  // namespace simpo
