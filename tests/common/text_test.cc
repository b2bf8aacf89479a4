#include "common/text.h"

#include <gtest/gtest.h>

namespace simpo {
namespace {

TEST(Text, Utf8) {
  size_t bad = 0;
  EXPECT_TRUE(IsValidUtf8("a\xc3\xa9\xe2\x82\xac\xf0\x9f\x98\x80", &bad));
  // A lone continuation, a cut character, overlong forms, a surrogate, beyond U+10FFFF.
  for (const char* text : {"ab\x80", "ab\xc3", "ab\xc0\xaf", "ab\xe0\x80\xaf", "ab\xf0\x80\x80\xaf", "ab\xed\xa0\x80",
                           "ab\xf4\x90\x80\x80", "ab\xff"}) {
    EXPECT_FALSE(IsValidUtf8(text, &bad)) << text;
    EXPECT_EQ(bad, 2u);
  }
}

TEST(Text, AnythingBecomesUtf8) {
  EXPECT_EQ(ToUtf8("a\xc3\xa9\n"), "a\xc3\xa9\n");
  EXPECT_EQ(ToUtf8("a\xff\xc3"), "a??");
  EXPECT_EQ(ToUtf8(std::string("\0", 1)), std::string("\0", 1));
  EXPECT_EQ(ToUtf8(""), "");
}

TEST(Text, ACutIsShownAndLeavesCharactersWhole) {
  EXPECT_EQ(ToUtf8("abcdef", 6), "abcdef");
  EXPECT_EQ(ToUtf8("abcdefg", 6), "abc...");
  EXPECT_EQ(ToUtf8("a\xe2\x82\xac\xe2\x82\xac", 7), "a\xe2\x82\xac\xe2\x82\xac");
  EXPECT_EQ(ToUtf8("a\xe2\x82\xac\xe2\x82\xac", 6), "a...");
  EXPECT_EQ(ToUtf8("abcd", 2), "");
}

TEST(Text, OneLineHasNoControlCharacters) {
  EXPECT_EQ(OneLine("a\r\n\tb\x1b[2J\x7f"), "a   b [2J ");
  EXPECT_EQ(OneLine("\xc2\x9b\xc2\xa0"), " \xc2\xa0") << "U+009B is one, U+00A0 is none";
  EXPECT_EQ(OneLine("a\nb\nc\nd", 6), "a b...");
}

}  // namespace
}  // namespace simpo
