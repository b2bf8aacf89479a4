#ifndef SIMPO_TESTS_WORKER_IO_TINY_MODEL_H_
#define SIMPO_TESTS_WORKER_IO_TINY_MODEL_H_

#include <nlohmann/json.hpp>

#include "worker/model/model_config.h"

namespace simpo {

// A config.json of a very small Llama, as transformers 5 writes it; bucket sizes are no multiples
// of anything round, so that every world size pads differently.
inline nlohmann::json TinyConfigJson() {
  return nlohmann::json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 37,
    "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 4, "hidden_act": "silu",
    "max_position_embeddings": 64, "rms_norm_eps": 1e-05, "tie_word_embeddings": false,
    "attention_bias": false, "mlp_bias": false, "dtype": "float32",
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})");
}

inline ModelConfig TinyConfig() {
  return {.model_type = "llama",
          .vocab_size = 37,
          .hidden_size = 12,
          .intermediate_size = 20,
          .num_layers = 2,
          .num_heads = 3,
          .num_kv_heads = 1,
          .head_dim = 4,
          .max_position_embeddings = 64};
}

}  // namespace simpo

#endif  // SIMPO_TESTS_WORKER_IO_TINY_MODEL_H_
