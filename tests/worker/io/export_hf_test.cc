#include "worker/shard/export_hf.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/worker/io/test_files.h"
#include "tests/worker/io/thread_collectives.h"
#include "tests/worker/io/tiny_model.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using testing::ElementsAre;
using testing::HasSubstr;

class ExportHfTest : public testing::Test {
 protected:
  void SetUp() override {
    fs::create_directories(dir_ / "model");
    fs::create_directories(dir_ / "tokenizer");
    WriteText(dir_ / "model/config.json", TinyConfigJson().dump());
    WriteText(dir_ / "model/generation_config.json", R"({"eos_token_id": 2})");
    WriteText(dir_ / "tokenizer/tokenizer.json", R"({"version": "1.0"})");
    WriteText(dir_ / "tokenizer/tokenizer_config.json", R"({"chat_template": "old"})");
    WriteText(dir_ / "tokenizer/README.md", "not ours to copy");
  }

  // Exports random weights from `ranks` ranks; the statuses by rank.
  std::vector<absl::Status> Export(int ranks, at::ScalarType dtype, const std::string& chat_template,
                                   int64_t max_file_bytes = 5'000'000'000) {
    std::vector<absl::Status> statuses(ranks);
    at::manual_seed(1);
    weights_.clear();
    for (const WeightSpec& spec : ModelWeights(TinyConfig())) {
      weights_[spec.name] = at::randn(spec.shape).to(dtype);
    }
    ThreadWorld::Run(ranks, [&](Collectives& comm) {
      ShardedParams params(TinyConfig(), {.compute_dtype = dtype}, comm);
      for (auto& [name, tensor] : weights_) {
        at::Tensor weight = params.Find(name)->value();
        weight.copy_(tensor);
      }
      statuses[comm.rank()] = ExportHf(dir_ / "final", params, TinyConfig(), dir_ / "model", dir_ / "tokenizer",
                                       chat_template, comm, max_file_bytes);
    });
    return statuses;
  }

  void ExpectWeights() {
    const auto reader = ModelWeightsReader::Open(dir_ / "final");
    ASSERT_TRUE(reader.ok()) << reader.status();
    EXPECT_EQ((*reader)->Names().size(), weights_.size());
    for (const auto& [name, tensor] : weights_) {
      const auto stored = (*reader)->Get(name, tensor.sizes());
      ASSERT_TRUE(stored.ok()) << stored.status();
      EXPECT_TRUE(at::equal(*stored, tensor)) << name;
    }
  }

  TempDir dir_;
  std::map<std::string, at::Tensor> weights_;
};

TEST_F(ExportHfTest, WritesAFolderThatDescribesItself) {
  for (const absl::Status& status : Export(2, at::kBFloat16, "{{ messages }}")) {
    ASSERT_TRUE(status.ok()) << status;
  }
  const fs::path final = dir_ / "final";
  EXPECT_THAT(NamesIn(final), ElementsAre("chat_template.jinja", "config.json", "generation_config.json",
                                          "model.safetensors", "tokenizer.json", "tokenizer_config.json"));
  EXPECT_EQ(ReadText(final / "chat_template.jinja"), "{{ messages }}");
  EXPECT_EQ(ReadText(final / "tokenizer.json"), R"({"version": "1.0"})");
  json expected = TinyConfigJson();
  expected["dtype"] = "bfloat16";
  EXPECT_EQ(json::parse(ReadText(final / "config.json")), expected);
  EXPECT_EQ((*SafetensorsFile::Open(final / "model.safetensors"))->metadata().at("format"), "pt");
  ExpectWeights();
}

TEST_F(ExportHfTest, SaysTheDtypeInTheSourcesSpelling) {
  json config = TinyConfigJson();
  config.erase("dtype");
  config["torch_dtype"] = "bfloat16";
  WriteText(dir_ / "model/config.json", config.dump());
  ASSERT_TRUE(Export(1, at::kFloat, "")[0].ok());
  config["torch_dtype"] = "float32";
  EXPECT_EQ(json::parse(ReadText(dir_ / "final/config.json")), config);
  EXPECT_FALSE(fs::exists(dir_ / "final/chat_template.jinja"));
}

TEST_F(ExportHfTest, SplitsLargeModels) {
  const absl::Status status = Export(1, at::kFloat, "", /*max_file_bytes=*/4000)[0];
  ASSERT_TRUE(status.ok()) << status;
  ExpectWeights();
  const json index = json::parse(ReadText(dir_ / "final/model.safetensors.index.json"));
  int64_t bytes = 0;
  for (const auto& [name, tensor] : weights_) bytes += static_cast<int64_t>(tensor.nbytes());
  EXPECT_EQ(index["metadata"]["total_size"], bytes);
  std::set<std::string> files;
  for (const auto& [name, file] : index["weight_map"].items()) files.insert(file);
  EXPECT_GT(files.size(), 2U);
  EXPECT_FALSE(fs::exists(dir_ / "final/model.safetensors"));
  for (const std::string& name : files) {
    const auto file = SafetensorsFile::Open(dir_ / "final" / name);
    ASSERT_TRUE(file.ok()) << file.status();
    int64_t size = 0;
    for (const auto& entry : (*file)->entries()) size += static_cast<int64_t>(entry.end - entry.begin);
    EXPECT_LE(size, 4000) << name;
  }
}

TEST_F(ExportHfTest, ReplacesAnEarlierExport) {
  fs::create_directories(dir_ / "final");
  WriteText(dir_ / "final/stale", "");
  fs::create_directories(dir_ / "final.partial/half");
  ASSERT_TRUE(Export(1, at::kFloat, "")[0].ok());
  EXPECT_FALSE(fs::exists(dir_ / "final/stale"));
  EXPECT_THAT(NamesIn(dir_.path()), ElementsAre("final", "model", "tokenizer"));
}

TEST_F(ExportHfTest, AnErrorIsAnErrorOnAllRanksAndLeavesTheEarlierExport) {
  fs::create_directories(dir_ / "final");
  WriteText(dir_ / "final/earlier", "");
  json other = TinyConfigJson();
  other["num_hidden_layers"] = 1;
  WriteText(dir_ / "model/config.json", other.dump());
  const std::vector<absl::Status> statuses = Export(3, at::kFloat, "");
  EXPECT_THAT(std::string(statuses[0].message()), HasSubstr("model/config.json has changed since the run began"));
  for (int rank : {1, 2}) {
    EXPECT_EQ(statuses[rank].code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(statuses[rank].message()), HasSubstr("failed on rank 0"));
  }
  EXPECT_THAT(NamesIn(dir_ / "final"), ElementsAre("earlier"));
  EXPECT_FALSE(fs::exists(dir_ / "final.partial"));
  fs::remove(dir_ / "model/config.json");
  EXPECT_EQ(Export(1, at::kFloat, "")[0].code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace simpo
