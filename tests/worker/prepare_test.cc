#include "worker/data/prepare.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <sstream>

#include "tests/worker/text_golden.h"
#include "worker/data/tokenized_dataset.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::AnyOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Pair;
using testing::UnorderedElementsAre;

class Prepare : public testing::Test {
 protected:
  Prepare() {
    fs::create_directory(dir_ / "data");
    config_.model_name_or_path = (fs::path(SIMPO_GOLDENS_DIR) / "text").string();
    config_.dataset_mixer = {{(dir_ / "data").string(), 1.0}};
    config_.preprocessing_num_workers = 3;
  }
  static std::string Rows(int count, const std::string& word = "word") {
    std::string text;
    for (int i = 0; i < count; ++i) {
      text +=
          "{\"prompt\": \"Q" + std::to_string(i) + "\", \"chosen\": \" good " + word + "\", \"rejected\": \" bad\"}\n";
    }
    return text;
  }
  absl::StatusOr<PreparedData> Run() { return PrepareData(config_, dir_ / "cache", {}); }
  std::string Error() {
    const auto data = Run();
    return data.ok() ? "" : std::string(data.status().message());
  }

  TempDir dir_;
  JobConfig config_;
};

TEST_F(Prepare, CountsRowsByWhatBecameOfThem) {
  WriteText(dir_ / "data/train.jsonl", Rows(5) +
                                           "{\"prompt\": \"Q\", \"chosen\": \" a\", \"rejected\": \" a\"}\n"
                                           "{\"prompt\": \"Q\", \"chosen\": \" a\", \"rejected\": \"\"}\n");
  WriteText(dir_ / "data/test.jsonl", Rows(2));
  const auto data = Run();
  ASSERT_TRUE(data.ok()) << data.status();
  EXPECT_EQ(data->train_report.rows, 7);
  EXPECT_EQ(data->train_report.pairs, 5);
  EXPECT_THAT(data->train_report.dropped, ElementsAre(Pair("empty response", 1), Pair("identical responses", 1)));
  EXPECT_THAT(data->train_report.ToString(), HasSubstr("1 dropped (identical responses)"));
  const auto train = TokenizedDataset::Open(data->train_cache).value();
  EXPECT_EQ(train->size(), 5);
  EXPECT_EQ(train->dropped_pairs(), 2);
  ASSERT_TRUE(data->eval_cache.has_value());
  EXPECT_EQ(TokenizedDataset::Open(*data->eval_cache).value()->size(), 2);
  EXPECT_EQ(data->chat_template, "");  // plain texts
}

TEST_F(Prepare, ASecondCallFindsTheCache) {
  WriteText(dir_ / "data/train.jsonl", Rows(5));
  const auto first = Run();
  ASSERT_TRUE(first.ok()) << first.status();
  const auto written = fs::last_write_time(first->train_cache);
  const auto second = Run();
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(second->train_cache, first->train_cache);
  EXPECT_EQ(fs::last_write_time(second->train_cache), written);
  EXPECT_EQ(second->train_report.ToString(), first->train_report.ToString());
  // A damaged cache file is made again.
  fs::resize_file(first->train_cache, 10);
  ASSERT_TRUE(Run().ok());
  EXPECT_EQ(TokenizedDataset::Open(first->train_cache).value()->size(), 5);
}

TEST_F(Prepare, AnythingThatChangesTheTokensMakesAnotherCache) {
  WriteText(dir_ / "data/train.jsonl", Rows(5));
  std::set<fs::path> caches = {Run()->train_cache};
  config_.max_length = 100;
  caches.insert(Run()->train_cache);
  config_.truncation_mode = "keep_start";
  caches.insert(Run()->train_cache);
  config_.chat_template = "{{ messages }}";
  caches.insert(Run()->train_cache);
  WriteText(dir_ / "data/train.jsonl", Rows(5, "other"));
  caches.insert(Run()->train_cache);
  config_.dataset_mixer[0].second = 0.5;
  caches.insert(Run()->train_cache);
  EXPECT_EQ(caches.size(), 6u);
}

TEST_F(Prepare, TokensDoNotDependOnTheNumberOfThreads) {
  WriteText(dir_ / "data/train.jsonl", Rows(300));
  const std::string several = ReadText(Run()->train_cache);
  fs::remove_all(dir_ / "cache");
  config_.preprocessing_num_workers = 1;
  EXPECT_TRUE(ReadText(Run()->train_cache) == several);
}

TEST_F(Prepare, TakesFractionsAndSeveralSources) {
  WriteText(dir_ / "data/train.jsonl", Rows(10));
  WriteText(dir_ / "more.jsonl", Rows(7, "more"));
  config_.dataset_mixer = {{(dir_ / "data").string(), 0.3}, {(dir_ / "more.jsonl").string(), 1.0}};
  const auto data = Run();
  ASSERT_TRUE(data.ok()) << data.status();
  EXPECT_EQ(data->train_report.pairs, 3 + 7);
  EXPECT_FALSE(data->eval_cache.has_value());
  EXPECT_THAT(data->notes, ElementsAre(HasSubstr("no evaluation")));
}

TEST_F(Prepare, EveryFormOfTheSameRowsGivesTheSameTokens) {
  const fs::path rows = fs::path(SIMPO_GOLDENS_DIR) / "text" / "parquet";
  std::set<std::string> tokens;
  // All rows of the files are whole conversations but for every eleventh, whose chosen list is empty.
  std::string lines, array = "[", csv = "chosen,rejected\n";
  std::istringstream text(ReadText(rows / "rows.jsonl"));
  for (std::string line; std::getline(text, line);) {
    const auto row = nlohmann::json::parse(line);
    if (row["chosen"].empty() || row["chosen"].size() < 2) continue;
    lines += line + "\n";
    array += (array.size() > 1 ? "," : "") + line;
    for (const char* key : {"chosen", "rejected"}) {
      std::string cell = row[key].dump();
      for (size_t i = 0; (i = cell.find('"', i)) != std::string::npos; i += 2) cell.insert(i, 1, '"');
      csv += "\"" + cell + (key[0] == 'c' ? "\"," : "\"\n");
    }
  }
  WriteText(dir_ / "a.jsonl", lines);
  WriteText(dir_ / "a.json", array + "]");
  WriteText(dir_ / "a.csv", csv);
  for (const char* name : {"a.jsonl", "a.json", "a.csv"}) {
    config_.dataset_mixer = {{(dir_ / name).string(), 1.0}};
    const auto data = Run();
    ASSERT_TRUE(data.ok()) << data.status();
    EXPECT_GE(data->train_report.pairs, 50);
    tokens.insert(ReadText(data->train_cache));
  }
  EXPECT_EQ(tokens.size(), 1u);
  config_.dataset_mixer = {{(rows / "zstd.parquet").string(), 1.0}};
  EXPECT_THAT(Error(), AllOf(HasSubstr("zstd.parquet: row 1: "), HasSubstr("at least one message")));
}

// As alignment-handbook: the first int(fraction * rows) of each training source; tests are taken whole.
TEST_F(Prepare, FractionsTakeTheFirstRowsOfTrainingSourcesOnly) {
  WriteText(dir_ / "data/train-0.jsonl", Rows(5, "first"));
  WriteText(dir_ / "data/train-1.jsonl", Rows(5, "second") + "no row at all, and not reached\n");
  WriteText(dir_ / "data/test.jsonl", Rows(7));
  config_.dataset_mixer = {{(dir_ / "data").string(), 0.7}};
  const auto data = Run();
  ASSERT_TRUE(data.ok()) << data.status();
  EXPECT_EQ(data->train_report.pairs, 7);  // int(0.7 * 11)
  EXPECT_EQ(data->eval_report->pairs, 7);
  WriteText(dir_ / "first.jsonl", Rows(5, "first") + Rows(2, "second"));
  config_.dataset_mixer = {{(dir_ / "first.jsonl").string(), 1.0}};
  EXPECT_TRUE(ReadText(Run()->train_cache) == ReadText(data->train_cache));
}

TEST_F(Prepare, SplitsAreNamedByTheJob) {
  fs::create_directory(dir_ / "data/en");
  WriteText(dir_ / "data/en/train_prefs.jsonl", Rows(4));
  WriteText(dir_ / "data/en/test_prefs.jsonl", Rows(2));
  config_.dataset_configs = {"en"};
  // alignment-handbook tells them by name, in whatever order.
  for (const auto& splits : {std::vector<std::string>{"train_prefs", "test_prefs"}, {"test_prefs", "train_prefs"}}) {
    config_.dataset_splits = splits;
    const auto data = Run();
    ASSERT_TRUE(data.ok()) << data.status();
    EXPECT_EQ(data->train_report.pairs, 4);
    EXPECT_EQ(data->eval_report->pairs, 2);
  }
  config_.dataset_configs = {"en", "de"};
  EXPECT_THAT(Error(), HasSubstr("dataset_configs names 2 configurations for 1 data sets"));
  config_.dataset_configs = {"de"};
  EXPECT_THAT(Error(), HasSubstr("no folder de"));
}

TEST_F(Prepare, ReportsLengthsAndTies) {
  WriteText(dir_ / "data/train.jsonl",
            Rows(98) + R"({"prompt": "Q", "chosen": " a", "rejected": " b", "score_chosen": 1, "score_rejected": 1})" +
                "\n" + R"({"prompt": "Q", "chosen": " )" + std::string(400, 'x') + R"(", "rejected": " b"})");
  const auto data = Run();
  ASSERT_TRUE(data.ok()) << data.status();
  const DataReport& report = data->train_report;
  EXPECT_EQ(report.ties, 1);
  EXPECT_LT(report.chosen.p50, 10);
  EXPECT_LE(report.chosen.p50, report.chosen.p90);
  EXPECT_LE(report.chosen.p99, 20);
  EXPECT_GT(report.chosen.longest, 50);
  EXPECT_GT(report.shared_prefix_share, 0.1);
  EXPECT_THAT(report.ToString(), AllOf(HasSubstr("1 with equal scores"), HasSubstr("longer sequence")));
  ASSERT_TRUE(WriteDataReport(*data, dir_.path()).ok());
  const auto json = nlohmann::json::parse(ReadText(dir_ / "data_report.json"));
  EXPECT_EQ(json["train"]["rows"], 100);
  EXPECT_EQ(json["train"]["chosen_tokens"]["longest"], report.chosen.longest);
  EXPECT_EQ(json["chat_template"], data->chat_template_source);
}

TEST_F(Prepare, ThePapersRulesAreAChoice) {
  WriteText(
      dir_ / "data/train.jsonl",
      R"({"prompt": "Q", "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]})");
  const auto trl = Run();
  config_.compat = "princeton";
  const auto princeton = Run();
  ASSERT_TRUE(princeton.ok()) << princeton.status();
  // The generation header is scored there.
  EXPECT_GT(princeton->train_report.chosen.mean, trl->train_report.chosen.mean);
  EXPECT_THAT(princeton->notes, testing::Contains(HasSubstr("max_prompt_length is not given: 128")));
  // A model that is called mistral has its own template there, whatever its tokenizer says.
  fs::create_directory_symlink(config_.model_name_or_path, dir_ / "My-Mistral-7B");
  config_.model_name_or_path = (dir_ / "My-Mistral-7B").string();
  EXPECT_THAT(Run()->chat_template_source, HasSubstr("mistral"));
  config_.compat = "trl";
  EXPECT_EQ(Run()->chat_template_source, "tokenizer_config.json");
}

TEST_F(Prepare, SaysWhichTemplateIsUsed) {
  WriteText(
      dir_ / "data/train.jsonl",
      R"({"prompt": "Q", "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]})");
  EXPECT_EQ(Run()->chat_template_source, "tokenizer_config.json");
  WriteText(dir_ / "mine.jinja", "{{ bos_token }}{% for m in messages %}<{{ m.content }}>{% endfor %}");
  config_.chat_template = (dir_ / "mine.jinja").string();
  const auto data = Run();
  ASSERT_TRUE(data.ok()) << data.status();
  EXPECT_EQ(data->chat_template_source, config_.chat_template);
  EXPECT_EQ(data->chat_template, ReadText(dir_ / "mine.jinja"));
}

TEST_F(Prepare, MistakesNameTheirPlace) {
  EXPECT_THAT(Error(), AllOf(HasSubstr("has no train.jsonl"), HasSubstr("dataset_splits")));
  WriteText(dir_ / "data/train.jsonl", Rows(1) + "{\"chosen\": 1}\n");
  EXPECT_THAT(Error(), HasSubstr("train.jsonl:2: "));
  WriteText(dir_ / "data/train.jsonl", "{\"prompt\": \"Q\", \"chosen\": \" a\", \"rejected\": \" a\"}\n");
  EXPECT_THAT(Error(), AllOf(HasSubstr("train.jsonl"), HasSubstr("no pair is left of 1 rows"),
                             HasSubstr("identical responses: 1")));
  WriteText(dir_ / "data/train.jsonl", "");
  EXPECT_THAT(Error(), HasSubstr("the file is empty"));
  WriteText(
      dir_ / "data/train.jsonl",
      R"({"prompt": "Q", "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]})");
  config_.chat_template = "{{ raise_exception('not this one') }}";
  EXPECT_THAT(Error(), AllOf(HasSubstr("train.jsonl:1"), HasSubstr("not this one")));
  config_.chat_template = "{% if %}";
  EXPECT_THAT(Error(), AllOf(HasSubstr("chat template of the job file"), HasSubstr("line 1")));
}

// Files of strangers: an error that names the place, whatever they do.
TEST_F(Prepare, HostileFilesEndInAnError) {
  WriteText(
      dir_ / "data/train.jsonl",
      R"({"prompt": "Q", "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]})");
  config_.chat_template = "{{ " + std::string(200000, '(') + "1" + std::string(200000, ')') + " }}";
  EXPECT_THAT(Error(), AnyOf(HasSubstr("chat template of the job file"), HasSubstr("train.jsonl:1: ")));
  config_.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
  EXPECT_THAT(Error(), HasSubstr("train.jsonl:1: "));
  config_.chat_template = "";
  const fs::path good = config_.model_name_or_path;
  config_.model_name_or_path = (dir_ / "model").string();
  fs::create_directory(dir_ / "model");
  const std::string tokenizer = ReadText(good / "tokenizer.json");
  for (const std::string& text :
       {tokenizer.substr(0, tokenizer.size() / 2), std::string(1 << 20, '['), std::string(1 << 20, '\0'),
        R"({"version": "1.0", "model": )" + std::string(100000, '[') + std::string(100000, ']') + "}"}) {
    WriteText(dir_ / "model/tokenizer.json", text);
    EXPECT_THAT(Error(), HasSubstr("tokenizer.json: "));
  }
  config_.model_name_or_path = good.string();
  WriteText(dir_ / "data/train.jsonl", Rows(3) + "{\"chosen\": " + std::string(1 << 20, '[') + "\n");
  EXPECT_THAT(Error(), HasSubstr("train.jsonl:4: "));
}

TEST(TokenizedDataset, ReadsBackWhatWasWritten) {
  const TempDir dir;
  const std::vector<OwnedPair> pairs = {{{1, 2, 3}, {1, 2, 4, 5}, 2, 2, false}, {{7, 8}, {9, 8, 6}, 1, 2, true}};
  ASSERT_TRUE(WriteTokenizedDataset(dir / "a.tokens", pairs, 3).ok());
  const auto data = TokenizedDataset::Open(dir / "a.tokens");
  ASSERT_TRUE(data.ok()) << data.status();
  ASSERT_EQ((*data)->size(), 2);
  EXPECT_EQ((*data)->dropped_pairs(), 3);
  for (int64_t i = 0; i < 2; ++i) {
    const TokenizedPair pair = (**data)[i];
    EXPECT_EQ(std::vector<int32_t>(pair.chosen.begin(), pair.chosen.end()), pairs[i].chosen);
    EXPECT_EQ(std::vector<int32_t>(pair.rejected.begin(), pair.rejected.end()), pairs[i].rejected);
    EXPECT_EQ(pair.chosen_prompt_length, pairs[i].chosen_prompt_length);
    EXPECT_EQ(pair.rejected_prompt_length, pairs[i].rejected_prompt_length);
    EXPECT_EQ((*data)->truncated(i), pairs[i].truncated);
  }
  EXPECT_EQ((**data)[0].SharedPrefixLength(), 2);
  EXPECT_EQ((**data)[1].SharedPrefixLength(), 0);
}

TEST(TokenizedDataset, ADamagedFileIsAnError) {
  const TempDir dir;
  ASSERT_TRUE(
      WriteTokenizedDataset(dir / "a.tokens", std::vector<OwnedPair>{{{1, 2, 3}, {1, 2, 4}, 2, 2, false}}, 0).ok());
  const std::string whole = ReadText(dir / "a.tokens");
  for (const std::string& damaged :
       {whole.substr(0, whole.size() - 4), whole.substr(0, 8), std::string(), "X" + whole.substr(1)}) {
    WriteText(dir / "b.tokens", damaged);
    const auto data = TokenizedDataset::Open(dir / "b.tokens");
    ASSERT_FALSE(data.ok());
    EXPECT_THAT(std::string(data.status().message()), AllOf(HasSubstr("b.tokens"), HasSubstr("damaged")));
  }
  EXPECT_EQ(TokenizedDataset::Open(dir / "c.tokens").status().code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace simpo
