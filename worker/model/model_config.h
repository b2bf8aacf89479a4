#ifndef SIMPO_WORKER_MODEL_MODEL_CONFIG_H_
#define SIMPO_WORKER_MODEL_MODEL_CONFIG_H_

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace simpo {

// Rotary position scaling, from config.json's rope_scaling or rope_parameters.
struct RopeConfig {
  double theta = 10000.0;
  std::string type = "default";  // default, linear, llama3
  double factor = 1.0;
  double low_freq_factor = 1.0;                  // llama3
  double high_freq_factor = 4.0;                 // llama3
  int64_t original_max_position_embeddings = 0;  // llama3
};

// A decoder's architecture as a value. A family is data: ReadModelConfig fills in what its
// config.json says and what its code in transformers implies.
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
  bool attention_bias = false;  // on q, k, v and o
  bool mlp_bias = false;
  std::string dtype = "float32";       // of the stored weights: float32, bfloat16, float16
  std::vector<int64_t> eos_token_ids;  // of config.json or generation_config.json
  std::optional<int64_t> bos_token_id;
  std::optional<int64_t> pad_token_id;

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

// Reads `model_dir`/config.json (and generation_config.json when present). An unknown family or a
// field whose value is not supported is INVALID_ARGUMENT that names file, field and value.
absl::StatusOr<ModelConfig> ReadModelConfig(const std::filesystem::path& model_dir);

}  // namespace simpo

#endif  // SIMPO_WORKER_MODEL_MODEL_CONFIG_H_
