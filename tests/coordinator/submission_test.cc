#include "coordinator/submission.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "testing.h"

namespace simpo {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::string AllText(const std::vector<FieldViolation>& violations) {
  std::string text;
  for (const FieldViolation& violation : violations)
    absl::StrAppend(&text, violation.field, ": ", violation.description, "\n");
  return text;
}

TEST(SubmissionTest, AGoodJob) {
  v1::SubmitJobRequest request = SubmitRequest(JobYaml(2, "priority: 7\nmax_restarts: 1\nlabels: {team: blue}\n"));
  const Submission submission = CheckSubmission(request, 4);
  EXPECT_THAT(AllText(submission.violations), IsEmpty());
  EXPECT_EQ(submission.job.name(), "test");
  EXPECT_EQ(submission.job.user(), "alice");
  EXPECT_EQ(submission.job.ranks(), 2);
  EXPECT_EQ(submission.job.slots(), 2);
  EXPECT_EQ(submission.job.priority(), 7);
  EXPECT_EQ(submission.job.max_restarts(), 1);
  EXPECT_EQ(submission.job.labels().at("team"), "blue");
  request.set_name("mine");
  EXPECT_EQ(CheckSubmission(request, 4).job.name(), "mine");
}

TEST(SubmissionTest, EverythingWrongIsSaidAtOnce) {
  v1::SubmitJobRequest request = SubmitRequest(
      "model_name_or_path: /no/such/model\ndataset_mixer: {/no/such/data.jsonl: 1.0}\nbetta: 3\nlearning_rate: fast\n"
      "resources: {ranks_per_node: 9, threads_per_rank: 1}\n");
  request.set_request_id(std::string(200, 'x'));
  request.set_base_dir("relative");
  const std::string text = AllText(CheckSubmission(request, 4).violations);
  for (const char* part :
       {"/no/such/model", "/no/such/data.jsonl", "betta", "learning_rate", "need 9 slots", "request_id", "base_dir"}) {
    EXPECT_THAT(text, HasSubstr(part));
  }
}

TEST(SubmissionTest, DigestIsOfWhatIsAskedFor) {
  v1::SubmitJobRequest request = SubmitRequest(JobYaml(), "id-1");
  const std::string digest = RequestDigest(request);
  request.set_request_id("id-2");
  request.set_validate_only(true);
  EXPECT_EQ(RequestDigest(request), digest);
  request.add_overrides("beta=3");
  EXPECT_NE(RequestDigest(request), digest);
}

TEST(SubmissionTest, AnOutputFolderIsNotWrittenOver) {
  TempDir dir;
  JobConfig config;
  EXPECT_THAT(CheckOutputDir(config, dir / "new"), IsEmpty());
  EXPECT_THAT(CheckOutputDir(config, dir.path()), IsEmpty());
  WriteText(dir / "metrics.jsonl", "{}\n");
  EXPECT_THAT(AllText(CheckOutputDir(config, dir.path())), HasSubstr("not empty"));
  EXPECT_THAT(AllText(CheckOutputDir(config, dir / "metrics.jsonl")), HasSubstr("not a folder"));
  config.overwrite_output_dir = true;
  EXPECT_THAT(CheckOutputDir(config, dir.path()), IsEmpty());
  config = {.resume_from_checkpoint = "true"};
  EXPECT_THAT(CheckOutputDir(config, dir.path()), IsEmpty());
}

TEST(SubmissionTest, GlobsMustMatchSomething) {
  TempDir dir;
  WriteText(dir / "rows/part-1.jsonl", "{}\n");
  const auto problem = [&](const std::string& data, const std::string& more = "") {
    v1::SubmitJobRequest request = SubmitRequest(absl::StrCat("model_name_or_path: org/model\ndataset_mixer: {'", data,
                                                              "': 1.0}\nglobal_batch_size: 8\n", more));
    request.set_base_dir(dir.path());
    return AllText(CheckSubmission(request, 64).violations);
  };
  for (const std::string& data : {std::string("rows/part-*.jsonl"), std::string("rows/*"),
                                  std::string("r*s/part-?.jsonl"), std::string(dir / "rows/part-[0-9].jsonl")}) {
    EXPECT_EQ(problem(data), "") << data;
  }
  EXPECT_EQ(problem("org/data", "eval_dataset_mixer: {'rows/part-*.jsonl': 1.0}\n"), "");
  for (const char* data : {"rows/part-*.parquet", "none/*"}) EXPECT_THAT(problem(data), HasSubstr("matches no file"));
  EXPECT_THAT(problem("rows/*", "resume_from_checkpoint: ./rows/part-*\n"), HasSubstr("does not exist"));
}

TEST(SubmissionTest, NamesBecomeFileNames) {
  EXPECT_EQ(FileNameOf("my job/1"), "my-job-1");
  EXPECT_EQ(FileNameOf("../up"), "job..-up");
  EXPECT_EQ(FileNameOf(std::string(200, 'a')).size(), 64u);
}

}  // namespace
}  // namespace simpo
