#include "worker/data/chat_template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/text_golden.h"

namespace simpo {
namespace {

using Json = nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

absl::StatusOr<std::string> Render(std::string_view source, std::vector<Message> messages = {{"user", "hi"}}) {
  const auto chat_template = ChatTemplate::Parse(source);
  if (!chat_template.ok()) return chat_template.status();
  return (*chat_template)->Render(messages, /*add_generation_prompt=*/false, "<s>", "</s>");
}

TEST(ChatTemplate, RendersAsTransformersDoes) {
  const TextGolden golden;
  int errors = 0;
  ASSERT_GE(golden.numbers["renderings"].size(), 40u);
  for (const Json& item : golden.numbers["renderings"]) {
    SCOPED_TRACE(item.dump());
    const std::string source = golden.numbers["templates"][item["template"].get<std::string>()];
    const auto chat_template = ChatTemplate::Parse(source);
    ASSERT_TRUE(chat_template.ok()) << chat_template.status();
    std::vector<Message> messages;
    for (const Json& message : item["messages"]) messages.push_back({message["role"], message["content"]});
    const auto text = (*chat_template)
                          ->Render(messages, item["add_generation_prompt"], golden.tokenizer->bos_token(),
                                   golden.tokenizer->eos_token());
    if (item.contains("error")) {
      ++errors;
      ASSERT_FALSE(text.ok());
      EXPECT_THAT(std::string(text.status().message()), HasSubstr(item["error"].get<std::string>()));
    } else {
      ASSERT_TRUE(text.ok()) << text.status();
      EXPECT_EQ(*text, item["text"].get<std::string>());
    }
  }
  EXPECT_GT(errors, 0);
}

TEST(ChatTemplate, AMistakeNamesItsLine) {
  const auto parsed = ChatTemplate::Parse("{{ messages }}\n{% if %}");
  ASSERT_FALSE(parsed.ok());
  EXPECT_THAT(std::string(parsed.status().message()), HasSubstr("line 2 of the chat template"));
  const auto rendered = Render("\n\n{{ messages[0].content.no_such_method() }}");
  ASSERT_FALSE(rendered.ok());
  EXPECT_THAT(std::string(rendered.status().message()), AllOf(HasSubstr("line 3"), HasSubstr("no_such_method")));
}

TEST(ChatTemplate, EmptyTokensAreUndefined) {
  const auto chat_template = ChatTemplate::Parse("{{ bos_token is defined }} {{ eos_token is defined }}");
  ASSERT_TRUE(chat_template.ok());
  const std::vector<Message> messages = {{"user", "hi"}};
  EXPECT_EQ((*chat_template)->Render(messages, false, "", "</s>").value(), "False True");
}

// A template is a stranger's program: it must not hold up or fill the machine.
TEST(ChatTemplate, WorkAndOutputAreBounded) {
  EXPECT_FALSE(Render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}").ok());
  EXPECT_FALSE(Render("{% for a in range(99999) %}{{ messages[0].content * 9999 }}{% endfor %}").ok());
  EXPECT_FALSE(Render("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").ok());
  EXPECT_FALSE(Render("{% include '/etc/passwd' %}").ok());
}

TEST(ChatTemplate, SpecialCharactersPassThrough) {
  const std::string text = "a \"quoted\" <b> & \\ {{ braces }} \u00e9 \U0001f600\n";
  EXPECT_EQ(Render("{{ messages[0].content }}", {{"user", text}}).value(), text);
}

TEST(DefaultChatTemplate, IsTheFamilysOrChatMl) {
  std::string name;
  const auto mistral = ChatTemplate::Parse(DefaultChatTemplate("mistral", &name));
  ASSERT_TRUE(mistral.ok()) << mistral.status();
  EXPECT_EQ(name, "default of mistral");
  const std::vector<Message> messages = {{"system", "Be brief."}, {"user", "Q"}, {"assistant", "A"}};
  EXPECT_EQ((*mistral)->Render(messages, false, "<s>", "</s>").value(), "<s>[INST] Be brief.\n\nQ [/INST] A</s>");
  const auto chatml = ChatTemplate::Parse(DefaultChatTemplate("llama", &name));
  EXPECT_EQ(name, "ChatML");
  EXPECT_EQ((*chatml)->Render(std::span(messages).subspan(1, 1), true, "", "").value(),
            "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n");
}

}  // namespace
}  // namespace simpo
