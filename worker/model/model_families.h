#ifndef SIMPO_WORKER_MODEL_MODEL_FAMILIES_H_
#define SIMPO_WORKER_MODEL_MODEL_FAMILIES_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string_view>

#include "worker/model/model_config.h"

namespace simpo {

// Which layers have a window of sliding_window tokens.
enum class WindowRule {
  kNoLayer,
  kEveryLayer,  // unless the field is null
  kListed,      // those that layer_types calls sliding_attention
};

// A family: what its code in transformers does, and the values that its configuration class has where
// config.json says nothing.
struct Family {
  ModelConfig config;                // a head_dim of 0 stands for hidden_size / num_attention_heads
  bool num_kv_heads_needed = false;  // it has a default of its own instead of num_attention_heads
  bool reads_attention_bias = false;
  bool reads_mlp_bias = false;
  WindowRule window_rule = WindowRule::kNoLayer;
  int64_t sliding_window = 0;  // 0: none
  const char* activation_field = "hidden_act";
};

inline constexpr std::array<const char*, 8> kModelTypes = {"llama", "mistral", "qwen2", "qwen3",
                                                           "gemma", "gemma2",  "phi3",  "olmo2"};

// The family of a model_type; none if it is not one of the above.
std::optional<Family> FamilyOf(std::string_view model_type);

}  // namespace simpo

#endif  // SIMPO_WORKER_MODEL_MODEL_FAMILIES_H_
