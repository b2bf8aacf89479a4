#include "worker/data/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "tests/worker/text_golden.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

TEST(Tokenizer, GivesTheIdsOfTheReferenceLibrary) {
  const TextGolden golden;
  ASSERT_GE(golden.numbers["texts"].size(), 20u);
  for (const Json& item : golden.numbers["texts"]) {
    const auto ids = golden.tokenizer->Encode(item["text"].get<std::string>());
    ASSERT_TRUE(ids.ok()) << ids.status();
    EXPECT_EQ(Json(*ids), item["ids"]) << item["text"];
  }
  EXPECT_EQ(golden.tokenizer->vocab_size(), 384);
}

TEST(Tokenizer, KnowsItsSpecialTokens) {
  const TextGolden golden;
  EXPECT_EQ(golden.tokenizer->bos_token(), "<|begin_of_text|>");
  EXPECT_EQ(golden.tokenizer->eos_token(), "<|eot_id|>");
  EXPECT_EQ(Json(golden.tokenizer->Encode("<|begin_of_text|><|eot_id|>").value()),
            (Json{*golden.tokenizer->bos_id(), *golden.tokenizer->eos_id()}));
  EXPECT_EQ(golden.tokenizer->chat_template_source(), "tokenizer_config.json");
}

TEST(Tokenizer, TextThatIsNotUtf8IsAnError) {
  const TextGolden golden;
  const auto ids = golden.tokenizer->Encode("caf\xe9");
  ASSERT_FALSE(ids.ok());
  EXPECT_THAT(std::string(ids.status().message()), HasSubstr("UTF-8"));
}

TEST(Tokenizer, SeveralThreadsMayUseIt) {
  const TextGolden golden;
  std::vector<std::thread> threads;
  std::vector<int> wrong(4, 0);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      for (const Json& item : golden.numbers["texts"]) {
        wrong[i] += Json(golden.tokenizer->Encode(item["text"].get<std::string>()).value()) != item["ids"];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(wrong, testing::Each(0));
}

class TokenizerFolder : public testing::Test {
 protected:
  TokenizerFolder() { fs::copy_file(TextGolden().dir / "tokenizer.json", dir_ / "tokenizer.json"); }
  absl::StatusOr<std::unique_ptr<Tokenizer>> Load() const { return Tokenizer::Load(dir_.path()); }
  std::string Error() const {
    const auto tokenizer = Load();
    return tokenizer.ok() ? "" : std::string(tokenizer.status().message());
  }
  TempDir dir_;
};

TEST_F(TokenizerFolder, NothingIsInventedWhereTheFilesAreSilent) {
  const auto tokenizer = Load();
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_FALSE((*tokenizer)->bos_id().has_value());
  EXPECT_FALSE((*tokenizer)->eos_id().has_value());
  EXPECT_EQ((*tokenizer)->chat_template(), "");
}

TEST_F(TokenizerFolder, NullMeansNone) {
  WriteText(dir_ / "tokenizer_config.json", R"({"bos_token": null, "eos_token": "<|eot_id|>"})");
  WriteText(dir_ / "special_tokens_map.json", R"({"bos_token": "<|begin_of_text|>"})");
  const auto tokenizer = Load();
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_FALSE((*tokenizer)->bos_id().has_value());
  EXPECT_TRUE((*tokenizer)->eos_id().has_value());
}

TEST_F(TokenizerFolder, ReadsTokensAsObjectsAndFromTheMap) {
  WriteText(dir_ / "tokenizer_config.json", R"({"eos_token": {"content": "<|end_of_text|>", "lstrip": false}})");
  WriteText(dir_ / "special_tokens_map.json", R"({"bos_token": {"content": "<|begin_of_text|>"}})");
  const auto tokenizer = Load();
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->eos_token(), "<|end_of_text|>");
  EXPECT_EQ((*tokenizer)->bos_token(), "<|begin_of_text|>");
}

TEST_F(TokenizerFolder, ATemplateFileWinsOverTheConfig) {
  WriteText(dir_ / "tokenizer_config.json",
            R"({"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]})");
  EXPECT_EQ(Load().value()->chat_template(), "D");
  WriteText(dir_ / "chat_template.jinja", "J");
  EXPECT_EQ(Load().value()->chat_template(), "J");
  EXPECT_EQ(Load().value()->chat_template_source(), "chat_template.jinja");
}

TEST_F(TokenizerFolder, TheDigestFollowsTheBehaviour) {
  const std::string plain = Load().value()->digest();
  EXPECT_EQ(Load().value()->digest(), plain);
  WriteText(dir_ / "tokenizer_config.json", R"({"eos_token": "<|eot_id|>"})");
  EXPECT_NE(Load().value()->digest(), plain);
}

TEST_F(TokenizerFolder, MistakesNameTheFile) {
  WriteText(dir_ / "tokenizer_config.json", R"({"bos_token": "<s>"})");
  EXPECT_THAT(Error(),
              AllOf(HasSubstr("tokenizer_config.json"), HasSubstr("bos_token '<s>'"), HasSubstr("vocabulary")));
  WriteText(dir_ / "tokenizer_config.json", "[1]");
  EXPECT_THAT(Error(), HasSubstr("tokenizer_config.json: not a JSON object"));
  fs::remove(dir_ / "tokenizer_config.json");
  WriteText(dir_ / "tokenizer.json", "{\"model\": 3}");
  EXPECT_THAT(Error(), HasSubstr("tokenizer.json: not a tokenizer"));
  fs::remove(dir_ / "tokenizer.json");
  EXPECT_THAT(Error(), AllOf(HasSubstr("has no tokenizer.json"), HasSubstr("save_pretrained")));
}

}  // namespace
}  // namespace simpo
