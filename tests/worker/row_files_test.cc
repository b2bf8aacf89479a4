#include "worker/data/row_files.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <zlib.h>

#include <nlohmann/json.hpp>

#include "tests/worker/io/test_files.h"
#include "worker/data/preference_dataset.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::ElementsAre;
using testing::EndsWith;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;
using testing::StartsWith;

using Rows = std::vector<std::pair<std::string, std::string>>;  // JSON, place

// Rows up to an error, and the error's text.
struct Reading {
  Rows rows;
  std::string error;
};

Reading Read(const fs::path& path) {
  Reading reading;
  const absl::Status status = ReadRows(path, [&](std::string_view json, const std::string& where) {
    reading.rows.emplace_back(json, where);
    return true;
  });
  reading.error = std::string(status.message());
  return reading;
}

class RowFiles : public testing::Test {
 protected:
  Reading ReadText(const std::string& name, const std::string& text) const {
    WriteText(dir_ / name, text);
    return Read(dir_ / name);
  }
  static std::vector<std::string> Texts(const Reading& reading) {
    EXPECT_EQ(reading.error, "");
    std::vector<std::string> texts;
    for (const auto& row : reading.rows) texts.push_back(row.first);
    return texts;
  }
  TempDir dir_;
};

TEST_F(RowFiles, JsonLinesGiveRowsTheirPlaces) {
  const Reading reading = ReadText("a.jsonl", "\xef\xbb\xbf{\"a\": 1}\n\n  \r\n{\"a\": 2}\r\nnonsense");
  EXPECT_THAT(Texts(reading), ElementsAre("{\"a\": 1}", "{\"a\": 2}\r", "nonsense"));
  EXPECT_THAT(reading.rows[1].second, EndsWith("a.jsonl:4"));
  EXPECT_EQ(CountRows(dir_ / "a.jsonl").value(), 3);
  EXPECT_EQ(CountRows(dir_ / "none.jsonl").status().code(), absl::StatusCode::kNotFound);
}

TEST_F(RowFiles, TheSinkEndsTheReading) {
  WriteText(dir_ / "a.jsonl", "1\n2\n3\n");
  int seen = 0;
  EXPECT_TRUE(ReadRows(dir_ / "a.jsonl", [&](std::string_view, const std::string&) { return ++seen < 2; }).ok());
  EXPECT_EQ(seen, 2);
}

TEST_F(RowFiles, GzippedFilesAreReadAsTheyAre) {
  const std::string text = "{\"a\": 1}\n{\"a\": 2}\n";
  gzFile file = gzopen((dir_ / "a.jsonl.gz").c_str(), "wb");
  for (int i = 0; i < 5000; ++i) gzwrite(file, text.data(), static_cast<unsigned>(text.size()));
  gzclose(file);
  EXPECT_THAT(Read(dir_ / "a.jsonl.gz").rows, SizeIs(10000));
  fs::resize_file(dir_ / "a.jsonl.gz", fs::file_size(dir_ / "a.jsonl.gz") / 2);
  EXPECT_THAT(Read(dir_ / "a.jsonl.gz").error, AllOf(HasSubstr("a.jsonl.gz:"), HasSubstr("damaged")));
}

TEST_F(RowFiles, JsonInAllItsForms) {
  const char* kRow = R"({"a": "]}\"", "b": [1, {}]})";
  EXPECT_THAT(Texts(ReadText("a.json", std::string("[") + kRow + " ,\n" + kRow + "]\n")), ElementsAre(kRow, kRow));
  EXPECT_THAT(Texts(ReadText("a.json", std::string("{\"version\": [1, 2], \"data\": [") + kRow + "], \"x\": 1}")),
              ElementsAre(kRow));
  EXPECT_THAT(Texts(ReadText("a.json", std::string(kRow) + "\n" + kRow + "\n")), ElementsAre(kRow, kRow));
  EXPECT_THAT(Texts(ReadText("a.json", "[]")), IsEmpty());
  EXPECT_THAT(Texts(ReadText("a.json", "")), IsEmpty());
  const Reading lines = ReadText("a.json", "[\n{},\n\n{\n}]");
  EXPECT_THAT(lines.rows[1].second, EndsWith("a.json:4"));
}

TEST_F(RowFiles, DamagedJsonNamesTheLine) {
  EXPECT_THAT(ReadText("a.json", "[{},\n{\"a\": ").error,
              AllOf(HasSubstr("a.json:2:"), HasSubstr("the file ends within")));
  EXPECT_THAT(ReadText("a.json", "[{}\n").error, AllOf(HasSubstr("a.json:1:"), HasSubstr("ends within the list")));
  EXPECT_THAT(ReadText("a.json", "[{}\n{}]").error, AllOf(HasSubstr("a.json:2:"), HasSubstr("a comma")));
  EXPECT_THAT(ReadText("a.json", "[{},,{}]").error, HasSubstr("a row is expected"));
  EXPECT_THAT(ReadText("a.json", "{\"data\": [{}").error, HasSubstr("ends within the list"));
  EXPECT_THAT(ReadText("a.json", "}").error, HasSubstr("a row is expected"));
  // Depth is counted, not stacked.
  EXPECT_THAT(ReadText("a.json", std::string(3 << 20, '[')).error, HasSubstr("the file ends within"));
}

TEST_F(RowFiles, CsvAsRfc4180HasIt) {
  const Reading reading = ReadText("a.csv",
                                   "prompt,chosen,\"rejected\",score_chosen\r\n"
                                   "\"Q, \"\"quoted\"\"\nsecond line\",good,bad,7\r\n"
                                   "\n"
                                   ",\"[{\"\"role\"\": \"\"user\"\", \"\"content\"\": \"\"Q\"\"}]\",,\n");
  const auto texts = Texts(reading);
  ASSERT_THAT(texts, SizeIs(2));
  EXPECT_EQ(texts[0], R"({"prompt":"Q, \"quoted\"\nsecond line","chosen":"good","rejected":"bad","score_chosen":"7"})");
  EXPECT_EQ(texts[1], R"({"prompt":null,"chosen":[{"role":"user","content":"Q"}],"rejected":"","score_chosen":null})");
  EXPECT_THAT(reading.rows[0].second, EndsWith("a.csv:2"));
  EXPECT_THAT(reading.rows[1].second, EndsWith("a.csv:5"));
}

TEST_F(RowFiles, DamagedCsvNamesTheLine) {
  EXPECT_THAT(ReadText("a.csv", "a,b\n1,2\n1,2,3\n").error,
              AllOf(HasSubstr("a.csv:3:"), HasSubstr("3 cells, the header 2")));
  EXPECT_THAT(ReadText("a.csv", "a,b\n1,2\n\"1,2\n3,4\n").error,
              AllOf(HasSubstr("a.csv:3:"), HasSubstr("within quotes")));
  EXPECT_THAT(ReadText("a.csv", "a,b\n\"1\"x,2\n").error, AllOf(HasSubstr("a.csv:2:"), HasSubstr("closing quote")));
  EXPECT_THAT(ReadText("a.csv", std::string(5000, ',')).error, HasSubstr("more than 1000 columns"));
  const Reading reading = ReadText("a.csv", "chosen,rejected\ncaf\xe9,b\n");
  ASSERT_THAT(reading.rows, SizeIs(1));
  EXPECT_THAT(std::string(ParsePreferenceRow(reading.rows[0].first).status().message()), HasSubstr("not UTF-8"));
}

TEST_F(RowFiles, AnEndlessRowIsCutOff) {
  const std::string huge(65 << 20, 'x');
  EXPECT_THAT(ReadText("a.jsonl", "{}\n" + huge).error, AllOf(HasSubstr("a.jsonl:2:"), HasSubstr("bytes")));
  EXPECT_THAT(ReadText("a.json", "[{},\n\"" + huge).error, AllOf(HasSubstr("a.json:2:"), HasSubstr("bytes")));
  EXPECT_THAT(ReadText("a.csv", "a\n\"" + huge).error, AllOf(HasSubstr("a.csv:2:"), HasSubstr("a quote not closed")));
}

TEST_F(RowFiles, OtherFormsAreRefusedByName) {
  EXPECT_THAT(ReadText("a.txt", "x").error, AllOf(HasSubstr("a.txt"), HasSubstr(".jsonl, .json, .csv or .parquet")));
}

// The same rows in each of Parquet's compressions, several row groups, with and without dictionaries;
// rows.jsonl beside them holds what must come out.
TEST(ParquetFiles, GiveTheRowsThatWereWritten) {
  const fs::path dir = fs::path(SIMPO_GOLDENS_DIR) / "text" / "parquet";
  std::vector<nlohmann::json> expected;
  for (const auto& row : Read(dir / "rows.jsonl").rows) expected.push_back(nlohmann::json::parse(row.first));
  ASSERT_GE(expected.size(), 80u);
  for (const char* name : {"none", "snappy", "gzip", "zstd", "lz4", "brotli"}) {
    const fs::path path = dir / (std::string(name) + ".parquet");
    const Reading reading = Read(path);
    EXPECT_EQ(reading.error, "") << name;
    ASSERT_EQ(reading.rows.size(), expected.size()) << name;
    for (size_t i = 0; i < expected.size(); ++i) {
      EXPECT_EQ(nlohmann::json::parse(reading.rows[i].first), expected[i]) << name << " row " << i;
    }
    EXPECT_THAT(reading.rows[1].second, EndsWith(std::string(name) + ".parquet: row 2"));
    EXPECT_EQ(CountRows(path).value(), static_cast<int64_t>(expected.size()));
  }
}

// Every file with a byte changed or an end cut off: rows or an error, never a crash.
TEST_F(RowFiles, DamagedParquetIsAnError) {
  const std::string whole = simpo::ReadText(fs::path(SIMPO_GOLDENS_DIR) / "text" / "parquet" / "snappy.parquet");
  int errors = 0;
  for (size_t cut = 0; cut < whole.size(); cut += whole.size() / 60) {
    const Reading reading = ReadText("cut.parquet", whole.substr(0, cut));
    EXPECT_THAT(reading.error, HasSubstr("cut.parquet: not a whole Parquet file")) << cut;
  }
  for (size_t at = 0; at < whole.size(); at += whole.size() / 300) {
    std::string damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ 0xff);
    errors += !ReadText("damaged.parquet", damaged).error.empty();
  }
  EXPECT_GT(errors, 50);
  EXPECT_THAT(ReadText("text.parquet", "{}\n").error, HasSubstr("not a whole Parquet file"));
  EXPECT_EQ(ReadRows(dir_ / "none.parquet", {}).code(), absl::StatusCode::kNotFound);
}

class SplitFiles : public testing::Test {
 protected:
  void Make(const std::vector<std::string>& names) const {
    for (const std::string& name : names) {
      fs::create_directories((dir_ / name).parent_path());
      WriteText(dir_ / name, "");
    }
  }
  std::vector<std::string> Find(const std::string& split, const std::string& config = "",
                                const std::string& source = "", bool unnamed = true) const {
    std::vector<std::string> names;
    const auto files = FindSplitFiles(source.empty() ? dir_.path() : dir_ / source, {split, config, unnamed});
    if (!files.ok()) return {"error: " + std::string(files.status().message())};
    for (const fs::path& path : *files) names.push_back(fs::relative(path, dir_.path()).string());
    return names;
  }
  TempDir dir_;
};

TEST_F(SplitFiles, KnowsTheUsualNames) {
  Make({"train.jsonl", "train_prefs.jsonl", "test-00000-of-00002.jsonl", "test-00001-of-00002.jsonl",
        "data/train-00000-of-00001.jsonl", "train.md", "README.md", "validation/0000.parquet"});
  EXPECT_THAT(Find("train"), ElementsAre("data/train-00000-of-00001.jsonl", "train.jsonl"));
  EXPECT_THAT(Find("train_prefs"), ElementsAre("train_prefs.jsonl"));
  EXPECT_THAT(Find("test"), ElementsAre("test-00000-of-00002.jsonl", "test-00001-of-00002.jsonl"));
  EXPECT_THAT(Find("validation"), ElementsAre("validation/0000.parquet"));
  EXPECT_THAT(Find("dev"), IsEmpty());
}

TEST_F(SplitFiles, AFileIsTheSplitThatTakesUnnamedFiles) {
  Make({"mine.jsonl"});
  EXPECT_THAT(Find("train", "", "mine.jsonl"), ElementsAre("mine.jsonl"));
  EXPECT_THAT(Find("test", "", "mine.jsonl", false), IsEmpty());
}

TEST_F(SplitFiles, GlobsChooseByNameWhereThereAreNames) {
  Make({"d/train-0.parquet", "d/train-1.parquet", "d/test-0.parquet", "e/part1.csv", "e/part2.csv"});
  EXPECT_THAT(Find("train", "", "d/*.parquet"), ElementsAre("d/train-0.parquet", "d/train-1.parquet"));
  EXPECT_THAT(Find("test", "", "d/*.parquet", false), ElementsAre("d/test-0.parquet"));
  EXPECT_THAT(Find("train", "", "e/part*.csv"), ElementsAre("e/part1.csv", "e/part2.csv"));
  EXPECT_THAT(Find("test", "", "e/part*.csv", false), IsEmpty());
  EXPECT_THAT(Find("train", "", "f/*.csv"), ElementsAre(AllOf(StartsWith("error"), HasSubstr("matches no file"))));
}

TEST_F(SplitFiles, ConfigurationsAreFolders) {
  Make({"helpful/train.jsonl.gz", "harmless/train.jsonl.gz", "harmless/test.jsonl.gz"});
  EXPECT_THAT(Find("train", "helpful"), ElementsAre("helpful/train.jsonl.gz"));
  EXPECT_THAT(Find("train"), ElementsAre(AllOf(HasSubstr("harmless, helpful"), HasSubstr("dataset_configs"))));
  EXPECT_THAT(Find("test"), ElementsAre("harmless/test.jsonl.gz"));
  EXPECT_THAT(Find("train", "other"), ElementsAre(AllOf(HasSubstr("no folder other"), HasSubstr("dataset_configs"))));
  Make({"default/train/0000.parquet"});
  EXPECT_THAT(Find("train"), ElementsAre("default/train/0000.parquet"));
}

TEST_F(SplitFiles, RefusesWhatItCannotTell) {
  Make({"train.jsonl", "data/train-0.parquet"});
  EXPECT_THAT(Find("train"),
              ElementsAre(AllOf(HasSubstr("train.jsonl"), HasSubstr("train-0.parquet"), HasSubstr("twice"))));
  EXPECT_THAT(Find("train", "", "missing"),
              ElementsAre(AllOf(HasSubstr("missing"), HasSubstr("neither a file nor a folder"))));
}

}  // namespace
}  // namespace simpo
