#include "worker/data/preference_dataset.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace simpo {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

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

TEST(ParsePreferenceRow, ArgillasColumnsBecomeMessages) {
  for (const char* text :
       {R"({"instruction": "Q", "chosen_response": "good", "rejected_response": "bad", "chosen_rating": 5.0})",
        R"({"prompt": "Q", "chosen_response": "good", "rejected_response": "bad", "metadata": {"a": [1]}})",
        R"({"question": "Q", "chosen": "good", "rejected": "bad", "system": ""})",
        R"({"input": "Q", "instruction": null, "chosen": "good", "rejected": "bad"})",
        // ultrafeedback-binarized-preferences-cleaned: the question inside the lists, which order their keys otherwise
        R"({"prompt": "Q", "chosen": [{"content": "Q", "role": "user"}, {"content": "good", "role": "assistant"}],
               "rejected": [{"content": "Q", "role": "user"}, {"content": "bad", "role": "assistant"}]})"}) {
    const auto row = ParsePreferenceRow(text);
    ASSERT_TRUE(row.ok()) << row.status() << text;
    EXPECT_TRUE(row->conversational);
    EXPECT_THAT(row->prompt_messages, ElementsAre(kQuestion)) << text;
    EXPECT_THAT(row->chosen_messages, ElementsAre(kGood)) << text;
    EXPECT_THAT(row->rejected_messages, ElementsAre(kBad)) << text;
  }
  const auto row = ParsePreferenceRow(R"({"system": "S", "question": "Q", "chosen": "good", "rejected": "bad"})");
  EXPECT_THAT(row->prompt_messages, ElementsAre(Message{"system", "S"}, kQuestion));
  EXPECT_THAT(ErrorOf(R"({"instruction": 3, "chosen_response": "a", "rejected_response": "b"})"),
              HasSubstr("instruction must be a string"));
}

TEST(ParsePreferenceRow, TranscriptsBecomeMessages) {
  const std::string begin = R"({"chosen": "\n\nHuman: Q\n\nAssistant: Hm.\n\nHuman: And?\n\nAssistant: good",)";
  const auto row =
      ParsePreferenceRow(begin + R"("rejected": "\n\nHuman: Q\n\nAssistant: Hm.\n\nHuman: And?\n\nAssistant:"})");
  ASSERT_TRUE(row.ok()) << row.status();
  EXPECT_THAT(row->prompt_messages, ElementsAre(kQuestion, Message{"assistant", "Hm."}, Message{"user", "And?"}));
  EXPECT_THAT(row->chosen_messages, ElementsAre(kGood));
  EXPECT_THAT(row->rejected_messages, ElementsAre(Message{"assistant", ""}));
  // hh-rlhf has a few rows that end with the human, or that differ from the beginning.
  EXPECT_THAT(ParsePreferenceRow(begin + R"("rejected": "\n\nHuman: Q"})")->dropped,
              HasSubstr("end with the assistant"));
  EXPECT_THAT(ParsePreferenceRow(begin + R"("rejected": "\n\nHuman: P\n\nAssistant: bad"})")->dropped,
              HasSubstr("same prompt"));
  // With a prompt beside them they are texts.
  EXPECT_FALSE(
      ParsePreferenceRow(R"({"prompt": "P", "chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"})")->conversational);
}

TEST(ParsePreferenceRow, ScoresOfEveryNameMakeATie) {
  for (const char* scores :
       {R"("chosen-rating": 4, "rejected-rating": 4)", R"("chosen_rating": 4.0, "rejected_rating": 4)",
        R"("score_chosen": "7", "score_rejected": "7.0")"}) {
    const auto row =
        ParsePreferenceRow(std::string(R"({"prompt": "Q", "chosen": "a", "rejected": "b", )") + scores + "}");
    ASSERT_TRUE(row.ok()) << row.status();
    EXPECT_TRUE(row->tie) << scores;
  }
  EXPECT_FALSE(ParsePreferenceRow(R"({"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": null})")->tie);
}

TEST(ParsePreferenceRow, AnUnknownFormNamesWhatItFoundAndWhatItNeeds) {
  EXPECT_THAT(ErrorOf(R"({"text": "a", "label": 1})"),
              AllOf(HasSubstr("its columns are: label, text"), HasSubstr("instruction, chosen_response"),
                    HasSubstr("docs/data.md")));
  EXPECT_THAT(ErrorOf(R"({"chosen": "[{'role': 'user', 'content': 'Q'}]", "rejected": "[]"})"),
              HasSubstr("Python's notation"));
}

TEST(ParsePreferenceRow, HostileRowsAreErrors) {
  EXPECT_THAT(ErrorOf("{\"chosen\": " + std::string(100000, '[')), HasSubstr("not valid JSON"));
  EXPECT_THAT(ErrorOf("{\"chosen\": " + std::string(100000, '[') + std::string(100000, ']') + "}"),
              HasSubstr("nests too deep"));
  EXPECT_THAT(ErrorOf("{\"" + std::string(1 << 20, 'k') + "\": 1}"), HasSubstr("the row has no chosen"));
  EXPECT_LT(ErrorOf("{\"" + std::string(1 << 20, 'k') + "\": 1}").size(), 1000u);
}

}  // namespace
}  // namespace simpo
