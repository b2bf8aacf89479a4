#include "worker/model/model_config.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/status_macros.h"
#include "worker/model/json_fields.h"

namespace simpo {
namespace {

using Json = nlohmann::json;

// Families whose code in transformers is the Llama decoder.
constexpr std::array<const char*, 2> kFamilies = {"llama", "mistral"};
constexpr std::array<const char*, 3> kDtypes = {"float32", "bfloat16", "float16"};
constexpr int64_t kMaxConfigBytes = 4 << 20;

// Beyond every model there is; together they keep the number of parameters within 2^55.
constexpr int64_t kMaxVocab = 1 << 24;
constexpr int64_t kMaxHidden = 1 << 18;
constexpr int64_t kMaxIntermediate = 1 << 20;
constexpr int64_t kMaxLayers = 1 << 10;
constexpr int64_t kMaxHeads = 1 << 12;
constexpr int64_t kMaxHeadDim = 1 << 12;
constexpr int64_t kMaxPositions = int64_t{1} << 40;

// What the family's class in transformers assumes where config.json is silent.
constexpr int64_t kLlamaPositions = 2048;
constexpr int64_t kMistralPositions = 131072;
constexpr int64_t kMistralWindow = 4096;

template <size_t n>
bool IsOneOf(const std::string& value, const std::array<const char*, n>& list) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

void ReadSizes(JsonFields& fields, ModelConfig* config) {
  const bool mistral = config->model_type == "mistral";
  config->vocab_size = fields.Integer("vocab_size", 1, kMaxVocab);
  config->hidden_size = fields.Integer("hidden_size", 1, kMaxHidden);
  config->intermediate_size = fields.Integer("intermediate_size", 1, kMaxIntermediate);
  config->num_layers = fields.Integer("num_hidden_layers", 1, kMaxLayers);
  config->num_heads = fields.Integer("num_attention_heads", 1, kMaxHeads);
  config->max_position_embeddings =
      fields.Integer("max_position_embeddings", 1, kMaxPositions, mistral ? kMistralPositions : kLlamaPositions);
  if (!fields.status().ok()) return;

  // Mistral's class has a default of its own, so there the field must be written.
  config->num_kv_heads = mistral ? fields.Integer("num_key_value_heads", 1, config->num_heads)
                                 : fields.Integer("num_key_value_heads", 1, config->num_heads, config->num_heads);
  if (config->num_kv_heads > 0 && config->num_heads % config->num_kv_heads != 0) {
    fields.Fail("num_key_value_heads",
                absl::StrCat(config->num_kv_heads, " does not divide num_attention_heads ", config->num_heads));
  }
  if (fields.Has("head_dim")) {
    config->head_dim = fields.Integer("head_dim", 2, kMaxHeadDim);
  } else if (config->hidden_size % config->num_heads == 0) {
    config->head_dim = config->hidden_size / config->num_heads;
  } else {
    fields.Fail("num_attention_heads",
                absl::StrCat(config->num_heads, " does not divide hidden_size ", config->hidden_size));
  }
  if (config->head_dim % 2 != 0) {
    fields.Fail("head_dim", absl::StrCat(config->head_dim, " is odd; rotary positions need pairs"));
  }
}

// Features that would change the model's result without changing its tensors.
void RefuseUnsupported(const Json& json, JsonFields& fields, const ModelConfig& config) {
  const std::string activation = fields.Text("hidden_act", "silu");
  if (activation != "silu") {
    fields.Fail("hidden_act", absl::StrCat("'", activation, "' is not supported (silu is)"));
  }
  if (!IsOneOf(config.dtype, kDtypes)) {
    fields.Fail("dtype",
                absl::StrCat("'", config.dtype, "' is not supported (", absl::StrJoin(kDtypes, ", "), " are)"));
  }
  if (fields.Has("quantization_config")) {
    fields.Fail("quantization_config", "quantised weights cannot be trained; use the original model");
  }
  if (config.model_type != "mistral") return;
  const bool none = json.contains("sliding_window") && json["sliding_window"].is_null();
  const int64_t window = none ? kMaxPositions : fields.Integer("sliding_window", 1, kMaxPositions, kMistralWindow);
  if (window < config.max_position_embeddings) {
    fields.Fail("sliding_window", absl::StrCat("a window of ", window, ", shorter than max_position_embeddings ",
                                               config.max_position_embeddings, ", is not supported"));
  }
}

// transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters.
RopeConfig ReadRope(const Json& json, JsonFields& top, const std::string& file) {
  const Json none = Json::object();
  const char* key = top.Has("rope_scaling") ? "rope_scaling" : "rope_parameters";
  const Json& values = top.Has(key) ? json[key] : none;
  JsonFields fields(values, absl::StrCat(file, ": ", key));
  for (const auto& [name, value] : values.items()) {
    if (value.is_object()) fields.Fail(name, "rotary positions by kind of layer are not supported");
  }
  RopeConfig rope;
  rope.theta = fields.Positive("rope_theta", top.Positive("rope_theta", rope.theta));
  rope.type = fields.Text("rope_type", fields.Text("type", rope.type));
  if (rope.type == "linear" || rope.type == "llama3") {
    rope.factor = fields.Positive("factor");
  } else if (rope.type != "default") {
    fields.Fail("rope_type", absl::StrCat("'", rope.type, "' is not supported (default, linear, llama3 are)"));
  }
  if (rope.type == "llama3") {
    rope.low_freq_factor = fields.Positive("low_freq_factor");
    rope.high_freq_factor = fields.Positive("high_freq_factor");
    rope.original_max_position_embeddings = fields.Integer("original_max_position_embeddings", 1, kMaxPositions);
    if (rope.high_freq_factor <= rope.low_freq_factor) {
      fields.Fail("high_freq_factor", "must be above low_freq_factor");
    }
  }
  const double partial = fields.Positive("partial_rotary_factor", top.Positive("partial_rotary_factor", 1.0));
  if (partial != 1.0) fields.Fail("partial_rotary_factor", "only 1 is supported");
  top.Merge(fields);
  return rope;
}

// A token's id; -1 is what some files write for none.
std::optional<int64_t> TokenId(JsonFields& fields, const char* key, int64_t vocab_size) {
  const int64_t id = fields.Integer(key, -1, vocab_size - 1, -1);
  return id < 0 ? std::nullopt : std::optional(id);
}

std::vector<int64_t> EosTokenIds(const Json& json, JsonFields& fields, int64_t vocab_size) {
  if (!fields.Has("eos_token_id") || !json["eos_token_id"].is_array()) {
    const std::optional<int64_t> id = TokenId(fields, "eos_token_id", vocab_size);
    return id ? std::vector<int64_t>{*id} : std::vector<int64_t>();
  }
  std::vector<int64_t> ids;
  for (const Json& item : json["eos_token_id"]) {
    if (!item.is_number_unsigned() || item.get<uint64_t>() >= static_cast<uint64_t>(vocab_size)) {
      fields.Fail("eos_token_id", absl::StrCat("must be token ids below ", vocab_size));
      break;
    }
    ids.push_back(item.get<int64_t>());
  }
  return ids;
}

// What generation_config.json adds where config.json names no end token.
absl::Status ReadGenerationConfig(const std::filesystem::path& path, ModelConfig* config) {
  if (!std::filesystem::exists(path)) return absl::OkStatus();
  SIMPO_ASSIGN_OR_RETURN(const Json json, ReadJsonObject(path, kMaxConfigBytes));
  JsonFields fields(json, path.string());
  const std::vector<int64_t> ids = EosTokenIds(json, fields, config->vocab_size);
  if (config->eos_token_ids.empty()) config->eos_token_ids = ids;
  return fields.status();
}

}  // namespace

absl::StatusOr<ModelConfig> ReadModelConfig(const std::filesystem::path& model_dir) {
  const std::filesystem::path path = model_dir / "config.json";
  SIMPO_ASSIGN_OR_RETURN(const Json json, ReadJsonObject(path, kMaxConfigBytes));
  JsonFields fields(json, path.string());
  ModelConfig config;
  config.model_type = fields.Text("model_type");
  if (fields.status().ok() && !IsOneOf(config.model_type, kFamilies)) {
    fields.Fail("model_type", absl::StrCat("'", config.model_type, "' is not supported; supported are ",
                                           absl::StrJoin(kFamilies, ", ")));
  }
  if (!fields.status().ok()) return fields.status();
  ReadSizes(fields, &config);
  config.rms_norm_eps = fields.Positive("rms_norm_eps", config.rms_norm_eps);
  config.tie_word_embeddings = fields.Bool("tie_word_embeddings", false);
  config.attention_bias = fields.Bool("attention_bias", false);
  config.mlp_bias = fields.Bool("mlp_bias", false);
  config.dtype = fields.Text("dtype", fields.Text("torch_dtype", "float32"));
  RefuseUnsupported(json, fields, config);
  config.rope = ReadRope(json, fields, path.string());
  config.bos_token_id = TokenId(fields, "bos_token_id", config.vocab_size);
  config.pad_token_id = TokenId(fields, "pad_token_id", config.vocab_size);
  config.eos_token_ids = EosTokenIds(json, fields, config.vocab_size);
  if (!fields.status().ok()) return fields.status();
  SIMPO_RETURN_IF_ERROR(ReadGenerationConfig(model_dir / "generation_config.json", &config));
  return config;
}

std::vector<WeightSpec> ModelWeights(const ModelConfig& config) {
  const int64_t hidden = config.hidden_size;
  const int64_t queries = config.num_heads * config.head_dim;
  const int64_t keys = config.num_kv_heads * config.head_dim;
  std::vector<WeightSpec> weights = {{"model.embed_tokens.weight", {config.vocab_size, hidden}, -1, true}};
  for (int64_t i = 0; i < config.num_layers; ++i) {
    const std::string prefix = absl::StrCat("model.layers.", i, ".");
    auto add = [&](const char* name, std::vector<int64_t> shape, bool decay) {
      weights.push_back({prefix + name, std::move(shape), i, decay});
    };
    add("input_layernorm.weight", {hidden}, false);
    // Projections of one input stand side by side, so that they can be one matrix product.
    add("self_attn.q_proj.weight", {queries, hidden}, true);
    add("self_attn.k_proj.weight", {keys, hidden}, true);
    add("self_attn.v_proj.weight", {keys, hidden}, true);
    if (config.attention_bias) {
      add("self_attn.q_proj.bias", {queries}, false);
      add("self_attn.k_proj.bias", {keys}, false);
      add("self_attn.v_proj.bias", {keys}, false);
    }
    add("self_attn.o_proj.weight", {hidden, queries}, true);
    if (config.attention_bias) add("self_attn.o_proj.bias", {hidden}, false);
    add("post_attention_layernorm.weight", {hidden}, false);
    add("mlp.gate_proj.weight", {config.intermediate_size, hidden}, true);
    add("mlp.up_proj.weight", {config.intermediate_size, hidden}, true);
    if (config.mlp_bias) {
      add("mlp.gate_proj.bias", {config.intermediate_size}, false);
      add("mlp.up_proj.bias", {config.intermediate_size}, false);
    }
    add("mlp.down_proj.weight", {hidden, config.intermediate_size}, true);
    if (config.mlp_bias) add("mlp.down_proj.bias", {hidden}, false);
  }
  weights.push_back({"model.norm.weight", {hidden}, config.num_layers, false});
  if (!config.tie_word_embeddings) {
    weights.push_back({"lm_head.weight", {config.vocab_size, hidden}, config.num_layers, true});
  }
  return weights;
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
