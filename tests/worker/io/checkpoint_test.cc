#include "worker/shard/checkpoint.h"

#include <ATen/ATen.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>

#include "common/sha256.h"
#include "tests/worker/io/saved_checkpoints.h"
#include "tests/worker/io/test_files.h"
#include "tests/worker/io/thread_collectives.h"
#include "tests/worker/io/tiny_model.h"
#include "worker/model/safetensors.h"
#include "worker/shard/agree_on.h"
#include "worker/shard/replace_folder.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Not;

// The status on each rank.
std::vector<absl::Status> LoadStatuses(const fs::path& path, const Layout& layout,
                                       const ModelConfig& config = TinyConfig()) {
  std::vector<absl::Status> statuses(layout.ranks);
  ThreadWorld::Run(layout.ranks, [&](Collectives& comm) {
    ShardedParams params(config, layout.Sharding(), comm);
    statuses[comm.rank()] = LoadCheckpoint(path, params, comm).status();
  });
  return statuses;
}

TEST(Checkpoint, IsResumedBitForBitOnAnyLayout) {
  std::vector<Layout> layouts;
  for (int ranks : {1, 2, 3, 4}) {
    layouts.push_back({ranks, 1, at::kFloat});
    layouts.push_back({ranks, 0, at::kBFloat16});
    layouts.push_back({ranks, 1, at::kBFloat16});
  }
  layouts.push_back({2, 0, at::kFloat});
  layouts.push_back({3, 2, at::kFloat});
  layouts.push_back({2, 3, at::kFloat});
  layouts.push_back({4, 3, at::kBFloat16});
  layouts.push_back({2, 2, at::kBFloat16, true});
  layouts.push_back({3, 3, at::kFloat, true});
  for (const Layout& from : layouts) {
    const TempDir dir;
    Save(dir.path(), 7, from);
    for (const Layout& to : layouts) {
      SCOPED_TRACE(testing::Message() << from.ranks << " ranks, stage " << from.zero_stage << " to " << to.ranks
                                      << ", stage " << to.zero_stage << (to.offload ? ", offload" : ""));
      ExpectLoads(dir / "step-000007", to);
    }
  }
}

TEST(Checkpoint, KeepsTheTrainersState) {
  const TempDir dir;
  Save(dir.path(), 7, {.ranks = 2});
  const auto manifest = ReadManifest(dir / "step-000007");
  ASSERT_TRUE(manifest.ok()) << manifest.status();
  const TrainerState& state = manifest->state;
  EXPECT_EQ(state.step, 7);
  EXPECT_EQ(state.steps_planned, 120);
  EXPECT_EQ(state.global_batch_size, 8);
  EXPECT_EQ(state.pairs_seen, 56);
  EXPECT_EQ(state.tokens_seen, 12345678901);
  EXPECT_EQ(state.seed, -42);
  EXPECT_EQ(state.extra.at("best"), 0.1 + 0.2);
  EXPECT_EQ(state.extra.at("tiny"), std::numeric_limits<double>::denorm_min());
  EXPECT_TRUE(std::isnan(state.extra.at("nan")));
  EXPECT_EQ(state.extra.at("inf"), -std::numeric_limits<double>::infinity());
}

// The rules of docs/checkpoint_format.md, followed without our reader of manifests.
TEST(Checkpoint, IsLaidOutAsDocumented) {
  const TempDir dir;
  Save(dir.path(), 120, {.ranks = 2});
  const fs::path path = dir / "step-000120";
  EXPECT_THAT(NamesIn(dir.path()), ElementsAre("step-000120"));
  EXPECT_THAT(NamesIn(path),
              ElementsAre("manifest.json", "shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors"));
  std::string text = ReadText(path / "manifest.json");
  const auto manifest = nlohmann::json::parse(text);
  const std::string digest = manifest["manifest_sha256"];
  EXPECT_EQ(Sha256(text.replace(text.rfind(digest), 64, std::string(64, '0'))), digest);
  EXPECT_EQ(manifest["zero_stage"], 1);
  EXPECT_EQ(manifest["world_size"], 2);

  // Every tensor is put together from the shards by name, bucket and offset.
  std::vector<std::unique_ptr<SafetensorsFile>> shards;
  for (const auto& file : manifest["files"]) {
    const fs::path name = path / file["name"].get<std::string>();
    EXPECT_EQ(fs::file_size(name), file["bytes"]);
    EXPECT_EQ(*Sha256OfFile(name), file["sha256"]);
    shards.push_back(*SafetensorsFile::Open(name));
  }
  size_t tensors = 0;
  for (size_t b = 0; b < manifest["buckets"].size(); ++b) {
    const auto& bucket = manifest["buckets"][b];
    for (size_t s = 0; s < bucket["slots"].size(); ++s) {
      const auto& slot = bucket["slots"][s];
      int64_t numel = 1;
      for (int64_t size : slot["shape"]) numel *= size;
      std::vector<at::Tensor> slices;
      for (const auto& shard : shards) {
        const auto* entry = shard->Find(bucket["name"].get<std::string>() + ".exp_avg_sq");
        ASSERT_NE(entry, nullptr);
        EXPECT_THAT(entry->shape, ElementsAre(bucket["shard_numel"].get<int64_t>()));
        slices.push_back(shard->View(*entry));
      }
      const at::Tensor whole = at::cat(slices).narrow(0, slot["offset"].get<int64_t>(), numel);
      EXPECT_TRUE(at::equal(whole, Values(numel, BaseOf(b, s, 2)))) << slot["name"];
      ++tensors;
    }
  }
  EXPECT_EQ(tensors, ModelWeights(TinyConfig()).size());
}

TEST(Checkpoint, OfAnotherModelNamesTheTensorAndBothShapes) {
  const TempDir dir;
  Save(dir.path(), 1, {.ranks = 2});
  ModelConfig wider = TinyConfig();
  wider.intermediate_size = 24;
  for (const absl::Status& status : LoadStatuses(dir / "step-000001", {.ranks = 2}, wider)) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()),
                AllOf(HasSubstr("model.layers.0.mlp.gate_proj.weight"), HasSubstr("[24, 12]"), HasSubstr("[20, 12]")));
  }
  ModelConfig tied = TinyConfig();
  tied.tie_word_embeddings = true;
  EXPECT_THAT(std::string(LoadStatuses(dir / "step-000001", {}, tied)[0].message()),
              AllOf(HasSubstr("lm_head.weight has shape [37, 12] in the checkpoint"),
                    HasSubstr("does not exist in the model")));
  ModelConfig deeper = TinyConfig();
  deeper.num_layers = 3;
  EXPECT_THAT(std::string(LoadStatuses(dir / "step-000001", {}, deeper)[0].message()),
              AllOf(HasSubstr("model.layers.2.input_layernorm.weight"), HasSubstr("does not exist in the checkpoint")));
}

TEST(Checkpoint, ADamagedShardIsAnErrorOnEveryRank) {
  const TempDir dir;
  Save(dir.path(), 1, {.ranks = 2});
  const fs::path shard = dir / "step-000001/shard-00001-of-00002.safetensors";
  const std::string good = ReadText(shard);
  for (size_t byte = 0; byte < good.size(); byte += good.size() / 40) {
    FlipBit(shard, byte);
    const auto statuses = LoadStatuses(dir / "step-000001", {.ranks = 3});
    for (const absl::Status& status : statuses) {
      EXPECT_EQ(status.code(), absl::StatusCode::kDataLoss) << status;
    }
    // Rank 1 checks this file; the others say who failed.
    EXPECT_THAT(std::string(statuses[1].message()), HasSubstr(shard.string()));
    EXPECT_THAT(std::string(statuses[0].message()), HasSubstr("failed on rank 1"));
    WriteText(shard, good);
  }
  fs::resize_file(shard, good.size() - 1);
  EXPECT_THAT(std::string(LoadStatuses(dir / "step-000001", {})[0].message()), HasSubstr(shard.string()));
  fs::remove(shard);
  EXPECT_THAT(std::string(LoadStatuses(dir / "step-000001", {})[0].message()), HasSubstr(shard.string()));
}

TEST(Checkpoint, EveryFlippedByteOfTheManifestIsNoticed) {
  const TempDir dir;
  Save(dir.path(), 1, {});
  const fs::path manifest = dir / "step-000001/manifest.json";
  const std::string good = ReadText(manifest);
  ASSERT_TRUE(ParseManifest(good, "good").ok());
  for (size_t byte = 0; byte < good.size(); ++byte) {
    std::string bad = good;
    bad[byte] = static_cast<char>(bad[byte] ^ (1 << byte % 8));
    EXPECT_EQ(ParseManifest(bad, "bad").status().code(), absl::StatusCode::kDataLoss) << byte;
  }
  FlipBit(manifest, good.size() / 2);
  EXPECT_THAT(std::string(ReadManifest(manifest.parent_path()).status().message()), HasSubstr(manifest.string()));
}

// Fields of the wrong kind behind a digest that fits: an answer, no crash.
TEST(Checkpoint, AManifestOfOtherFieldsIsRefused) {
  const TempDir dir;
  Save(dir.path(), 1, {});
  const fs::path path = dir / "step-000001";
  const auto good = nlohmann::ordered_json::parse(ReadText(path / "manifest.json"));
  const auto write = [&](nlohmann::ordered_json json) {
    json["manifest_sha256"] = std::string(64, '0');
    std::string text = json.dump(1) + "\n";
    WriteText(path / "manifest.json", text.replace(text.rfind(std::string(64, '0')), 64, Sha256(text)));
  };
  write(good);
  ASSERT_TRUE(ReadManifest(path).ok());  // so that what follows fails for its own reason
  for (const auto& [key, value] : good.items()) {
    if (key == "manifest_sha256") continue;
    for (const nlohmann::ordered_json& bad :
         {nlohmann::ordered_json(nullptr), nlohmann::ordered_json("x"), nlohmann::ordered_json({{"name", 5}}),
          nlohmann::ordered_json::array({1, "x"}), nlohmann::ordered_json(-1.5e300)}) {
      auto json = good;
      json[key] = bad;
      // An object is a right type for extra, but not with... a number in it: skip that one pair.
      if (key == "extra" && bad.is_object()) continue;
      write(json);
      EXPECT_EQ(ReadManifest(path).status().code(), absl::StatusCode::kDataLoss) << key << " = " << bad;
    }
  }
  auto elsewhere = good;
  elsewhere["files"][0]["name"] = "../../etc/passwd";
  write(elsewhere);
  EXPECT_THAT(std::string(ReadManifest(path).status().message()), HasSubstr("name"));
}

TEST(LatestCheckpoint, SkipsWhatIsNotWholeAndSaysWhy) {
  const TempDir dir;
  for (int64_t step : {1, 2, 3, 4, 5}) Save(dir.path(), step, {.ranks = 2});
  fs::remove(dir / "step-000005/manifest.json");
  fs::resize_file(dir / "step-000004/shard-00000-of-00002.safetensors", 100);
  FlipBit(dir / "step-000003/shard-00001-of-00002.safetensors", 3000);
  fs::copy(dir / "step-000001", dir / "step-000009.partial");
  fs::create_directory(dir / "step-x");
  std::vector<std::string> skipped;
  const auto latest = LatestCheckpoint(dir.path(), &skipped);
  ASSERT_TRUE(latest.ok()) << latest.status();
  EXPECT_EQ(*latest, dir / "step-000002");
  EXPECT_THAT(skipped, ElementsAre(HasSubstr("step-000005/manifest.json"),
                                   HasSubstr("step-000004/shard-00000-of-00002.safetensors"),
                                   HasSubstr("step-000003/shard-00001-of-00002.safetensors")));
}

TEST(LatestCheckpoint, OrdersBySteps) {
  const TempDir dir;
  for (int64_t step : {999999, 1000000, 20}) Save(dir.path(), step, {});
  EXPECT_EQ(**LatestCheckpoint(dir.path(), nullptr), dir / "step-1000000");
}

TEST(LatestCheckpoint, IsNothingWhereThereIsNothing) {
  const TempDir dir;
  std::vector<std::string> skipped;
  for (const fs::path& path : {dir.path(), dir / "none"}) {
    const auto latest = LatestCheckpoint(path, &skipped);
    ASSERT_TRUE(latest.ok()) << latest.status();
    EXPECT_FALSE(latest->has_value());
  }
  EXPECT_THAT(skipped, IsEmpty());
  WriteText(dir / "file", "");  // a folder that cannot be listed is no reason to start again
  EXPECT_FALSE(LatestCheckpoint(dir / "file", nullptr).ok());
}

TEST(SaveCheckpoint, ReplacesOneOfTheSameStepAndClearsLeftovers) {
  const TempDir dir;
  Save(dir.path(), 5, {.ranks = 3});
  fs::create_directory(dir / "step-000004.partial");
  fs::create_directory(dir / "step-000005.old");
  Save(dir.path(), 5, {.ranks = 2}, 0.5);
  EXPECT_THAT(NamesIn(dir.path()), ElementsAre("step-000005"));
  ExpectLoads(dir / "step-000005", {.ranks = 1}, 0.5);
}

TEST(SaveCheckpoint, ACrashBetweenItsRenamesLosesNothing) {
  const TempDir dir;
  Save(dir.path(), 5, {.ranks = 2});
  fs::rename(dir / "step-000005", dir / "step-000005.old");
  fs::create_directory(dir / "step-000005.partial");
  EXPECT_EQ(**LatestCheckpoint(dir.path(), nullptr), dir / "step-000005.old");
  ExpectLoads(dir / "step-000005.old", {.ranks = 2});
  ASSERT_TRUE(PruneCheckpoints(dir.path(), 1, {}).ok());
  EXPECT_TRUE(fs::exists(dir / "step-000005.old"));
  Save(dir.path(), 5, {.ranks = 2}, 0.5);
  EXPECT_EQ(**LatestCheckpoint(dir.path(), nullptr), dir / "step-000005");
}

TEST(SaveCheckpoint, AnErrorOnRankZeroIsAnErrorOnAll) {
  const TempDir dir;
  WriteText(dir / "file", "");
  std::vector<absl::Status> statuses(3);
  ThreadWorld::Run(3, [&](Collectives& comm) {
    ShardedParams params(TinyConfig(), ShardingOptions(), comm);
    statuses[comm.rank()] = SaveCheckpoint(dir / "file/x", params, SomeState(1), comm).status();
  });
  EXPECT_THAT(std::string(statuses[0].message()), HasSubstr("file/x/step-000001"));
  for (int rank : {1, 2}) {
    EXPECT_EQ(statuses[rank].code(), statuses[0].code());
    EXPECT_THAT(std::string(statuses[rank].message()), HasSubstr("failed on rank 0"));
  }
}

// A rank whose shard cannot be written: the folder it should go to is taken from under it.
TEST(SaveCheckpoint, AnErrorOnAnotherRankIsAnErrorOnAllAndLeavesNothing) {
  const TempDir dir;
  Save(dir.path(), 1, {.ranks = 2});
  std::vector<absl::Status> statuses(2);
  ThreadWorld::Run(2, [&](Collectives& comm) {
    ShardedParams params(TinyConfig(), ShardingOptions(), comm);
    // Rank 1 looks for the folder elsewhere, as if the file system were not shared.
    const fs::path seen = comm.rank() == 0 ? dir.path() : dir / "elsewhere";
    statuses[comm.rank()] = SaveCheckpoint(seen, params, SomeState(2), comm).status();
  });
  EXPECT_THAT(std::string(statuses[1].message()),
              HasSubstr("elsewhere/step-000002.partial/shard-00001-of-00002.safetensors"));
  EXPECT_THAT(std::string(statuses[0].message()), HasSubstr("failed on rank 1"));
  EXPECT_THAT(NamesIn(dir.path()), ElementsAre("step-000001"));
}

TEST(PruneCheckpoints, KeepsTheNewestAndTheProtected) {
  const TempDir dir;
  for (int64_t step : {10, 20, 30, 40, 50}) Save(dir.path(), step, {});
  ASSERT_TRUE(PruneCheckpoints(dir.path(), 0, {}).ok());
  EXPECT_EQ(NamesIn(dir.path()).size(), 5U);
  const std::vector<fs::path> best = {dir.path() / "." / "step-000010"};
  ASSERT_TRUE(PruneCheckpoints(dir.path(), 2, best).ok());
  // The protected one counts, as in transformers.
  EXPECT_THAT(NamesIn(dir.path()), ElementsAre("step-000010", "step-000050"));
  const std::vector<fs::path> both = {dir / "step-000010", dir / "step-000050"};
  ASSERT_TRUE(PruneCheckpoints(dir.path(), 1, both).ok());
  EXPECT_EQ(NamesIn(dir.path()).size(), 2U);
}

TEST(AgreeOn, GivesTheFirstFailuresCode) {
  std::vector<absl::Status> statuses(4);
  ThreadWorld::Run(4, [&](Collectives& comm) {
    absl::Status mine;
    if (comm.rank() == 1) mine = absl::ResourceExhaustedError("disk full");
    if (comm.rank() == 3) mine = absl::DataLossError("damaged");
    statuses[comm.rank()] = AgreeOn(mine, comm, "saving");
  });
  for (int rank : {0, 2}) {
    EXPECT_EQ(statuses[rank].code(), absl::StatusCode::kResourceExhausted);
    EXPECT_THAT(std::string(statuses[rank].message()), HasSubstr("saving failed on rank 1"));
  }
  EXPECT_EQ(statuses[1].message(), "disk full");
  EXPECT_EQ(statuses[3].message(), "damaged");
}

TEST(ReplaceFolder, RemovesUnderAnotherName) {
  const TempDir dir;
  fs::create_directories(dir / "a/b");
  ASSERT_TRUE(RemoveFolder(dir / "a").ok());
  EXPECT_THAT(NamesIn(dir.path()), IsEmpty());
  EXPECT_TRUE(RemoveFolder(dir / "a").ok());
}

}  // namespace
}  // namespace simpo
