#include "worker/data/preference_dataset.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/io/test_files.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::Not;

const Message kQuestion{"user", "Q"}, kGood{"assistant", "good"}, kBad{"assistant", "bad"};

std::string ErrorOf(std::string_view row) {
  const auto parsed = ParsePreferenceRow(row);
  return parsed.ok() ? "" : std::string(parsed.status().message());
}

TEST(ParsePreferenceRow, TextsWithThePromptBeside) {
  const auto row = ParsePreferenceRow(R"({"prompt": "Q: ", "chosen": "good", "rejected": "bad", "extra": [1]})");
  ASSERT_TRUE(row.ok()) << row.status();
  EXPECT_FALSE(row->conversational);
  EXPECT_EQ(row->prompt, "Q: ");
  EXPECT_EQ(row->chosen, "good");
  EXPECT_EQ(row->rejected, "bad");
}

TEST(ParsePreferenceRow, TextsWithThePromptInside) {
  auto row = ParsePreferenceRow(R"({"chosen": "Human: hi Assistant: yes", "rejected": "Human: hi Assistant: no"})");
  ASSERT_TRUE(row.ok()) << row.status();
  EXPECT_EQ(row->prompt, "Human: hi Assistant:");
  EXPECT_EQ(row->chosen, " yes");  // the blank belongs to the response
  EXPECT_EQ(row->rejected, " no");
  // The texts part in the middle of a character: it is not split.
  row = ParsePreferenceRow("{\"chosen\": \"x\u00e9\", \"rejected\": \"x\u00e8\"}");
  ASSERT_TRUE(row.ok());
  EXPECT_EQ(row->prompt, "x");
  EXPECT_EQ(row->chosen, "\u00e9");
}

TEST(ParsePreferenceRow, ConversationsInEveryForm) {
  for (const char* text :
       {// prompt inside both lists, as UltraFeedback has it (with its text beside)
        R"({"prompt": "Q", "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "good"}],
               "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "bad"}], "messages": 1})",
        // beside them, as messages or as text
        R"({"prompt": [{"role": "user", "content": "Q"}], "chosen": [{"role": "assistant", "content": "good"}],
               "rejected": [{"role": "assistant", "content": "bad"}]})",
        R"({"prompt": "Q", "chosen": [{"role": "assistant", "content": "good"}],
               "rejected": [{"role": "assistant", "content": "bad"}]})",
        // both
        R"({"prompt": [{"role": "user", "content": "Q"}],
               "chosen": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "good"}],
               "rejected": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "bad"}]})"}) {
    const auto row = ParsePreferenceRow(text);
    ASSERT_TRUE(row.ok()) << row.status() << text;
    EXPECT_TRUE(row->conversational);
    EXPECT_THAT(row->prompt_messages, ElementsAre(kQuestion)) << text;
    EXPECT_THAT(row->chosen_messages, ElementsAre(kGood)) << text;
    EXPECT_THAT(row->rejected_messages, ElementsAre(kBad)) << text;
  }
}

TEST(ParsePreferenceRow, EqualScoresAreATie) {
  const std::string row = R"({"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 7, "score_rejected": )";
  EXPECT_TRUE(ParsePreferenceRow(row + "7.0}")->tie);
  EXPECT_FALSE(ParsePreferenceRow(row + "6}")->tie);
}

TEST(ParsePreferenceRow, SaysWhatIsWrong) {
  EXPECT_THAT(ErrorOf(R"({"prompt": "Q", "rejected": "b"})"), HasSubstr("no chosen"));
  EXPECT_THAT(ErrorOf(R"({"prompt": "Q", "chosen": "a", "rejected": null})"), HasSubstr("no rejected"));
  EXPECT_THAT(ErrorOf(R"({"prompt": "Q", "chosen": "a", "rejected": 3})"), HasSubstr("rejected must be"));
  EXPECT_THAT(ErrorOf(R"({"prompt": "Q", "chosen": "a", "rejected": []})"), HasSubstr("both"));
  EXPECT_THAT(ErrorOf(R"({"prompt": 1, "chosen": "a", "rejected": "b"})"), HasSubstr("prompt must be a string"));
  EXPECT_THAT(ErrorOf(R"({"chosen": [{"role": "user"}], "rejected": []})"), HasSubstr("role and a content"));
  EXPECT_THAT(ErrorOf(R"({"chosen": [], "rejected": []})"), HasSubstr("at least one message"));
  EXPECT_THAT(ErrorOf(R"({"prompt": "Q", "chosen": [{"role": "user", "content": "a"}],
                          "rejected": [{"role": "assistant", "content": "b"}]})"),
              HasSubstr("chosen must end with a message of the assistant"));
  EXPECT_THAT(ErrorOf(R"({"chosen": [{"role": "assistant", "content": "a"}],
                          "rejected": [{"role": "assistant", "content": "b"}]})"),
              HasSubstr("same prompt"));
  EXPECT_THAT(ErrorOf("[1, 2]"), HasSubstr("JSON object"));
  EXPECT_THAT(ErrorOf("{\"chosen\": \"a\","), HasSubstr("not valid JSON"));
  EXPECT_THAT(ErrorOf("{\"chosen\": \"caf\xe9\", \"rejected\": \"b\"}"), HasSubstr("not UTF-8"));
}

TEST(ReadPreferenceFile, GivesRowsTheirPlaces) {
  const TempDir dir;
  WriteText(dir / "a.jsonl",
            "{\"prompt\": \"1\", \"chosen\": \"a\", \"rejected\": \"b\"}\n\n  \r\n"
            "{\"prompt\": \"2\", \"chosen\": \"a\", \"rejected\": \"b\"}");  // no last newline
  const auto rows = ReadPreferenceFile(dir / "a.jsonl");
  ASSERT_TRUE(rows.ok()) << rows.status();
  ASSERT_EQ(rows->size(), 2u);
  EXPECT_EQ((*rows)[1].prompt, "2");
  EXPECT_THAT((*rows)[1].where, testing::EndsWith("a.jsonl:4"));
}

TEST(ReadPreferenceFile, ListsBadRowsWithFileAndLine) {
  const TempDir dir;
  std::string text = "{\"prompt\": \"1\", \"chosen\": \"a\", \"rejected\": \"b\"}\n{\"rejected\": \"b\"}\n\xff\n";
  for (int i = 0; i < 30; ++i) text += "nonsense\n";
  WriteText(dir / "a.jsonl", text);
  const auto rows = ReadPreferenceFile(dir / "a.jsonl");
  ASSERT_FALSE(rows.ok());
  EXPECT_EQ(rows.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(
      std::string(rows.status().message()),
      AllOf(HasSubstr("a.jsonl:2: the row has no chosen"), HasSubstr("a.jsonl:3: the text is not UTF-8"),
            HasSubstr("a.jsonl:4: not valid JSON"), HasSubstr("and 12 more bad rows"), Not(HasSubstr("a.jsonl:1:"))));
  EXPECT_EQ(ReadPreferenceFile(dir / "b.jsonl").status().code(), absl::StatusCode::kNotFound);
}

TEST(FindSplitFiles, KnowsTheUsualNames) {
  const TempDir dir;
  fs::create_directory(dir / "data");
  for (const char* name : {"train.jsonl", "train_prefs.jsonl", "test-00000-of-00002.jsonl", "test-00001-of-00002.jsonl",
                           "data/train-00000-of-00001.jsonl"}) {
    WriteText(dir / name, "");
  }
  const auto names = [&](const std::string& split, bool is_train) {
    std::vector<std::string> found;
    const std::vector<fs::path> files = FindSplitFiles(dir.path(), split, is_train).value();
    for (const fs::path& path : files) {
      found.push_back(fs::relative(path, dir.path()).string());
    }
    return found;
  };
  EXPECT_THAT(names("train", true), ElementsAre("data/train-00000-of-00001.jsonl", "train.jsonl"));
  EXPECT_THAT(names("train_prefs", true), ElementsAre("train_prefs.jsonl"));
  EXPECT_THAT(names("test", false), ElementsAre("test-00000-of-00002.jsonl", "test-00001-of-00002.jsonl"));
  EXPECT_TRUE(names("validation", false).empty());
  // A file is the train split.
  EXPECT_EQ(FindSplitFiles(dir / "train.jsonl", "train", true)->size(), 1u);
  EXPECT_TRUE(FindSplitFiles(dir / "train.jsonl", "test", false)->empty());
}

TEST(FindSplitFiles, RefusesWhatItCannotRead) {
  const TempDir dir;
  WriteText(dir / "train.parquet", "");
  EXPECT_THAT(std::string(FindSplitFiles(dir.path(), "train", true).status().message()),
              AllOf(HasSubstr("train.parquet"), HasSubstr("JSON Lines")));
  EXPECT_THAT(std::string(FindSplitFiles(dir / "missing", "train", true).status().message()),
              AllOf(HasSubstr("missing"), HasSubstr("neither a file nor a folder")));
}

}  // namespace
}  // namespace simpo
