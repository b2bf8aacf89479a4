#include "coordinator/tokens.h"

#include <gmock/gmock.h>
#include <sys/stat.h>

#include "testing.h"

namespace simpo {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr int64_t kNow = 1'800'000'000;
constexpr int64_t kDay = 86'400;

class TokensTest : public ::testing::Test {
 protected:
  NewToken Add(Role role, const std::string& user, int days = 1) {
    const NewToken made = ValueOf(MakeToken(role, user, days, kNow));
    EXPECT_TRUE(AddToken(file_, made.token).ok());
    return made;
  }
  TempDir dir_;
  const std::filesystem::path file_ = dir_ / "tokens.json";
};

TEST(SecretsEqualTest, ByContent) {
  EXPECT_TRUE(SecretsEqual("abc", "abc"));
  EXPECT_FALSE(SecretsEqual("abc", "abd"));
  EXPECT_FALSE(SecretsEqual("abc", "abcd"));
  EXPECT_FALSE(SecretsEqual("", "abc"));
}

TEST_F(TokensTest, TheFileHoldsNothingThatLetsAnybodyIn) {
  const NewToken made = Add(Role::kSubmit, "alice");
  const std::string text = ReadText(file_);
  const std::string secret = made.text.substr(made.text.rfind('_') + 1);
  EXPECT_EQ(secret.size(), 64u);
  EXPECT_THAT(text, Not(HasSubstr(secret)));
  struct stat info = {};
  ASSERT_EQ(stat(file_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
  EXPECT_NE(Add(Role::kSubmit, "alice").text, made.text);
}

TEST_F(TokensTest, FoundByTheTextAndNothingElse) {
  const NewToken alice = Add(Role::kSubmit, "alice"), bob = Add(Role::kRead, "bob");
  TokenStore store(file_);
  EXPECT_TRUE(store.Required());
  const Token found = ValueOf(store.Find(alice.text, kNow));
  EXPECT_EQ(found.user, "alice");
  EXPECT_EQ(found.role, Role::kSubmit);
  EXPECT_EQ(ValueOf(store.Find(bob.text, kNow)).role, Role::kRead);
  std::string changed = alice.text;
  changed.back() = changed.back() == '0' ? '1' : '0';
  for (const std::string& wrong : {std::string(), std::string("simpo_"), changed, alice.text + "0", alice.token.sha256,
                                   "simpo_" + alice.token.id}) {
    EXPECT_EQ(store.Find(wrong, kNow).status().code(), absl::StatusCode::kUnauthenticated) << wrong;
  }
}

TEST_F(TokensTest, ExpiresAndIsRevokedWhileTheCoordinatorRuns) {
  const NewToken day = Add(Role::kRead, "alice", 1), ever = Add(Role::kRead, "bob", 0);
  TokenStore store(file_);
  EXPECT_TRUE(store.Find(day.text, kNow + kDay - 1).ok());
  const absl::Status late = store.Find(day.text, kNow + kDay).status();
  EXPECT_EQ(late.code(), absl::StatusCode::kUnauthenticated);
  EXPECT_THAT(std::string(late.message()), HasSubstr("expired"));
  EXPECT_TRUE(store.Find(ever.text, kNow + 1000 * kDay).ok());
  ASSERT_OK(RevokeToken(file_, ever.token.id));
  EXPECT_EQ(store.Find(ever.text, kNow).status().code(), absl::StatusCode::kUnauthenticated);
  EXPECT_TRUE(store.Find(day.text, kNow).ok());
  EXPECT_EQ(RevokeToken(file_, ever.token.id).code(), absl::StatusCode::kNotFound);
  ASSERT_OK(RevokeToken(file_, day.token.id));
  EXPECT_TRUE(store.Required()) << "without any token nobody gets in";
}

TEST_F(TokensTest, TheDoorStaysShutWhenTheFileCannotBeUsed) {
  TokenStore store(file_);
  EXPECT_FALSE(store.Required());
  const NewToken made = Add(Role::kAdmin, "root");
  EXPECT_TRUE(store.Required()) << "the first token counts at once";
  ASSERT_EQ(chmod(file_.c_str(), 0644), 0);
  absl::Status status = store.Find(made.text, kNow).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("chmod 600"));
  ASSERT_EQ(chmod(file_.c_str(), 0600), 0);
  EXPECT_TRUE(store.Find(made.text, kNow).ok());
  const std::string good = ReadText(file_);
  for (const char* damaged : {"", "{", "[{}]", "[1]", R"([{"id":"a","sha256":"b","role":"king","user":"c"}])"}) {
    WriteText(file_, damaged);
    EXPECT_EQ(store.Find(made.text, kNow).status().code(), absl::StatusCode::kUnavailable) << damaged;
  }
  std::filesystem::remove(file_);
  EXPECT_TRUE(store.Required());
  EXPECT_EQ(store.Find(made.text, kNow).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(TokensTest, AFileThatIsLostBetweenTwoCoordinatorsShutsTheDoorToo) {
  EXPECT_FALSE(TokenStore(file_).Required());
  const NewToken first = Add(Role::kAdmin, "ada");
  EXPECT_TRUE(TokenStore(file_).Required());
  std::filesystem::remove(file_);
  TokenStore next(file_);
  EXPECT_TRUE(next.Required());
  const absl::Status status = next.Find(first.text, kNow).status();
  EXPECT_TRUE(absl::IsUnavailable(status));
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr(file_.string()), HasSubstr("token create")));
  const NewToken second = Add(Role::kAdmin, "ada");
  EXPECT_TRUE(next.Find(second.text, kNow).ok());
}

TEST_F(TokensTest, EachChangeOfWhatCanBeUsedIsLoggedOnce) {
  TokenStore store(file_);
  const NewToken made = Add(Role::kAdmin, "root");
  const auto log = [&] {
    testing::internal::CaptureStderr();
    for (int i = 0; i < 3; ++i) std::ignore = store.Find(made.text, kNow);
    return testing::internal::GetCapturedStderr();
  };
  EXPECT_EQ(log(), "");
  ASSERT_EQ(chmod(file_.c_str(), 0666), 0);
  const std::string shut = log();
  EXPECT_THAT(shut, AllOf(HasSubstr(" W "), HasSubstr("nobody gets in"), HasSubstr("chmod 600 " + file_.string())));
  EXPECT_EQ(std::count(shut.begin(), shut.end(), '\n'), 1);
  ASSERT_EQ(chmod(file_.c_str(), 0600), 0);
  EXPECT_THAT(log(), HasSubstr("can be used again"));
}

TEST_F(TokensTest, AnErrorThatPassesLocksNobodyOutForGood) {
  TokenStore store(file_);
  const NewToken made = Add(Role::kAdmin, "root");
  absl::Status status;
  {
    const NoMoreFiles none;
    status = store.Find(made.text, kNow).status();
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("Too many open files"));
  ASSERT_OK(store.Find(made.text, kNow).status());
}

TEST_F(TokensTest, BadNamesAndDays) {
  for (const std::string& user : {std::string(), std::string("a\nb"), std::string(129, 'x')}) {
    EXPECT_EQ(MakeToken(Role::kRead, user, 1, kNow).status().code(), absl::StatusCode::kInvalidArgument);
  }
  EXPECT_FALSE(MakeToken(Role::kRead, "a", -1, kNow).ok());
  EXPECT_FALSE(MakeToken(Role::kRead, "a", 1'000'000, kNow).ok());
}

}  // namespace
}  // namespace simpo
