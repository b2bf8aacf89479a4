#include "worker/data/hub.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>

namespace simpo {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using Names = std::vector<std::string>;

constexpr char kCommit[] = "0123456789abcdef0123456789abcdef01234567";

Names Split(const Names& files, std::string_view readme, const std::string& config, const std::string& split) {
  absl::StatusOr<Names> names = SplitFiles(files, readme, config, split);
  EXPECT_TRUE(names.ok()) << names.status();
  return names.ok() ? *names : Names{"an error"};
}

TEST(HubId, IsOwnerSlashName) {
  for (const char* id : {"org/name", "Qwen/Qwen2.5-0.5B", "mistralai/Mistral-7B-v0.1", "a/b_c"}) {
    EXPECT_TRUE(IsHubId(id)) << id;
  }
  for (const char* id : {"name", "/abs/path", "a/b/c", "./x", "../x", "a/", "/b", "a/b c", "a/..", "a/b--c", "~/m",
                         "a/.b", "a/b?x=1", ""}) {
    EXPECT_FALSE(IsHubId(id)) << id;
  }
}

TEST(HubDataset, MayNameARevision) {
  for (const char* name : {"org/name", "org/name@main", "org/name@refs/pr/3"}) {
    EXPECT_TRUE(IsHubDataset(name)) << name;
  }
  for (const char* name : {"name@main", "/abs/path@main", "@main", "a/b/c@main"})
    EXPECT_FALSE(IsHubDataset(name)) << name;
}

TEST(HubSplitFiles, AreThoseWithTheSplitsName) {
  const Names files = {"README.md",
                       "data/train-00000-of-00002.parquet",
                       "data/train-00001-of-00002.parquet",
                       "data/train_sft-00000-of-00001.parquet",
                       "data/test-00000-of-00001.parquet",
                       "data/train-extra/notes.txt"};
  EXPECT_THAT(Split(files, "", "", "train"), ElementsAre(files[1], files[2]));
  EXPECT_THAT(Split(files, "", "", "train_sft"), ElementsAre(files[3]));
  EXPECT_THAT(Split(files, "# no front matter", "", "validation"), IsEmpty());
}

TEST(HubSplitFiles, OfSeveralFormsOneIsTaken) {
  EXPECT_THAT(Split({"train.csv", "train.jsonl", "train.parquet"}, "", "", "train"), ElementsAre("train.parquet"));
  EXPECT_THAT(Split({"train.csv", "train.jsonl"}, "", "", "train"), ElementsAre("train.jsonl"));
  EXPECT_THAT(Split({"train.json", "train.jsonl.gz"}, "", "", "train"), ElementsAre("train.jsonl.gz"));
}

TEST(HubSplitFiles, FoldersOfAConfigurationAndOfASplit) {
  const Names files = {"main/train/0000.parquet", "main/train/0001.parquet", "other/train/0000.parquet",
                       "data/third/train-0.jsonl", "train/x.parquet"};
  EXPECT_THAT(Split(files, "", "main", "train"), ElementsAre(files[0], files[1]));
  EXPECT_THAT(Split(files, "", "third", "train"), ElementsAre(files[3]));
  EXPECT_THAT(Split(files, "", "", "train"), ElementsAre(files[4]));
  EXPECT_THAT(Split(files, "", "nil", "train"), IsEmpty());
}

TEST(HubSplitFiles, OneFileWithoutASplitsNameIsTheTrainingSplit) {
  const Names files = {"dataset_infos.json", "README.md", "pairs.jsonl"};
  EXPECT_THAT(Split(files, "", "", "train"), ElementsAre("pairs.jsonl"));
  EXPECT_THAT(Split(files, "", "", "test"), IsEmpty());
  EXPECT_THAT(Split({"a.jsonl", "b.jsonl"}, "", "", "train"), IsEmpty());
}

TEST(HubSplitFiles, ReadmeDecides) {
  const Names files = {"en/rows-1.jsonl", "en/rows-2.jsonl", "en/held_out.jsonl", "de/deep/er/rows.jsonl",
                       "train.jsonl"};
  const std::string readme = R"(---
license: mit
configs:
- config_name: en
  default: true
  data_dir: en
  data_files:
  - split: train
    path: ["rows-*.jsonl"]
  - split: test
    path: held_out.jsonl
- config_name: de
  data_files: de/**/*.jsonl
---
# A data set
)";
  EXPECT_THAT(Split(files, readme, "", "train"), ElementsAre(files[0], files[1]));
  EXPECT_THAT(Split(files, readme, "en", "test"), ElementsAre(files[2]));
  EXPECT_THAT(Split(files, readme, "de", "train"), ElementsAre(files[3]));
  EXPECT_THAT(Split(files, readme, "de", "test"), IsEmpty());
  EXPECT_THAT(SplitFiles(files, readme, "fr", "train").status().message(),
              HasSubstr("no configuration 'fr'; set dataset_configs to one of en, de"));
}

TEST(HubSplitFiles, SeveralConfigurationsWithoutADefault) {
  const std::string readme = "---\nconfigs:\n- config_name: a\n  data_files: a.csv\n- config_name: b\n---\n";
  EXPECT_THAT(SplitFiles({"a.csv"}, readme, "", "train").status().message(), HasSubstr("one of a, b"));
  const std::string one = "---\nconfigs:\n- config_name: a\n  data_files: a.csv\n---\n";
  EXPECT_THAT(Split({"a.csv"}, one, "", "train"), ElementsAre("a.csv"));
}

TEST(HubSplitFiles, HostileFrontMatterSaysNothing) {
  for (const char* readme : {"---\nconfigs: [\n---\n", "---\n- a\n---\n", "---\nconfigs: 3\n---\n", "---\nx", "---",
                             "---\nconfigs:\n- 1\n- [2]\n---\n"}) {
    EXPECT_THAT(Split({"train.jsonl"}, readme, "", "train"), ElementsAre("train.jsonl")) << readme;
  }
}

// A cache as huggingface_hub leaves it, and no network.
class HubOfflineTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "simpo-hub-test-XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    home_ = pattern;
    setenv("HF_HOME", home_.c_str(), 1);
    setenv("HF_HUB_OFFLINE", "1", 1);
    unsetenv("HF_HUB_CACHE");
    unsetenv("HUGGINGFACE_HUB_CACHE");
  }
  void TearDown() override {
    unsetenv("HF_HOME");
    unsetenv("HF_HUB_OFFLINE");
    fs::remove_all(home_);
  }

  void Write(const fs::path& path, std::string_view text) {
    fs::create_directories((home_ / "hub" / path).parent_path());
    std::ofstream(home_ / "hub" / path) << text;
  }
  void AddModel(const Names& files) {
    Write("models--org--m/refs/main", kCommit);
    for (const std::string& file : files) Write(fs::path("models--org--m/snapshots") / kCommit / file, "{}");
  }
  static absl::StatusOr<HubFiles> Fetch(const std::string& revision = "main") {
    return FetchModel("org/m", revision, HubAccess::kDownload, [](const fs::path&) { return absl::OkStatus(); });
  }

  fs::path home_;
};

TEST_F(HubOfflineTest, AWholeModelIsFoundByBranchAndCommit) {
  AddModel({"config.json", "tokenizer.json", "model.safetensors"});
  for (const std::string revision : {"main", kCommit}) {
    const absl::StatusOr<HubFiles> model = Fetch(revision);
    ASSERT_TRUE(model.ok()) << model.status();
    EXPECT_EQ(model->folder, home_ / "hub/models--org--m/snapshots" / kCommit);
    EXPECT_EQ(model->source, "org/m, revision " + revision + ", commit " + kCommit);
    EXPECT_THAT(model->notes, ElementsAre(HasSubstr("HF_HUB_OFFLINE is set; the cached commit")));
  }
}

TEST_F(HubOfflineTest, AMissingShardIsNamed) {
  AddModel({"config.json", "model-00001-of-00002.safetensors"});
  Write(fs::path("models--org--m/snapshots") / kCommit / "model.safetensors.index.json",
        R"({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})");
  const absl::Status status = Fetch().status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(status.message(), HasSubstr("the cache lacks model-00002-of-00002.safetensors ("));
  EXPECT_THAT(status.message(), HasSubstr("hf download org/m --revision"));
}

TEST_F(HubOfflineTest, WhatTheCheckRefusesIsTheError) {
  AddModel({"config.json", "model.safetensors"});
  const absl::StatusOr<HubFiles> model = FetchModel("org/m", "main", HubAccess::kDownload,
                                                    [](const fs::path&) { return absl::InvalidArgumentError("no"); });
  EXPECT_EQ(model.status(), absl::InvalidArgumentError("no"));
}

TEST_F(HubOfflineTest, AConvertedDataSet) {
  Write("datasets--org--d/refs/main", kCommit);
  Write(fs::path("datasets--org--d/snapshots") / kCommit / "script.py", "");
  const std::string converted(40, 'c');
  Write("datasets--org--d/refs/refs/convert/parquet", converted);
  Write(fs::path("datasets--org--d/snapshots") / converted / "default/train/0000.parquet", "");
  const absl::StatusOr<HubFiles> data = FetchSplit("org/d", "", "train", /*required=*/true, HubAccess::kDownload);
  ASSERT_TRUE(data.ok()) << data.status();
  EXPECT_THAT(data->files, ElementsAre(data->folder / "default/train/0000.parquet"));
  EXPECT_THAT(data->notes, ElementsAre(HasSubstr("the hub's own conversion to Parquet is used")));
  const absl::StatusOr<HubFiles> none = FetchSplit("org/d", "", "test", /*required=*/false, HubAccess::kDownload);
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_THAT(none->files, IsEmpty());
}

TEST_F(HubOfflineTest, ARevisionOfADataSet) {
  const std::string tagged(40, 'd');
  Write("datasets--org--d/refs/main", kCommit);
  Write(fs::path("datasets--org--d/snapshots") / kCommit / "train.jsonl", "");
  Write("datasets--org--d/refs/v2", tagged);
  Write(fs::path("datasets--org--d/snapshots") / tagged / "train.jsonl", "");
  const auto fetch = [](const std::string& source, const std::string& split) {
    return FetchSplit(source, "", split, /*required=*/true, HubAccess::kDownload);
  };
  for (const std::string& source : {std::string("org/d@v2"), "org/d@" + tagged}) {
    const absl::StatusOr<HubFiles> data = fetch(source, "train");
    ASSERT_TRUE(data.ok()) << data.status();
    EXPECT_THAT(data->source, HasSubstr("commit " + tagged));
    EXPECT_THAT(data->files, ElementsAre(data->folder / "train.jsonl"));
  }
  EXPECT_THAT(fetch("org/d", "train")->source, HasSubstr(std::string("revision main, commit ") + kCommit));
  // The hub's conversion is that of main, and not taken for another revision.
  const std::string converted(40, 'c');
  Write("datasets--org--d/refs/refs/convert/parquet", converted);
  Write(fs::path("datasets--org--d/snapshots") / converted / "default/test/0000.parquet", "");
  EXPECT_TRUE(fetch("org/d", "test").ok());
  EXPECT_THAT(fetch("org/d@v2", "test").status().message(), HasSubstr("revision v2 has no split 'test'"));
  EXPECT_EQ(fetch("org/d@../x", "train").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(HubOfflineTest, RevisionsThatLeaveTheCacheAreRefused) {
  for (const char* revision : {"../x", "/etc", "a//b", "a b", ""}) {
    EXPECT_EQ(Fetch(revision).status().code(), absl::StatusCode::kInvalidArgument) << revision;
  }
}

}  // namespace
}  // namespace simpo
