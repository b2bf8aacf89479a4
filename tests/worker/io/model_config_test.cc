#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <random>

#include "tests/worker/io/test_files.h"
#include "tests/worker/io/tiny_model.h"
#include "worker/model/read_model_config.h"

namespace simpo {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

absl::StatusOr<ModelConfig> Read(const json& config) {
  const TempDir dir;
  WriteText(dir / "config.json", config.dump());
  return ReadModelConfig(dir.path());
}

// The tiny config with `patch` (RFC 7396: null removes a field).
json Patched(const char* patch) {
  json config = TinyConfigJson();
  config.merge_patch(json::parse(patch));
  return config;
}

// SmolLM2-135M-Instruct's config.json, transformers 4 spelling.
json SmolLm2() {
  return json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
    "intermediate_size": 1536, "max_position_embeddings": 8192, "mlp_bias": false,
    "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
    "num_key_value_heads": 3, "pad_token_id": 2, "rms_norm_eps": 1e-05, "rope_scaling": null,
    "rope_theta": 100000, "tie_word_embeddings": true, "torch_dtype": "bfloat16",
    "vocab_size": 49152})");
}

TEST(ModelConfig, ReadsSmolLm2) {
  const auto config = Read(SmolLm2());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->head_dim, 64);
  EXPECT_EQ(config->num_kv_heads, 3);
  EXPECT_EQ(config->rope.theta, 100000);
  EXPECT_EQ(config->rope.type, "default");
  EXPECT_EQ(config->dtype, "bfloat16");
  EXPECT_EQ(config->rms_norm_eps, 1e-5);
  EXPECT_TRUE(config->tie_word_embeddings);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(2));
  EXPECT_EQ(config->pad_token_id, 2);
  EXPECT_EQ(config->NumParameters(), 134'515'008);  // as published
}

TEST(ModelConfig, BothSpellingsSayTheSame) {
  const auto four = Read(Patched(R"({"rope_parameters": null, "dtype": null, "rope_theta": 5e5,
      "torch_dtype": "float16", "rope_scaling": {"type": "linear", "factor": 4.0}})"));
  const auto five = Read(Patched(R"({"dtype": "float16", "rope_parameters":
      {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}})"));
  for (const auto* config : {&four, &five}) {
    ASSERT_TRUE(config->ok()) << config->status();
    EXPECT_EQ((*config)->rope.type, "linear");
    EXPECT_EQ((*config)->rope.theta, 5e5);
    EXPECT_EQ((*config)->rope.factor, 4.0);
    EXPECT_EQ((*config)->dtype, "float16");
  }
}

TEST(ModelConfig, ReadsLlama3Rope) {
  const auto config = Read(Patched(R"({"rope_parameters": null, "rope_theta": 500000.0,
      "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.5,
      "high_freq_factor": 4.5, "original_max_position_embeddings": 8192}})"));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope.type, "llama3");
  EXPECT_EQ(config->rope.theta, 500000.0);
  EXPECT_EQ(config->rope.factor, 32.0);
  EXPECT_EQ(config->rope.low_freq_factor, 1.5);
  EXPECT_EQ(config->rope.high_freq_factor, 4.5);
  EXPECT_EQ(config->rope.original_max_position_embeddings, 8192);
}

TEST(ModelConfig, FillsInWhatTheFileLeavesOut) {
  const auto config = Read(json::parse(R"({"model_type": "llama", "vocab_size": 8,
      "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1,
      "num_attention_heads": 4})"));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->head_dim, 8);
  EXPECT_EQ(config->num_kv_heads, 4);
  EXPECT_EQ(config->max_position_embeddings, 2048);
  EXPECT_EQ(config->rope.theta, 10000.0);
  EXPECT_EQ(config->dtype, "float32");
  EXPECT_TRUE(config->eos_token_ids.empty());
  EXPECT_FALSE(config->pad_token_id.has_value());
}

TEST(ModelConfig, EndTokensComeFromEitherFile) {
  const TempDir dir;
  WriteText(dir / "generation_config.json", R"({"eos_token_id": [5, 7]})");
  WriteText(dir / "config.json", Patched(R"({"eos_token_id": null, "pad_token_id": -1})").dump());
  auto config = ReadModelConfig(dir.path());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->eos_token_ids, ElementsAre(5, 7));
  EXPECT_FALSE(config->pad_token_id.has_value());
  WriteText(dir / "config.json", Patched(R"({"eos_token_id": [3, 4]})").dump());
  config = ReadModelConfig(dir.path());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->eos_token_ids, ElementsAre(3, 4));
  WriteText(dir / "generation_config.json", R"({"eos_token_id": [5, 37]})");
  EXPECT_THAT(std::string(ReadModelConfig(dir.path()).status().message()),
              AllOf(HasSubstr("generation_config.json"), HasSubstr("eos_token_id")));
}

// What a file of each family says, and what its class in transformers makes of what the file leaves out.
TEST(ModelConfig, FamiliesFillInTheirOwn) {
  const auto read = [](const char* model_type, const char* patch = "{}") {
    json config = Patched(patch);
    config["model_type"] = model_type;
    for (const char* field :
         {"head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "pad_token_id", "hidden_act"}) {
      if (!json::parse(patch).contains(field)) config.erase(field);
    }
    const auto result = Read(config);
    EXPECT_TRUE(result.ok()) << result.status();
    return result.value_or(ModelConfig());
  };
  const ModelConfig mistral = read("mistral");
  EXPECT_THAT(mistral.windows, ElementsAre(4096, 4096));
  EXPECT_EQ(mistral.max_position_embeddings, 131072);

  const ModelConfig qwen2 = read("qwen2", R"({"attention_bias": true, "mlp_bias": true})");  // which it has not
  EXPECT_TRUE(qwen2.qkv_bias && !qwen2.output_bias && !qwen2.mlp_bias);
  EXPECT_EQ(qwen2.Window(1), 0);
  EXPECT_EQ(qwen2.head_dim, 4);

  const ModelConfig qwen3 = read("qwen3", R"({"attention_bias": true})");
  EXPECT_TRUE(qwen3.qkv_bias && qwen3.output_bias);
  EXPECT_EQ(qwen3.head_dim, 128);
  EXPECT_EQ(qwen3.qk_norm, QkNorm::kPerHead);

  const ModelConfig gemma = read("gemma", R"({"hidden_act": "gelu"})");
  EXPECT_EQ(gemma.activation, Activation::kGeluTanh);
  EXPECT_EQ(gemma.norm_style, NormStyle::kOnePlusWeight);
  EXPECT_TRUE(gemma.scaled_embeddings && gemma.tie_word_embeddings);
  EXPECT_EQ(gemma.head_dim, 256);
  EXPECT_EQ(gemma.pad_token_id, 0);
  EXPECT_EQ(gemma.final_logit_softcapping, 0);

  const ModelConfig gemma2 = read("gemma2", R"({"hidden_act": "what Gemma 2 does not read"})");
  EXPECT_EQ(gemma2.attn_logit_softcapping, 50);
  EXPECT_EQ(gemma2.final_logit_softcapping, 30);
  EXPECT_EQ(gemma2.query_pre_attn_scalar, 256);
  EXPECT_THAT(gemma2.windows, ElementsAre(4096, 0));

  const ModelConfig phi3 = read("phi3");
  EXPECT_TRUE(phi3.fused_projections && phi3.windows.empty());
  EXPECT_EQ(phi3.rms_norm_eps, 1e-5);
  EXPECT_EQ(phi3.pad_token_id, 32000);

  const ModelConfig olmo2 = read("olmo2");
  EXPECT_EQ(olmo2.qk_norm, QkNorm::kAllHeads);
  EXPECT_EQ(olmo2.layer_norms.before_attention, nullptr);
  EXPECT_EQ(olmo2.rms_norm_eps, 1e-5);
}

// null is an answer of its own where the family has a default.
TEST(ModelConfig, NullIsNotAbsent) {
  json gemma2 = Patched(R"({"model_type": "gemma2", "head_dim": 4})");
  for (const char* field : {"attn_logit_softcapping", "final_logit_softcapping", "pad_token_id"}) {
    gemma2[field] = nullptr;
  }
  const auto config = Read(gemma2);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->attn_logit_softcapping, 0);
  EXPECT_EQ(config->final_logit_softcapping, 0);
  EXPECT_FALSE(config->pad_token_id.has_value());
  json mistral = Patched(R"({"model_type": "mistral"})");
  mistral["sliding_window"] = mistral["num_key_value_heads"] = nullptr;
  EXPECT_TRUE(Read(mistral)->windows.empty());
  EXPECT_EQ(Read(mistral)->num_kv_heads, 3);
}

TEST(ModelConfig, WindowsByLayer) {
  const auto windows = [](const char* patch) { return Read(Patched(patch))->windows; };
  EXPECT_THAT(windows(R"({"model_type": "mistral", "sliding_window": 32})"), ElementsAre(32, 32));
  EXPECT_THAT(windows(R"({"model_type": "phi3", "sliding_window": 32})"), ElementsAre(32, 32));
  EXPECT_THAT(windows(R"({"model_type": "qwen2", "sliding_window": 32, "max_window_layers": 1})"), ElementsAre(0, 0));
  EXPECT_THAT(windows(R"({"model_type": "qwen2", "use_sliding_window": true, "sliding_window": 32,
                          "max_window_layers": 1})"),
              ElementsAre(0, 32));
  EXPECT_THAT(windows(R"({"model_type": "qwen3", "use_sliding_window": true, "sliding_window": 32,
                          "layer_types": ["sliding_attention", "full_attention"]})"),
              ElementsAre(32, 0));
  EXPECT_THAT(windows(R"({"model_type": "gemma2", "sliding_window": 32, "num_hidden_layers": 3})"),
              ElementsAre(32, 0, 32));
  EXPECT_THAT(windows(R"({"model_type": "gemma2", "layer_types": ["full_attention", "full_attention"]})"),
              ElementsAre(0, 0));
}

// Qwen2.5's way to 128k tokens, DeepSeek's fields, and Phi-3's, in both spellings.
TEST(ModelConfig, ReadsScaledRope) {
  auto config = Read(Patched(R"({"model_type": "qwen2", "rope_parameters": null, "rope_scaling":
      {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}})"));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope.type, "yarn");
  EXPECT_NEAR(config->rope.attention_factor, 0.1 * std::log(4.0) + 1, 1e-12);
  EXPECT_EQ(config->rope.original_max_position_embeddings, 32768);
  config = Read(Patched(R"({"rope_parameters": {"rope_type": "yarn", "factor": 40, "mscale": 1.0,
      "mscale_all_dim": 0.5, "beta_fast": 16, "truncate": false}})"));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_NEAR(config->rope.attention_factor, (0.1 * std::log(40.0) + 1) / (0.05 * std::log(40.0) + 1), 1e-12);
  EXPECT_EQ(config->rope.original_max_position_embeddings, 64);  // max_position_embeddings
  EXPECT_EQ(config->rope.beta_fast, 16);
  EXPECT_FALSE(config->rope.truncate);
  config = Read(Patched(R"({"rope_scaling": {"type": "dynamic", "factor": 2}})"));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope.SharedAnglesUpTo(), 64);
  for (const char* type : {"longrope", "su", "yarn"}) {
    json phi3 = Patched(R"({"model_type": "phi3", "original_max_position_embeddings": 16,
        "rope_parameters": null, "rope_scaling": {"short_factor": [1, 1.5], "long_factor": [2, 3]}})");
    phi3["rope_scaling"]["type"] = type;
    config = Read(phi3);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->rope.type, "longrope");
    EXPECT_THAT(config->rope.long_factor, ElementsAre(2, 3));
    EXPECT_NEAR(config->rope.attention_factor, std::sqrt(1 + std::log(4.0) / std::log(16.0)), 1e-12);
    EXPECT_EQ(config->rope.SharedAnglesUpTo(), 16);
  }
  config = Read(Patched(R"({"model_type": "phi3", "partial_rotary_factor": 0.5})"));
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->RotaryPairs(), 1);
}

struct Refusal {
  const char* patch;
  const char* field;    // that the message names
  const char* problem;  // and what it says of it
};

class ModelConfigRefuses : public testing::TestWithParam<Refusal> {};

TEST_P(ModelConfigRefuses, WithFileFieldAndProblem) {
  const auto config = Read(Patched(GetParam().patch));
  ASSERT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument) << GetParam().patch;
  EXPECT_THAT(std::string(config.status().message()),
              AllOf(HasSubstr("config.json: "), HasSubstr(GetParam().field), HasSubstr(GetParam().problem)));
}

INSTANTIATE_TEST_SUITE_P(
    BadFields, ModelConfigRefuses,
    testing::Values(
        Refusal{R"({"model_type": "gpt2"})", "model_type", "supported are llama, mistral, qwen2"},
        Refusal{R"({"model_type": null})", "model_type", "is missing"},
        Refusal{R"({"hidden_size": null})", "hidden_size", "is missing"},
        Refusal{R"({"hidden_size": "12"})", "hidden_size", "whole number"},
        Refusal{R"({"hidden_size": 12.5})", "hidden_size", "whole number"},
        Refusal{R"({"hidden_size": -12})", "hidden_size", "-12 is not within"},
        Refusal{R"({"vocab_size": 18446744073709551615})", "vocab_size", "is not within"},
        Refusal{R"({"vocab_size": 4611686018427387904})", "vocab_size", "is not within"},
        Refusal{R"({"num_hidden_layers": 1000000})", "num_hidden_layers", "is not within"},
        Refusal{R"({"num_hidden_layers": 0})", "num_hidden_layers", "is not within"},
        Refusal{R"({"num_key_value_heads": 2})", "num_key_value_heads", "does not divide"},
        Refusal{R"({"num_key_value_heads": 6})", "num_key_value_heads", "is not within 1 to 3"},
        Refusal{R"({"head_dim": null, "num_attention_heads": 5, "num_key_value_heads": 5})", "num_attention_heads",
                "does not divide hidden_size"},
        Refusal{R"({"head_dim": 5})", "head_dim", "odd"}, Refusal{R"({"rms_norm_eps": 0})", "rms_norm_eps", "above 0"},
        Refusal{R"({"tie_word_embeddings": "yes"})", "tie_word_embeddings", "true or false"},
        Refusal{R"({"hidden_act": "gelu"})", "hidden_act", "'gelu' is not supported"},
        Refusal{R"({"dtype": "float8_e4m3fn"})", "dtype", "'float8_e4m3fn' is not supported"},
        Refusal{R"({"quantization_config": {"bits": 4}})", "quantization_config", "original"},
        Refusal{R"({"rope_parameters": {"rope_type": "yarn"}})", "factor", "is missing"},
        Refusal{R"({"rope_parameters": {"rope_type": "longrope"}})", "rope_type", "'longrope'"},
        Refusal{R"({"rope_parameters": {"rope_type": "mrope"}})", "rope_type", "'mrope'"},
        Refusal{R"({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2}})", "rope_type", "'linear'"},
        Refusal{R"({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1],
                    "long_factor": [1, 2]}})",
                "short_factor", "2 rotated pairs"},
        Refusal{R"({"model_type": "phi3", "rope_scaling": {"type": "longrope", "short_factor": [1, "x"],
                    "long_factor": [1, 2]}})",
                "short_factor", "above 0"},
        Refusal{R"({"model_type": "phi3", "partial_rotary_factor": 1.5})", "partial_rotary_factor", "above 1"},
        Refusal{R"({"model_type": "phi3", "partial_rotary_factor": 0.1})", "partial_rotary_factor", "nothing"},
        Refusal{R"({"rope_scaling": {"type": "linear"}})", "factor", "is missing"},
        Refusal{R"({"rope_scaling": {"rope_type": "llama3", "factor": 8}})", "low_freq_factor", "is missing"},
        Refusal{R"({"rope_scaling": [1]})", "rope_scaling", "JSON object"},
        Refusal{R"({"rope_parameters": {"full_attention": {"rope_type": "default"}}})", "full_attention",
                "not supported"},
        Refusal{R"({"partial_rotary_factor": 0.5})", "partial_rotary_factor", "only 1"},
        Refusal{R"({"model_type": "mistral", "sliding_window": 0})", "sliding_window", "is not within"},
        Refusal{R"({"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]})", "layer_types",
                "not supported for mistral"},
        Refusal{R"({"layer_types": ["full_attention", "sliding_attention"]})", "layer_types", "sliding_attention"},
        Refusal{R"({"model_type": "qwen2", "layer_types": ["full_attention"]})", "layer_types", "1 entries for 2"},
        Refusal{R"({"model_type": "qwen3", "layer_types": ["full_attention", "chunked_attention"]})", "layer_types",
                "chunked_attention"},
        Refusal{R"({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]})", "sliding_window",
                "layer 1 has sliding attention"},
        Refusal{R"({"model_type": "gemma2", "hidden_activation": "gelu"})", "hidden_activation", "'gelu'"},
        Refusal{R"({"model_type": "gemma2", "attn_logit_softcapping": -1})", "attn_logit_softcapping", "above 0"},
        Refusal{R"({"model_type": "gemma", "use_bidirectional_attention": true})", "use_bidirectional_attention",
                "causal"},
        Refusal{R"({"model_type": "gemma2", "num_key_value_heads": null})", "num_key_value_heads", "is missing"},
        Refusal{R"({"model_type": "mistral", "num_key_value_heads": null})", "num_key_value_heads", "is missing"},
        Refusal{R"({"pad_token_id": 37})", "pad_token_id", "is not within"},
        Refusal{R"({"eos_token_id": [2, "x"]})", "eos_token_id", "token ids below 37"}));

TEST(ModelConfig, RefusesWhatIsNoConfig) {
  const TempDir dir;
  EXPECT_EQ(ReadModelConfig(dir.path()).status().code(), absl::StatusCode::kNotFound);
  for (const std::string& text :
       {std::string(), std::string("[]"), std::string("{\"a\": "), "{\"a\": " + std::string(100000, '[')}) {
    WriteText(dir / "config.json", text);
    const absl::Status status = ReadModelConfig(dir.path()).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << text.substr(0, 20);
    EXPECT_THAT(std::string(status.message()), HasSubstr("config.json"));
  }
}

// Whatever bytes stand in the file: an answer, and sizes that later arithmetic can bear.
TEST(ModelConfig, SurvivesDamagedBytes) {
  const TempDir dir;
  std::mt19937 random(1);
  const std::string good = TinyConfigJson().dump();
  int accepted = 0;
  for (int round = 0; round < 2000; ++round) {
    std::string text = good;
    for (int i = 0; i < 3; ++i) text[random() % text.size()] = "09-{}[]\",:eE.a"[random() % 14];
    WriteText(dir / "config.json", text);
    const auto config = ReadModelConfig(dir.path());
    if (!config.ok()) continue;
    ++accepted;
    EXPECT_GT(config->NumParameters(), 0);
    EXPECT_LT(config->NumParameters(), int64_t{1} << 56);
  }
  EXPECT_GT(accepted, 0);
  EXPECT_LT(accepted, 2000);
}

TEST(ModelWeights, NamesEveryTensorOnceInBucketOrder) {
  ModelConfig config = TinyConfig();
  config.num_layers = 1;
  std::vector<std::string> names;
  for (const WeightSpec& spec : ModelWeights(config)) names.push_back(spec.name);
  const std::string layer = "model.layers.0.";
  EXPECT_THAT(names, ElementsAre("model.embed_tokens.weight", layer + "input_layernorm.weight",
                                 layer + "self_attn.q_proj.weight", layer + "self_attn.k_proj.weight",
                                 layer + "self_attn.v_proj.weight", layer + "self_attn.o_proj.weight",
                                 layer + "post_attention_layernorm.weight", layer + "mlp.gate_proj.weight",
                                 layer + "mlp.up_proj.weight", layer + "mlp.down_proj.weight", "model.norm.weight",
                                 "lm_head.weight"));
  config.tie_word_embeddings = true;
  EXPECT_EQ(ModelWeights(config).back().name, "model.norm.weight");
}

// The names of one layer's tensors, as each family's files have them.
TEST(ModelWeights, FamiliesHaveTheirOwnNames) {
  const auto layer = [](const char* patch) {
    const ModelConfig config = Read(Patched(patch)).value();
    std::vector<std::string> names;
    const std::string prefix = "model.layers.1.";
    for (const WeightSpec& spec : ModelWeights(config)) {
      if (spec.name.starts_with(prefix)) names.push_back(spec.name.substr(prefix.size()));
    }
    return names;
  };
  EXPECT_THAT(layer(R"({"model_type": "phi3"})"),
              ElementsAre("input_layernorm.weight", "self_attn.qkv_proj.weight", "self_attn.o_proj.weight",
                          "post_attention_layernorm.weight", "mlp.gate_up_proj.weight", "mlp.down_proj.weight"));
  EXPECT_THAT(layer(R"({"model_type": "olmo2"})"),
              ElementsAre("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight",
                          "self_attn.q_norm.weight", "self_attn.k_norm.weight", "self_attn.o_proj.weight",
                          "post_attention_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
                          "mlp.down_proj.weight", "post_feedforward_layernorm.weight"));
  EXPECT_THAT(layer(R"({"model_type": "gemma2"})"),
              ElementsAre("input_layernorm.weight", "self_attn.q_proj.weight", "self_attn.k_proj.weight",
                          "self_attn.v_proj.weight", "self_attn.o_proj.weight", "post_attention_layernorm.weight",
                          "pre_feedforward_layernorm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
                          "mlp.down_proj.weight", "post_feedforward_layernorm.weight"));
  EXPECT_THAT(layer(R"({"model_type": "qwen2"})"),
              testing::IsSupersetOf({"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"}));
}

TEST(ModelWeights, ShapesDecayAndBiases) {
  ModelConfig config = TinyConfig();
  config.qkv_bias = config.output_bias = true;
  config.mlp_bias = true;
  int biases = 0;
  for (const WeightSpec& spec : ModelWeights(config)) {
    biases += spec.name.ends_with(".bias") ? 1 : 0;
    EXPECT_EQ(spec.decay, spec.shape.size() == 2) << spec.name;  // neither norms nor biases
    if (spec.name == "model.layers.1.self_attn.k_proj.weight") {
      EXPECT_THAT(spec.shape, ElementsAre(4, 12));
      EXPECT_EQ(spec.layer, 1);
    }
    if (spec.name == "model.layers.1.mlp.down_proj.weight") {
      EXPECT_THAT(spec.shape, ElementsAre(12, 20));
    }
  }
  EXPECT_EQ(biases, 2 * 7);
}

}  // namespace
}  // namespace simpo
