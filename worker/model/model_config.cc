#include "worker/model/model_config.h"

#include <limits>
#include <utility>

namespace simpo {

std::vector<WeightSpec> ModelWeights(const ModelConfig& config) {
  const int64_t hidden = config.hidden_size;
  const int64_t inner = config.intermediate_size;
  const int64_t queries = config.num_heads * config.head_dim;
  const int64_t keys = config.num_kv_heads * config.head_dim;
  std::vector<WeightSpec> weights = {{"model.embed_tokens.weight", {config.vocab_size, hidden}, -1, true}};
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    auto add = [&](const std::string& name, std::vector<int64_t> shape, bool decay) {
      weights.push_back({prefix + name, std::move(shape), i, decay});
    };
    // Projections of one input stand side by side, so that they can be one matrix product.
    auto project = [&](const std::string& group, const std::vector<std::pair<std::string, int64_t>>& outputs,
                       int64_t inputs, bool bias) {
      for (const auto& [name, size] : outputs) add(group + name + ".weight", {size, inputs}, true);
      if (!bias) return;
      for (const auto& [name, size] : outputs) add(group + name + ".bias", {size}, false);
    };
    auto norm = [&](const char* name) {
      if (name != nullptr) add(std::string(name) + ".weight", {hidden}, false);
    };
    norm(config.layer_norms.before_attention);
    if (config.fused_projections) {
      project("self_attn.", {{"qkv_proj", queries + 2 * keys}}, hidden, config.qkv_bias);
    } else {
      project("self_attn.", {{"q_proj", queries}, {"k_proj", keys}, {"v_proj", keys}}, hidden, config.qkv_bias);
    }
    if (config.qk_norm != QkNorm::kNone) {
      const bool per_head = config.qk_norm == QkNorm::kPerHead;
      add("self_attn.q_norm.weight", {per_head ? config.head_dim : queries}, false);
      add("self_attn.k_norm.weight", {per_head ? config.head_dim : keys}, false);
    }
    project("self_attn.", {{"o_proj", hidden}}, queries, config.output_bias);
    norm(config.layer_norms.after_attention);
    norm(config.layer_norms.before_mlp);
    if (config.fused_projections) {
      project("mlp.", {{"gate_up_proj", 2 * inner}}, hidden, config.mlp_bias);
    } else {
      project("mlp.", {{"gate_proj", inner}, {"up_proj", inner}}, hidden, config.mlp_bias);
    }
    project("mlp.", {{"down_proj", hidden}}, inner, config.mlp_bias);
    norm(config.layer_norms.after_mlp);
  }
  weights.push_back({"model.norm.weight", {hidden}, config.num_layers, false});
  if (!config.tie_word_embeddings) {
    weights.push_back({"lm_head.weight", {config.vocab_size, hidden}, config.num_layers, true});
  }
  return weights;
}

int64_t RopeConfig::SharedAnglesUpTo() const {
  const bool by_length = type == "dynamic" || type == "longrope";
  return by_length ? original_max_position_embeddings : std::numeric_limits<int64_t>::max();
}

int64_t ModelConfig::RotaryPairs() const {
  return (static_cast<int64_t>(static_cast<double>(head_dim) * rope.partial_rotary_factor) + 1) / 2;
}

int64_t ModelConfig::NumParameters() const {
  int64_t total = 0;
  for (const WeightSpec& weight : ModelWeights(*this)) {
    int64_t numel = 1;
    for (int64_t size : weight.shape) numel *= size;
    total += numel;
  }
  return total;
}

}  // namespace simpo
