#include "worker/model/read_model_config.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "common/status_macros.h"
#include "worker/model/json_fields.h"
#include "worker/model/model_families.h"

namespace simpo {
namespace {

using Json = nlohmann::json;

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

template <size_t n>
bool IsOneOf(const std::string& value, const std::array<const char*, n>& list) {
  return std::find(list.begin(), list.end(), value) != list.end();
}

// Whether the file says null, which is not the same as saying nothing where the family has a default.
bool IsNull(const Json& json, const char* key) { return json.contains(key) && json[key].is_null(); }

void ReadSizes(const Json& json, JsonFields& fields, const Family& family, ModelConfig* config) {
  config->vocab_size = fields.Integer("vocab_size", 1, kMaxVocab);
  config->hidden_size = fields.Integer("hidden_size", 1, kMaxHidden);
  config->intermediate_size = fields.Integer("intermediate_size", 1, kMaxIntermediate);
  config->num_layers = fields.Integer("num_hidden_layers", 1, kMaxLayers);
  config->num_heads = fields.Integer("num_attention_heads", 1, kMaxHeads);
  config->max_position_embeddings =
      fields.Integer("max_position_embeddings", 1, kMaxPositions, config->max_position_embeddings);
  if (!fields.status().ok()) return;

  const bool needed = family.num_kv_heads_needed && !IsNull(json, "num_key_value_heads");
  config->num_kv_heads = fields.Integer("num_key_value_heads", 1, config->num_heads,
                                        needed ? std::nullopt : std::optional(config->num_heads));
  if (config->num_kv_heads > 0 && config->num_heads % config->num_kv_heads != 0) {
    fields.Fail("num_key_value_heads",
                absl::StrCat(config->num_kv_heads, " does not divide num_attention_heads ", config->num_heads));
  }
  if (fields.Has("head_dim")) {
    config->head_dim = fields.Integer("head_dim", 2, kMaxHeadDim);
  } else if (config->head_dim == 0 && config->hidden_size % config->num_heads == 0) {
    config->head_dim = config->hidden_size / config->num_heads;
  } else if (config->head_dim == 0) {
    fields.Fail("num_attention_heads",
                absl::StrCat(config->num_heads, " does not divide hidden_size ", config->hidden_size));
  }
}

// The windows of a family with layer_types; without the list, Qwen's begin at max_window_layers and
// Gemma 2's are every other layer's, the first one's included.
void ReadListedWindows(JsonFields& fields, int64_t window, ModelConfig* config) {
  const bool gemma2 = config->model_type == "gemma2";
  std::vector<bool> sliding(config->num_layers);
  if (fields.Has("layer_types")) {
    const Json& types = fields.Array("layer_types");
    if (static_cast<int64_t>(types.size()) != config->num_layers) {
      fields.Fail("layer_types", absl::StrCat("has ", types.size(), " entries for ", config->num_layers, " layers"));
      return;
    }
    for (int64_t i = 0; i < config->num_layers; ++i) {
      sliding[i] = types[i] == "sliding_attention";
      if (!sliding[i] && types[i] != "full_attention") {
        fields.Fail("layer_types", absl::StrCat(types[i].dump(),
                                                " is not supported (full_attention and "
                                                "sliding_attention are)"));
      }
    }
  } else {
    const int64_t first = gemma2 ? 0 : fields.Integer("max_window_layers", 0, kMaxPositions, 28);
    for (int64_t i = 0; i < config->num_layers; ++i) {
      sliding[i] = gemma2 ? i % 2 == 0 : window > 0 && i >= first;
    }
  }
  config->windows.assign(config->num_layers, 0);
  for (int64_t i = 0; i < config->num_layers; ++i) {
    if (!sliding[i]) continue;
    if (window == 0) fields.Fail("sliding_window", absl::StrCat("is none, but layer ", i, " has sliding attention"));
    config->windows[i] = window;
  }
}

void ReadWindows(const Json& json, JsonFields& fields, const Family& family, ModelConfig* config) {
  if (family.window_rule != WindowRule::kListed && fields.Has("layer_types")) {
    for (const Json& type : fields.Array("layer_types")) {
      if (family.window_rule == WindowRule::kNoLayer && type == "full_attention") continue;
      fields.Fail("layer_types", absl::StrCat(type.dump(), " is not supported for ", config->model_type));
    }
  }
  if (family.window_rule == WindowRule::kNoLayer) return;
  const int64_t fallback = IsNull(json, "sliding_window") ? 0 : family.sliding_window;
  int64_t window = fields.Has("sliding_window") ? fields.Integer("sliding_window", 1, kMaxPositions) : fallback;
  if (family.window_rule == WindowRule::kListed) {
    const bool qwen = config->model_type != "gemma2";
    if (qwen && !fields.Bool("use_sliding_window", false)) window = 0;
    return ReadListedWindows(fields, window, config);
  }
  if (window > 0) config->windows.assign(config->num_layers, window);
}

void ReadActivation(JsonFields& fields, const Family& family, ModelConfig* config) {
  const std::string fallback = config->activation == Activation::kSilu ? "silu" : "gelu_pytorch_tanh";
  const std::string name = fields.Text(family.activation_field, fallback);
  if (name == "silu") {
    config->activation = Activation::kSilu;
  } else if (name == "gelu_pytorch_tanh" || (name == "gelu" && config->model_type == "gemma")) {
    config->activation = Activation::kGeluTanh;  // which is what Gemma's first files mean by gelu
  } else {
    fields.Fail(family.activation_field,
                absl::StrCat("'", name, "' is not supported (silu and gelu_pytorch_tanh are)"));
  }
}

// Gemma 2's numbers; null means none.
void ReadScoreScaling(const Json& json, JsonFields& fields, ModelConfig* config) {
  if (config->query_pre_attn_scalar == 0) return;
  config->query_pre_attn_scalar = fields.Positive("query_pre_attn_scalar", config->query_pre_attn_scalar);
  const auto cap = [&](const char* key, double fallback) {
    return IsNull(json, key) ? 0 : fields.Positive(key, fallback);
  };
  config->attn_logit_softcapping = cap("attn_logit_softcapping", config->attn_logit_softcapping);
  config->final_logit_softcapping = cap("final_logit_softcapping", config->final_logit_softcapping);
}

// Features that would change the model's result without changing its tensors.
void RefuseUnsupported(JsonFields& fields, const ModelConfig& config) {
  if (!IsOneOf(config.dtype, kDtypes)) {
    fields.Fail("dtype",
                absl::StrCat("'", config.dtype, "' is not supported (", absl::StrJoin(kDtypes, ", "), " are)"));
  }
  if (fields.Has("quantization_config")) {
    fields.Fail("quantization_config", "quantised weights cannot be trained; use the original model");
  }
  if (fields.Has("use_bidirectional_attention") && fields.Bool("use_bidirectional_attention", false)) {
    fields.Fail("use_bidirectional_attention", "only causal attention is supported");
  }
}

// A list of one factor per rotated pair of dimensions.
std::vector<double> Factors(JsonFields& fields, const char* key, int64_t pairs) {
  std::vector<double> factors;
  for (const Json& item : fields.Array(key)) {
    const double value = item.is_number() ? item.get<double>() : 0;
    if (!(value > 0)) fields.Fail(key, "must be numbers above 0");
    factors.push_back(value);
  }
  if (static_cast<int64_t>(factors.size()) != pairs) {
    fields.Fail(key, absl::StrCat("has ", factors.size(), " entries; the heads have ", pairs, " rotated pairs"));
  }
  return factors;
}

// YaRN (arXiv 2309.00071).
void ReadYarn(JsonFields& fields, RopeConfig* rope) {
  const auto scale = [&](double mscale) {
    return rope->factor <= 1 ? 1.0 : 0.1 * mscale * std::log(rope->factor) + 1.0;
  };
  double attention = scale(1);
  if (fields.Has("mscale") && fields.Has("mscale_all_dim")) {
    attention = scale(fields.Positive("mscale")) / scale(fields.Positive("mscale_all_dim"));
  }
  rope->attention_factor = fields.Positive("attention_factor", attention);
  rope->beta_fast = fields.Positive("beta_fast", rope->beta_fast);
  rope->beta_slow = fields.Positive("beta_slow", rope->beta_slow);
  rope->truncate = fields.Bool("truncate", true);
}

// LongRoPE (arXiv 2402.13753).
void ReadLongRope(JsonFields& fields, const ModelConfig& config, RopeConfig* rope) {
  const auto original = static_cast<double>(rope->original_max_position_embeddings);
  rope->factor = fields.Positive("factor", static_cast<double>(config.max_position_embeddings) / original);
  const double attention = rope->factor <= 1 ? 1.0 : std::sqrt(1 + std::log(rope->factor) / std::log(original));
  rope->attention_factor = fields.Positive("attention_factor", attention);
  rope->short_factor = Factors(fields, "short_factor", config.RotaryPairs());
  rope->long_factor = Factors(fields, "long_factor", config.RotaryPairs());
}

// What the type of scaling asks for. Phi-3 has LongRoPE only, once called su and yarn, and keeps the
// original length beside the other fields of config.json.
void ReadScaling(JsonFields& top, JsonFields& fields, ModelConfig* config) {
  RopeConfig& rope = config->rope;
  const bool phi3 = config->model_type == "phi3";
  if (phi3 && (rope.type == "su" || rope.type == "yarn")) rope.type = "longrope";
  constexpr std::array<const char*, 5> kTypes = {"default", "linear", "dynamic", "llama3", "yarn"};
  constexpr std::array<const char*, 2> kPhi3Types = {"default", "longrope"};
  if (phi3 ? !IsOneOf(rope.type, kPhi3Types) : !IsOneOf(rope.type, kTypes)) {
    const std::string supported = phi3 ? absl::StrJoin(kPhi3Types, ", ") : absl::StrJoin(kTypes, ", ");
    fields.Fail("rope_type",
                absl::StrCat("'", rope.type, "' is not supported for ", config->model_type, " (", supported, " are)"));
    return;
  }
  if (rope.type == "default") return;
  if (phi3) {
    rope.original_max_position_embeddings =
        top.Integer("original_max_position_embeddings", 2, kMaxPositions, rope.original_max_position_embeddings);
    return ReadLongRope(fields, *config, &rope);
  }
  rope.factor = fields.Positive("factor");
  rope.original_max_position_embeddings = config->max_position_embeddings;
  if (rope.type == "dynamic" && config->RotaryPairs() < 2) {
    fields.Fail("rope_type", "'dynamic' needs heads of more than 2 dimensions");
  }
  if (rope.type == "llama3" || rope.type == "yarn") {
    rope.original_max_position_embeddings =
        fields.Integer("original_max_position_embeddings", 1, kMaxPositions, config->max_position_embeddings);
  }
  if (rope.type == "yarn") ReadYarn(fields, &rope);
  if (rope.type == "llama3") {
    rope.low_freq_factor = fields.Positive("low_freq_factor");
    rope.high_freq_factor = fields.Positive("high_freq_factor");
    if (rope.high_freq_factor <= rope.low_freq_factor) {
      fields.Fail("high_freq_factor", "must be above low_freq_factor");
    }
  }
}

// transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters.
void ReadRope(const Json& json, JsonFields& top, const std::string& file, ModelConfig* config) {
  const Json none = Json::object();
  const char* key = top.Has("rope_scaling") ? "rope_scaling" : "rope_parameters";
  const Json& values = top.Has(key) ? json[key] : none;
  JsonFields fields(values, absl::StrCat(file, ": ", key));
  for (const auto& [name, value] : values.items()) {
    if (value.is_object()) fields.Fail(name, "rotary positions by kind of layer are not supported");
  }
  RopeConfig& rope = config->rope;
  rope.theta = fields.Positive("rope_theta", top.Positive("rope_theta", rope.theta));
  rope.type = fields.Text("rope_type", fields.Text("type", rope.type));
  const double partial = fields.Positive("partial_rotary_factor", top.Positive("partial_rotary_factor", 1.0));
  if (config->model_type == "phi3" && partial < 1) {
    rope.partial_rotary_factor = partial;
  } else if (partial != 1.0) {
    fields.Fail("partial_rotary_factor", config->model_type == "phi3" ? "is above 1" : "only 1 is supported");
  }
  if (2 * config->RotaryPairs() > config->head_dim) {
    top.Fail("head_dim", absl::StrCat(config->head_dim, " is odd; rotary positions need pairs"));
  }
  if (config->RotaryPairs() == 0) fields.Fail("partial_rotary_factor", "leaves nothing to rotate");
  if (top.status().ok() && fields.status().ok()) ReadScaling(top, fields, config);
  top.Merge(fields);
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
  const std::string model_type = fields.Text("model_type");
  const std::optional<Family> family = FamilyOf(model_type);
  if (fields.status().ok() && !family.has_value()) {
    fields.Fail("model_type",
                absl::StrCat("'", model_type, "' is not supported; supported are ", absl::StrJoin(kModelTypes, ", ")));
  }
  if (!fields.status().ok()) return fields.status();
  ModelConfig config = family->config;
  ReadSizes(json, fields, *family, &config);
  if (!fields.status().ok()) return fields.status();
  config.rms_norm_eps = fields.Positive("rms_norm_eps", config.rms_norm_eps);
  config.tie_word_embeddings = fields.Bool("tie_word_embeddings", config.tie_word_embeddings);
  if (family->reads_attention_bias) config.qkv_bias = config.output_bias = fields.Bool("attention_bias", false);
  if (family->reads_mlp_bias) config.mlp_bias = fields.Bool("mlp_bias", false);
  config.dtype = fields.Text("dtype", fields.Text("torch_dtype", "float32"));
  ReadActivation(fields, *family, &config);
  ReadScoreScaling(json, fields, &config);
  ReadWindows(json, fields, *family, &config);
  RefuseUnsupported(fields, config);
  ReadRope(json, fields, path.string(), &config);
  config.bos_token_id = TokenId(fields, "bos_token_id", config.vocab_size);
  if (json.contains("pad_token_id")) config.pad_token_id = TokenId(fields, "pad_token_id", config.vocab_size);
  config.eos_token_ids = EosTokenIds(json, fields, config.vocab_size);
  if (!fields.status().ok()) return fields.status();
  SIMPO_RETURN_IF_ERROR(ReadGenerationConfig(model_dir / "generation_config.json", &config));
  return config;
}

}  // namespace simpo
