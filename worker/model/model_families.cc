#include "worker/model/model_families.h"

namespace simpo {
namespace {

Family Llama() {
  Family family;
  family.config.max_position_embeddings = 2048;
  family.reads_attention_bias = true;
  family.reads_mlp_bias = true;
  return family;
}

Family Mistral() {
  Family family;
  family.config.max_position_embeddings = 131072;
  family.num_kv_heads_needed = true;
  family.window_rule = WindowRule::kEveryLayer;
  family.sliding_window = 4096;
  return family;
}

Family Qwen2() {
  Family family;
  family.config.max_position_embeddings = 32768;
  family.config.qkv_bias = true;
  family.num_kv_heads_needed = true;
  family.window_rule = WindowRule::kListed;
  family.sliding_window = 4096;
  return family;
}

Family Qwen3() {
  Family family = Qwen2();
  family.config.qkv_bias = false;
  family.config.head_dim = 128;
  family.config.qk_norm = QkNorm::kPerHead;
  family.reads_attention_bias = true;
  return family;
}

Family Gemma() {
  Family family;
  ModelConfig& config = family.config;
  config.max_position_embeddings = 8192;
  config.head_dim = 256;
  config.tie_word_embeddings = true;
  config.scaled_embeddings = true;
  config.activation = Activation::kGeluTanh;
  config.norm_style = NormStyle::kOnePlusWeight;
  config.pad_token_id = 0;
  family.num_kv_heads_needed = true;
  family.reads_attention_bias = true;
  return family;
}

Family Gemma2() {
  Family family = Gemma();
  family.config.layer_norms = {.before_attention = "input_layernorm",
                               .after_attention = "post_attention_layernorm",
                               .before_mlp = "pre_feedforward_layernorm",
                               .after_mlp = "post_feedforward_layernorm"};
  family.config.query_pre_attn_scalar = 256;
  family.config.attn_logit_softcapping = 50;
  family.config.final_logit_softcapping = 30;
  family.window_rule = WindowRule::kListed;
  family.sliding_window = 4096;
  family.activation_field = "hidden_activation";
  return family;
}

Family Phi3() {
  Family family;
  family.config.max_position_embeddings = 4096;
  family.config.rms_norm_eps = 1e-5;
  family.config.fused_projections = true;
  family.config.pad_token_id = 32000;
  family.config.rope.original_max_position_embeddings = 4096;
  family.window_rule = WindowRule::kEveryLayer;
  return family;
}

Family Olmo2() {
  Family family;
  family.config.max_position_embeddings = 2048;
  family.config.rms_norm_eps = 1e-5;
  family.config.norm_style = NormStyle::kScaleThenRound;
  family.config.layer_norms = {.before_attention = nullptr,
                               .after_attention = "post_attention_layernorm",
                               .before_mlp = nullptr,
                               .after_mlp = "post_feedforward_layernorm"};
  family.config.qk_norm = QkNorm::kAllHeads;
  family.config.pad_token_id = 1;
  family.reads_attention_bias = true;
  return family;
}

}  // namespace

std::optional<Family> FamilyOf(std::string_view model_type) {
  constexpr std::array<Family (*)(), kModelTypes.size()> kFamilies = {Llama, Mistral, Qwen2, Qwen3,
                                                                      Gemma, Gemma2,  Phi3,  Olmo2};
  for (size_t i = 0; i < kModelTypes.size(); ++i) {
    if (model_type != kModelTypes[i]) continue;
    Family family = kFamilies[i]();
    family.config.model_type = model_type;
    return family;
  }
  return std::nullopt;
}

}  // namespace simpo
