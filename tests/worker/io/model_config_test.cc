#include "worker/model/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "tests/worker/io/test_files.h"
#include "tests/worker/io/tiny_model.h"

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

TEST(ModelConfig, MistralNeedsAWindowThatCoversEverything) {
  constexpr const char* kAllowed[] = {R"({"model_type": "mistral", "sliding_window": 64})",
                                      R"({"model_type": "mistral"})"};  // absent: 4096
  for (const char* patch : kAllowed) EXPECT_TRUE(Read(Patched(patch)).ok()) << patch;
  json none = Patched(R"({"model_type": "mistral", "max_position_embeddings": 32768})");
  none["sliding_window"] = nullptr;
  EXPECT_TRUE(Read(none).ok());
  none.erase("sliding_window");
  EXPECT_THAT(std::string(Read(none).status().message()), HasSubstr("sliding_window"));
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
        Refusal{R"({"model_type": "gpt2"})", "model_type", "supported are llama, mistral"},
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
        Refusal{R"({"rope_parameters": {"rope_type": "yarn"}})", "rope_type", "'yarn'"},
        Refusal{R"({"rope_scaling": {"type": "dynamic", "factor": 2}})", "rope_type", "'dynamic'"},
        Refusal{R"({"rope_scaling": {"type": "linear"}})", "factor", "is missing"},
        Refusal{R"({"rope_scaling": {"rope_type": "llama3", "factor": 8}})", "low_freq_factor", "is missing"},
        Refusal{R"({"rope_scaling": [1]})", "rope_scaling", "JSON object"},
        Refusal{R"({"rope_parameters": {"full_attention": {"rope_type": "default"}}})", "full_attention",
                "not supported"},
        Refusal{R"({"partial_rotary_factor": 0.5})", "partial_rotary_factor", "only 1"},
        Refusal{R"({"model_type": "mistral", "sliding_window": 32})", "sliding_window", "32"},
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

TEST(ModelWeights, ShapesDecayAndBiases) {
  ModelConfig config = TinyConfig();
  config.attention_bias = true;
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
