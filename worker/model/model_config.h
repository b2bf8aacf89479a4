#ifndef SIMPO_WORKER_MODEL_MODEL_CONFIG_H_
#define SIMPO_WORKER_MODEL_MODEL_CONFIG_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace simpo {

// Rotary position scaling, from config.json's rope_scaling or rope_parameters.
struct RopeConfig {
  double theta = 10000.0;
  std::string type = "default";  // default, linear, dynamic, llama3, yarn, longrope
  double factor = 1.0;
  double low_freq_factor = 1.0;   // llama3
  double high_freq_factor = 4.0;  // llama3
  // llama3, yarn, longrope: the length that the model was first trained with. dynamic: the length up to
  // which nothing is scaled (its max_position_embeddings).
  int64_t original_max_position_embeddings = 0;
  double attention_factor = 1.0;  // yarn, longrope: on both cosine and sine
  double beta_fast = 32.0;        // yarn
  double beta_slow = 1.0;         // yarn
  bool truncate = true;           // yarn: the ramp's ends are whole numbers
  // longrope, one per frequency: up to the original length, and beyond it.
  std::vector<double> short_factor, long_factor;
  double partial_rotary_factor = 1.0;  // of a head's size, from its start, is rotated

  // Sequences up to this many tokens have the same angles; a longer one has angles of its own, so that
  // it cannot share a prefix with a sequence of another length.
  int64_t SharedAnglesUpTo() const;
};

// The gate of the MLP: activation(gate) * up.
enum class Activation { kSilu, kGeluTanh };

// What an RMS norm multiplies, and where it rounds to the compute dtype.
enum class NormStyle {
  kRoundThenScale,  // weight * round(x / rms): Llama
  kScaleThenRound,  // round(weight * (x / rms)): OLMo 2
  kOnePlusWeight,   // round((1 + weight) * (x / rms)): Gemma
};

// The norms of a layer by their names in a checkpoint; null where the family has none.
struct LayerNorms {
  const char* before_attention = "input_layernorm";
  const char* after_attention = nullptr;  // of what attention adds to the residual
  const char* before_mlp = "post_attention_layernorm";
  const char* after_mlp = nullptr;  // of what the MLP adds
};

// Norms of queries and keys: none, of each head with the same weight, or of all heads together.
enum class QkNorm { kNone, kPerHead, kAllHeads };

// A decoder's architecture as a value: ReadModelConfig (read_model_config.h) starts from its family's (FamilyOf in
// model_families.h) and fills in what config.json says.
struct ModelConfig {
  std::string model_type;
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  int64_t num_kv_heads = 0;
  int64_t head_dim = 0;
  int64_t max_position_embeddings = 0;
  double rms_norm_eps = 1e-6;
  RopeConfig rope;
  bool tie_word_embeddings = false;
  bool qkv_bias = false;
  bool output_bias = false;  // of attention's output projection
  bool mlp_bias = false;
  bool fused_projections = false;  // q, k, v are one tensor in the checkpoint, and so are gate and up
  bool scaled_embeddings = false;  // by sqrt(hidden_size), rounded to the compute dtype
  Activation activation = Activation::kSilu;
  NormStyle norm_style = NormStyle::kRoundThenScale;
  LayerNorms layer_norms;
  QkNorm qk_norm = QkNorm::kNone;
  double query_pre_attn_scalar = 0;    // scores are divided by its root; 0: head_dim
  double attn_logit_softcapping = 0;   // scores become cap * tanh(scores / cap); 0: they do not
  double final_logit_softcapping = 0;  // the same for the head's logits
  // By layer: a token sees itself and this many tokens less one before it; 0: all of them. Empty: 0 for all.
  std::vector<int64_t> windows;
  std::string dtype = "float32";       // of the stored weights: float32, bfloat16, float16
  std::vector<int64_t> eos_token_ids;  // of config.json or generation_config.json
  std::optional<int64_t> bos_token_id;
  std::optional<int64_t> pad_token_id;

  int64_t Window(int64_t layer) const { return windows.empty() ? 0 : windows[layer]; }
  // Pairs of dimensions of a head that rotary positions turn.
  int64_t RotaryPairs() const;
  // Parameters in all tensors of the checkpoint (tied embeddings counted once).
  int64_t NumParameters() const;
};

// One weight tensor of a model.
struct WeightSpec {
  std::string name;  // as in a HF checkpoint: "model.layers.0.self_attn.q_proj.weight"
  std::vector<int64_t> shape;
  int64_t layer = 0;  // -1: embeddings; 0..num_layers-1; num_layers: final norm and head
  bool decay = true;  // weight decay applies (not to biases and norms)
};

// Every weight of the model, in bucket order: embeddings, layers from first to last, head.
// With tied embeddings there is no lm_head.weight.
std::vector<WeightSpec> ModelWeights(const ModelConfig& config);

}  // namespace simpo

#endif  // SIMPO_WORKER_MODEL_MODEL_CONFIG_H_
