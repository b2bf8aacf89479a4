#include "worker/data/tokenize_pairs.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/worker/text_golden.h"

namespace simpo {
namespace {

using Json = nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

class TokenizeRowTest : public testing::Test {
 protected:
  absl::StatusOr<TokenizedRow> Tokenize(const PreferenceRow& row, const TokenizeRules& rules = {}) const {
    return TokenizeRow(row, *golden_.tokenizer, golden_.chat_template.get(), rules);
  }
  OwnedPair Pair(const PreferenceRow& row, const TokenizeRules& rules = {}) const {
    const auto tokens = Tokenize(row, rules);
    EXPECT_TRUE(tokens.ok() && tokens->pair) << tokens.status() << (tokens.ok() ? tokens->dropped : "");
    return tokens.ok() && tokens->pair ? *tokens->pair : OwnedPair{};
  }
  static PreferenceRow Texts(const std::string& prompt, const std::string& chosen, const std::string& rejected) {
    return {.prompt = prompt, .chosen = chosen, .rejected = rejected};
  }
  std::string DroppedFor(const PreferenceRow& row, const TokenizeRules& rules = {}) const {
    const auto tokens = Tokenize(row, rules);
    return tokens.ok() && !tokens->pair ? tokens->dropped : "";
  }
  int64_t CountOf(const std::vector<int32_t>& ids, int32_t id) const { return std::count(ids.begin(), ids.end(), id); }

  const TextGolden golden_;
  const int32_t bos_ = *golden_.tokenizer->bos_id();
  const int32_t eos_ = *golden_.tokenizer->eos_id();
};

TEST_F(TokenizeRowTest, GivesTheTokensThatTrlTrainsOn) {
  TokenizeRules rules;
  rules.max_length = golden_.numbers["max_length"];
  int truncated = 0;
  int dropped = 0;
  ASSERT_GE(golden_.numbers["rows"].size(), 12u);
  for (const Json& item : golden_.numbers["rows"]) {
    SCOPED_TRACE(item["row"].get<std::string>());
    const auto row = ParsePreferenceRow(item["row"].get<std::string>());
    ASSERT_TRUE(row.ok()) << row.status();
    const auto tokens = Tokenize(*row, rules);
    ASSERT_TRUE(tokens.ok()) << tokens.status();
    const Json& want = item["tokens"];
    if (want.is_null()) {
      // TRL trains on an empty response there, and gets NaN.
      EXPECT_FALSE(tokens->pair.has_value());
      EXPECT_THAT(tokens->dropped, HasSubstr("no room"));
      ++dropped;
      continue;
    }
    ASSERT_TRUE(tokens->pair.has_value()) << tokens->dropped;
    EXPECT_EQ(Json(tokens->pair->chosen), want["chosen"]);
    EXPECT_EQ(Json(tokens->pair->rejected), want["rejected"]);
    EXPECT_EQ(tokens->pair->chosen_prompt_length, want["chosen_prompt_length"]);
    EXPECT_EQ(tokens->pair->rejected_prompt_length, want["rejected_prompt_length"]);
    EXPECT_EQ(tokens->pair->truncated, want["chosen"].size() == static_cast<size_t>(rules.max_length) ||
                                           want["rejected"].size() == static_cast<size_t>(rules.max_length));
    truncated += tokens->pair->truncated;
  }
  EXPECT_GE(truncated, 2);
  EXPECT_GE(dropped, 1);
}

TEST_F(TokenizeRowTest, ExactlyOneBosAndOneEosAtTheEnd) {
  for (const PreferenceRow& row : {Texts("Q", " a", " b"), Texts("<|begin_of_text|>Q", " a<|eot_id|>", " b"),
                                   PreferenceRow{.conversational = true,
                                   .prompt_messages = {{"user", "Q"}},
                                   .chosen_messages = {{"assistant", "a"}},
                                   .rejected_messages = {{"assistant", "b"}}}}) {
    const OwnedPair pair = Pair(row);
    for (const auto& [ids, prompt] :
         {std::pair(pair.chosen, pair.chosen_prompt_length), std::pair(pair.rejected, pair.rejected_prompt_length)}) {
      EXPECT_EQ(ids.front(), bos_);
      EXPECT_EQ(CountOf(ids, bos_), 1);
      EXPECT_EQ(ids.back(), eos_);
      EXPECT_EQ(std::count(ids.begin() + prompt, ids.end(), eos_), 1);
    }
  }
}

TEST_F(TokenizeRowTest, NoTokenIsInventedWhereTheTokenizerHasNone) {
  const TempDir dir;
  std::filesystem::copy_file(golden_.dir / "tokenizer.json", dir / "tokenizer.json");
  const std::unique_ptr<Tokenizer> bare = Tokenizer::Load(dir.path()).value();
  const auto tokens = TokenizeRow(Texts("Q", " a", " b"), *bare, nullptr, {});
  ASSERT_TRUE(tokens.ok() && tokens->pair);
  EXPECT_EQ(Json(tokens->pair->chosen), Json(bare->Encode("Q a").value()));
  const auto empty = TokenizeRow(Texts("", " a", " b"), *bare, nullptr, {});
  ASSERT_TRUE(empty.ok());
  EXPECT_THAT(empty->dropped, HasSubstr("no BOS"));
}

TEST_F(TokenizeRowTest, GivesTheTokensOfThePapersTrainer) {
  ASSERT_GE(golden_.numbers["princeton_rows"].size(), 72u);
  int truncated = 0;
  for (const Json& item : golden_.numbers["princeton_rows"]) {
    SCOPED_TRACE(item.dump());
    const auto row = ParsePreferenceRow(item["row"].get<std::string>());
    ASSERT_TRUE(row.ok()) << row.status();
    const std::string name = item["template"];
    const std::string source = name == "mistral" ? std::string(PrincetonMistralTemplate())
                                                 : golden_.numbers["templates"][name].get<std::string>();
    const auto chat_template = ChatTemplate::Parse(source).value();
    const TokenizeRules rules{
        .max_length = 220, .max_prompt_length = 90, .keep_end = item["keep"] == "keep_end", .princeton = true};
    const auto tokens = TokenizeRow(*row, *golden_.tokenizer, chat_template.get(), rules);
    ASSERT_TRUE(tokens.ok() && tokens->pair) << tokens.status() << tokens->dropped;
    EXPECT_EQ(Json(tokens->pair->chosen), item["tokens"]["chosen"]);
    EXPECT_EQ(Json(tokens->pair->rejected), item["tokens"]["rejected"]);
    EXPECT_EQ(tokens->pair->chosen_prompt_length, item["tokens"]["chosen_prompt_length"]);
    EXPECT_EQ(tokens->pair->rejected_prompt_length, item["tokens"]["rejected_prompt_length"]);
    truncated += tokens->pair->truncated;
  }
  EXPECT_GE(truncated, 10);
}

// A template may know a system message only to refuse it.
TEST_F(TokenizeRowTest, NoEmptySystemMessageWhereTheTemplateRefusesIt) {
  const auto refusing = ChatTemplate::Parse(
      "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
      "<{{ m.content }}>{% endfor %}");
  PreferenceRow row{.where = "a.jsonl:3",
                    .conversational = true,
                    .prompt_messages = {{"user", "Q"}},
                    .chosen_messages = {{"assistant", "a"}},
                    .rejected_messages = {{"assistant", "b"}}};
  const TokenizeRules rules{.max_prompt_length = 100, .princeton = true};
  EXPECT_TRUE(TokenizeRow(row, *golden_.tokenizer, refusing->get(), rules)->pair.has_value());
  row.prompt_messages.insert(row.prompt_messages.begin(), {"system", "S"});
  const auto refused = TokenizeRow(row, *golden_.tokenizer, refusing->get(), rules);
  EXPECT_THAT(std::string(refused.status().message()), AllOf(HasSubstr("a.jsonl:3"), HasSubstr("no system here")));
}

TEST_F(TokenizeRowTest, APairThatFitsIsNeverTouched) {
  const PreferenceRow row = Texts("one two three four five six", " yes", " no");
  const OwnedPair whole = Pair(row);
  const auto longest = static_cast<int32_t>(std::max(whole.chosen.size(), whole.rejected.size()));
  const OwnedPair fits = Pair(row, {.max_length = longest, .max_prompt_length = 2});
  EXPECT_EQ(fits.chosen, whole.chosen);
  EXPECT_FALSE(fits.truncated);
}

TEST_F(TokenizeRowTest, TruncationCutsThePromptThenEachResponseOnItsOwnBudget) {
  const PreferenceRow row =
      Texts("one two three four five six", std::string(" yes and yes and yes and yes and yes"), " no");
  const OwnedPair whole = Pair(row);
  const std::vector<int32_t> prompt(whole.chosen.begin(), whole.chosen.begin() + whole.chosen_prompt_length);
  const int32_t limit = whole.chosen_prompt_length + 4;

  // Without max_prompt_length only the response that is too long is cut.
  const OwnedPair responses = Pair(row, {.max_length = limit});
  EXPECT_TRUE(responses.truncated);
  EXPECT_EQ(responses.chosen, std::vector<int32_t>(whole.chosen.begin(), whole.chosen.begin() + limit));
  EXPECT_EQ(responses.rejected, whole.rejected);

  const OwnedPair end = Pair(row, {.max_length = limit, .max_prompt_length = 5, .keep_end = true});
  ASSERT_EQ(end.chosen_prompt_length, 5);
  EXPECT_EQ(end.chosen[0], bos_);  // BOS stays
  EXPECT_TRUE(std::equal(end.chosen.begin() + 1, end.chosen.begin() + 5, prompt.end() - 4));
  EXPECT_EQ(end.rejected_prompt_length, 5);
  EXPECT_LE(static_cast<int32_t>(end.chosen.size()), limit);

  const OwnedPair start = Pair(row, {.max_length = limit, .max_prompt_length = 5, .keep_end = false});
  ASSERT_EQ(start.chosen_prompt_length, 5);
  EXPECT_TRUE(std::equal(start.chosen.begin(), start.chosen.begin() + 5, prompt.begin()));
}

TEST_F(TokenizeRowTest, DropsWhatCannotBeTrainedOn) {
  EXPECT_EQ(DroppedFor(Texts("Q", " a", " a")), "identical responses");
  EXPECT_EQ(DroppedFor(Texts("Q", "", " a")), "empty response");
  EXPECT_THAT(DroppedFor(Texts("one two three four five six seven", " a", " b"), {.max_length = 5}),
              HasSubstr("no room"));
  // Different texts that are the same once they are cut.
  EXPECT_EQ(DroppedFor(Texts("Q", " one two three", " one two four"), {.max_length = 4}), "identical responses");
  PreferenceRow tie = Texts("Q", " a", " b");
  tie.tie = true;
  EXPECT_EQ(DroppedFor(tie, {.drop_ties = true}), "equal scores");
  EXPECT_EQ(DroppedFor(tie), "");
}

TEST_F(TokenizeRowTest, ATemplateThatCannotRenderARowNamesIt) {
  const auto alternating = ChatTemplate::Parse(golden_.numbers["templates"]["instructions"].get<std::string>());
  const PreferenceRow row{.where = "rows.jsonl:17",
                          .conversational = true,
                          .prompt_messages = {{"user", "Q"}, {"user", "Q again"}},
                          .chosen_messages = {{"assistant", "a"}},
                          .rejected_messages = {{"assistant", "b"}}};
  const auto tokens = TokenizeRow(row, *golden_.tokenizer, alternating->get(), {});
  ASSERT_FALSE(tokens.ok());
  EXPECT_EQ(tokens.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(tokens.status().message()), AllOf(HasSubstr("rows.jsonl:17"), HasSubstr("must alternate")));
}

}  // namespace
}  // namespace simpo
