#include "worker/shard/export_hf.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "tests/worker/io/saved_checkpoints.h"
#include "tests/worker/io/test_files.h"
#include "tests/worker/io/thread_collectives.h"
#include "tests/worker/io/tiny_model.h"
#include "worker/shard/checkpoint_writer.h"
#include "worker/shard/load_weights.h"

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

// The bytes of the file are those of a writer that has the whole model at once.
TEST_F(ExportHfTest, StreamsTheSameBytesFromEveryStage) {
  ASSERT_TRUE(Export(1, at::kBFloat16, "{{ messages }}")[0].ok());
  std::vector<std::pair<std::string, at::Tensor>> whole;
  for (const WeightSpec& spec : ModelWeights(TinyConfig())) whole.emplace_back(spec.name, weights_[spec.name]);
  ASSERT_TRUE(WriteSafetensors(dir_ / "whole", whole, {{"format", "pt"}}).ok());
  const std::string expected = ReadText(dir_ / "whole");
  EXPECT_TRUE(ReadText(dir_ / "final/model.safetensors") == expected);
  fs::create_directories(dir_ / "model");
  ASSERT_TRUE(WriteSafetensors(dir_ / "model/model.safetensors", whole, {}).ok());
  for (const int stage : {0, 1, 2, 3}) {
    for (const int ranks : {1, 2, 3}) {
      SCOPED_TRACE(testing::Message() << ranks << " ranks, stage " << stage);
      ThreadWorld::Run(ranks, [&](Collectives& comm) {
        ShardedParams params(TinyConfig(),
                             {.compute_dtype = at::kBFloat16, .zero_stage = stage, .poison_released = true}, comm);
        ASSERT_TRUE(LoadWeights(**ModelWeightsReader::Open(dir_ / "model"), params).ok());
        ASSERT_TRUE(ExportHf(dir_ / "final", params, TinyConfig(), dir_ / "model", dir_ / "tokenizer", "", comm).ok());
        int64_t largest = 0;
        for (const Bucket& bucket : params.buckets()) largest = std::max(largest, bucket.numel * 2);
        EXPECT_LE(params.MemoryBytes().peak_gathered, stage < 3 ? 0 : largest);
      });
      EXPECT_TRUE(ReadText(dir_ / "final/model.safetensors") == expected);
    }
  }
}

// From checkpoints of any layout: the bytes that the run itself would export.
TEST_F(ExportHfTest, ACheckpointBecomesTheSameFolder) {
  const HfFiles files = *ReadHfFiles(dir_ / "model", dir_ / "tokenizer", "{{ messages }}", at::kBFloat16);
  for (const int ranks : {1, 3}) {
    for (const int64_t max_file_bytes : {int64_t{4000}, kMaxExportFileBytes}) {
      SCOPED_TRACE(testing::Message() << ranks << " ranks, files of " << max_file_bytes);
      const fs::path checkpoints = dir_ / "checkpoints";
      fs::remove_all(checkpoints);
      fs::remove_all(dir_ / "exported");
      ThreadWorld::Run(ranks, [&](Collectives& comm) {
        const Layout layout{.zero_stage = 3, .dtype = at::kBFloat16};
        ShardedParams params(TinyConfig(), layout.Sharding(), comm);
        Fill(params, comm.rank(), 0.5);
        ASSERT_TRUE(ExportHf(dir_ / "final", params, TinyConfig(), dir_ / "model", dir_ / "tokenizer", "{{ messages }}",
                             comm, max_file_bytes)
                        .ok());
        CheckpointWriter writer({.checkpoints_dir = checkpoints, .hf_files = files}, comm);
        ASSERT_TRUE(writer.Begin(params, SomeState(7), true).ok());
        ASSERT_TRUE(writer.Finish().ok());
      });
      fs::rename(dir_ / "model", dir_ / "away");  // nothing else is needed
      const absl::Status status = ExportCheckpoint(checkpoints / "step-000007", dir_ / "exported", max_file_bytes);
      fs::rename(dir_ / "away", dir_ / "model");
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(NamesIn(dir_ / "exported"), NamesIn(dir_ / "final"));
      for (const std::string& name : NamesIn(dir_ / "final")) {
        EXPECT_TRUE(ReadText(dir_ / "exported" / name) == ReadText(dir_ / "final" / name)) << name;
      }
    }
  }
  // It never writes over anything, and says what is wrong with a checkpoint.
  EXPECT_THAT(std::string(ExportCheckpoint(dir_ / "checkpoints/step-000007", dir_ / "exported").message()),
              HasSubstr("is there already"));
  EXPECT_EQ(ExportCheckpoint(dir_ / "none", dir_ / "other").code(), absl::StatusCode::kNotFound);
  Save(dir_ / "bare", 1, {});
  EXPECT_THAT(std::string(ExportCheckpoint(dir_ / "bare/step-000001", dir_ / "other").message()),
              HasSubstr("carries no config.json"));
  FlipBit(dir_ / "checkpoints/step-000007/shard-00002-of-00003.safetensors", 4000);
  EXPECT_EQ(ExportCheckpoint(dir_ / "checkpoints/step-000007", dir_ / "other").code(), absl::StatusCode::kDataLoss);
  EXPECT_FALSE(fs::exists(dir_ / "other"));
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
