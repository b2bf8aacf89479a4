#include "coordinator/guard.h"

#include <gmock/gmock.h>
#include <sys/stat.h>

#include <nlohmann/json.hpp>

#include "absl/strings/str_split.h"
#include "coordinator/rpc_errors.h"
#include "simpo/v1/error_details.pb.h"
#include "testing.h"

namespace simpo {
namespace {

using ::testing::HasSubstr;

class GuardTest : public ::testing::Test {
 protected:
  std::string MakeTokenOf(Role role, const std::string& user, int days = 1, int64_t now_s = time(nullptr)) {
    const NewToken made = ValueOf(MakeToken(role, user, days, now_s));
    EXPECT_TRUE(AddToken(dir_ / "tokens.json", made.token).ok());
    return made.text;
  }
  Guard::Options Options() { return {.token_file = dir_ / "tokens.json", .audit = &audit_, .refusals = &refusals_}; }
  static Guard::Credentials Bearer(const std::string& token) {
    return {.authorization = "Bearer " + token, .peer = "ipv4:10.0.0.1:5"};
  }
  static std::string ReasonOf(const absl::Status& status) {
    v1::RpcStatus details;
    EXPECT_TRUE(details.ParseFromString(ToGrpcStatus(status).error_details()));
    v1::ErrorInfo info;
    for (const auto& any : details.details()) {
      if (any.type_url() == "type.googleapis.com/google.rpc.ErrorInfo") info.ParseFromString(any.value());
    }
    return info.reason();
  }
  std::vector<nlohmann::json> Refusals() {
    std::vector<nlohmann::json> lines;
    for (absl::string_view line : absl::StrSplit(ReadText(dir_ / "audit-refused.jsonl"), '\n', absl::SkipEmpty())) {
      lines.push_back(nlohmann::json::parse(line));
    }
    return lines;
  }
  TempDir dir_;
  AuditLog audit_{dir_ / "audit.jsonl", /*max_bytes=*/10'000, /*kept=*/1};
  AuditLog refusals_{dir_ / "audit-refused.jsonl", /*max_bytes=*/10'000, /*kept=*/1};
};

TEST_F(GuardTest, WithoutTokensEverybodyMayDoAll) {
  Guard guard(Options());
  EXPECT_FALSE(guard.asks());
  const Caller caller = ValueOf(guard.Admit("TrainingService/CancelJob", {.peer = "here"}, "x"));
  EXPECT_EQ(caller.role, Role::kAdmin);
  EXPECT_EQ(caller.user, "");
}

TEST_F(GuardTest, EachRoleMayWhatTheTableSays) {
  Guard guard(Options());
  const std::string read = MakeTokenOf(Role::kRead, "rita"), submit = MakeTokenOf(Role::kSubmit, "sam"),
                    admin = MakeTokenOf(Role::kAdmin, "ada");
  const auto code = [&](const char* method, const std::string& token) {
    return guard.Admit(method, Bearer(token), "").status().code();
  };
  constexpr auto kYes = absl::StatusCode::kOk, kNo = absl::StatusCode::kPermissionDenied;
  for (const char* method : {"GetJob", "ListJobs", "WatchJob", "StreamLogs", "ListMetrics", "GetServerInfo"}) {
    const std::string name = absl::StrCat("TrainingService/", method);
    for (const std::string& token : {read, submit, admin}) EXPECT_EQ(code(name.c_str(), token), kYes) << name;
  }
  for (const char* name : {"TrainingService/SubmitJob", "TrainingService/CancelJob"}) {
    EXPECT_EQ(code(name, read), kNo);
    EXPECT_EQ(code(name, submit), kYes);
    EXPECT_EQ(code(name, admin), kYes);
  }
  // What has no row, or is not for users, is refused to all.
  for (const char* name : {"TrainingService/NewMethod", "WorkerService/Attach", "", "GetJob"}) {
    EXPECT_EQ(code(name, admin), kNo) << name;
  }
}

TEST_F(GuardTest, RefusalsSayWhatToDoAndCarryAReason) {
  Guard guard(Options());
  const std::string read = MakeTokenOf(Role::kRead, "rita");
  const std::string old = MakeTokenOf(Role::kAdmin, "olga", 1, time(nullptr) - 2 * 86'400);
  const auto refusal = [&](const Guard::Credentials& credentials) {
    return guard.Admit("TrainingService/CancelJob", credentials, "job7").status();
  };
  const struct {
    absl::Status status;
    absl::StatusCode code;
    const char *reason, *words;
  } kCases[] = {
      {refusal({}), absl::StatusCode::kUnauthenticated, "TOKEN_MISSING", "SIMPO_TOKEN"},
      {refusal({.authorization = "Basic abc"}), absl::StatusCode::kUnauthenticated, "TOKEN_MALFORMED", "Bearer TOKEN"},
      {refusal(Bearer("simpo_no")), absl::StatusCode::kUnauthenticated, "TOKEN_INVALID", "token create"},
      {refusal(Bearer(old)), absl::StatusCode::kUnauthenticated, "TOKEN_INVALID", "expired"},
      {refusal(Bearer(read)), absl::StatusCode::kPermissionDenied, "ROLE_TOO_LOW", "--role submit"},
  };
  for (const auto& expected : kCases) {
    EXPECT_EQ(expected.status.code(), expected.code);
    EXPECT_EQ(ReasonOf(expected.status), expected.reason);
    EXPECT_THAT(std::string(expected.status.message()), HasSubstr(expected.words));
  }
  const std::vector<nlohmann::json> lines = Refusals();
  ASSERT_EQ(lines.size(), std::size(kCases)) << "one line for each refusal";
  EXPECT_EQ(lines.back()["user"], "rita");
  EXPECT_EQ(lines.back()["role"], "read");
  EXPECT_EQ(lines.back()["method"], "CancelJob");
  EXPECT_EQ(lines.back()["job"], "job7");
  EXPECT_EQ(lines.back()["outcome"], "PERMISSION_DENIED");
  EXPECT_EQ(lines.back()["peer"], "ipv4:10.0.0.1:5");
  for (const std::string& token : {read, old}) {
    EXPECT_THAT(ReadText(dir_ / "audit-refused.jsonl"), ::testing::Not(HasSubstr(token)));
  }
}

// Nobody drives what was done out of the audit log by calls that are refused, with a token or without.
TEST_F(GuardTest, RefusalsLeaveTheLogOfChangesAlone) {
  Guard guard(Options());
  const Caller ada = ValueOf(guard.Admit("TrainingService/CancelJob", Bearer(MakeTokenOf(Role::kAdmin, "ada")), ""));
  guard.Note("TrainingService/CancelJob", ada, "job7", absl::OkStatus());
  const std::string before = ReadText(dir_ / "audit.jsonl");
  EXPECT_THAT(before, HasSubstr("job7"));
  for (int i = 0; i < 500; ++i) {
    EXPECT_FALSE(guard.Admit("TrainingService/CancelJob", Bearer("simpo_no"), "job8").ok());
    guard.Note("TrainingService/CancelJob", ada, "job9", absl::NotFoundError("no such job"));
  }
  EXPECT_EQ(ReadText(dir_ / "audit.jsonl"), before);
  EXPECT_TRUE(std::filesystem::exists(dir_ / "audit-refused.1.jsonl"));
  EXPECT_EQ(Refusals().back()["job"], "job9");
  EXPECT_EQ(Refusals().back()["role"], "admin");
}

TEST_F(GuardTest, OnlyOnesOwnJobsAreChanged) {
  v1::Job job;
  job.set_id("abc");
  job.set_user("sam");
  EXPECT_TRUE(Guard::CheckMayChange({.user = "sam", .role = Role::kSubmit}, job).ok());
  EXPECT_TRUE(Guard::CheckMayChange({.user = "ada", .role = Role::kAdmin}, job).ok());
  const absl::Status status = Guard::CheckMayChange({.user = "sue", .role = Role::kSubmit}, job);
  EXPECT_EQ(status.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ(ReasonOf(status), "NOT_YOUR_JOB");
}

TEST_F(GuardTest, ClientCertificatesAreAskedFor) {
  Guard::Options options = Options();
  options.client_certificates = true;
  Guard guard(options);
  EXPECT_TRUE(guard.asks());
  EXPECT_EQ(ReasonOf(guard.Admit("TrainingService/GetJob", Guard::Credentials{}, "").status()), "CERTIFICATE_MISSING");
  EXPECT_EQ(ValueOf(guard.Admit("TrainingService/GetJob",
                                Guard::Credentials{.certificate = true, .certificate_name = "carl"}, ""))
                .user,
            "carl");
  // With tokens both are asked for, and the token says who it is.
  const std::string token = MakeTokenOf(Role::kRead, "rita");
  Guard::Credentials both = Bearer(token);
  EXPECT_EQ(ReasonOf(guard.Admit("TrainingService/GetJob", both, "").status()), "CERTIFICATE_MISSING");
  both.certificate = true;
  both.certificate_name = "carl";
  EXPECT_EQ(ValueOf(guard.Admit("TrainingService/GetJob", both, "")).user, "rita");
}

TEST_F(GuardTest, TheRateOfEachUserIsLimited) {
  Guard::Options options = Options();
  options.calls_per_second = 5;
  Guard guard(options);
  const std::string sam = MakeTokenOf(Role::kRead, "sam"), sue = MakeTokenOf(Role::kRead, "sue");
  absl::Status status;
  int admitted = 0;
  while ((status = guard.Admit("TrainingService/GetJob", Bearer(sam), "").status()).ok() && admitted < 1000) ++admitted;
  EXPECT_GE(admitted, 10) << "a short burst is allowed";
  EXPECT_LT(admitted, 1000);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(ReasonOf(status), "RATE_LIMITED");
  EXPECT_TRUE(guard.Admit("TrainingService/GetJob", Bearer(sue), "").ok()) << "another user is not held up";
}

TEST(TokenBucketTest, FillsWithTime) {
  using std::chrono::milliseconds;
  TokenBucket::Time now;
  TokenBucket bucket(/*rate=*/10, /*burst=*/2, now);
  EXPECT_TRUE(bucket.Take(now));
  EXPECT_TRUE(bucket.Take(now));
  EXPECT_FALSE(bucket.Take(now));
  EXPECT_FALSE(bucket.Take(now + milliseconds(90)));
  EXPECT_TRUE(bucket.Take(now + milliseconds(110)));
  EXPECT_FALSE(bucket.Take(now + milliseconds(110)));
  now += std::chrono::hours(1);
  EXPECT_TRUE(bucket.Take(now));
  EXPECT_TRUE(bucket.Take(now));
  EXPECT_FALSE(bucket.Take(now)) << "never more than the burst";
}

TEST_F(GuardTest, StreamsOfAUserAreCounted) {
  Guard::Options options = Options();
  options.streams_per_user = 2;
  Guard guard(options);
  const Caller sam{.user = "sam", .role = Role::kRead}, sue{.user = "sue", .role = Role::kRead}, nobody;
  auto first = ValueOf(guard.OpenStream("TrainingService/WatchJob", sam, ""));
  auto second = ValueOf(guard.OpenStream("TrainingService/WatchJob", sam, ""));
  EXPECT_EQ(ReasonOf(guard.OpenStream("TrainingService/WatchJob", sam, "").status()), "TOO_MANY_STREAMS");
  EXPECT_TRUE(guard.OpenStream("TrainingService/WatchJob", sue, "").ok());
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(guard.OpenStream("TrainingService/WatchJob", nobody, "").ok());
  first.reset();
  EXPECT_TRUE(guard.OpenStream("TrainingService/WatchJob", sam, "").ok());
}

TEST(AuditLogTest, OneLineEachAndRotatedBySize) {
  TempDir dir;
  const std::filesystem::path file = dir / "audit.jsonl";
  {
    AuditLog log(file, /*max_bytes=*/2000, /*kept=*/2);
    for (int i = 0; i < 100; ++i) {
      log.Write({.user = absl::StrCat("u", i), .method = "CancelJob", .job = "a\nb\"\xff", .outcome = "OK"});
    }
  }
  std::string text;
  for (const char* name : {"audit.2.jsonl", "audit.1.jsonl", "audit.jsonl"}) {
    ASSERT_TRUE(std::filesystem::exists(dir / name)) << name;
    EXPECT_LE(std::filesystem::file_size(dir / name), 2000u);
    struct stat info = {};
    ASSERT_EQ(stat((dir / name).c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0600u) << name;
    text += ReadText(dir / name);
  }
  EXPECT_FALSE(std::filesystem::exists(dir / "audit.3.jsonl"));
  int next = -1;
  for (absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    const auto json = nlohmann::json::parse(line);
    const int number = std::stoi(json["user"].get<std::string>().substr(1));
    EXPECT_TRUE(next < 0 || number == next) << "in order, none missing: " << line;
    next = number + 1;
  }
  EXPECT_EQ(next, 100);
  // A new program goes on in the same file.
  AuditLog(file, 1 << 20, 2).Write({.user = "later"});
  EXPECT_THAT(ReadText(file), HasSubstr("\"u99\""));
  EXPECT_THAT(ReadText(file), HasSubstr("\"later\""));
}

}  // namespace
}  // namespace simpo
