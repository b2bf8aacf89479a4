#include "coordinator/submission.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

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

TEST(SubmissionTest, AnOutputFolderMustBePossible) {
  TempDir dir;
  const auto problem = [](const std::filesystem::path& folder) { return AllText(CheckOutputDir({}, folder)); };
  EXPECT_EQ(problem(dir / "many/new/folders"), "");
  WriteText(dir / "file", "");
  EXPECT_THAT(problem(dir / "file/below/it"), HasSubstr((dir / "file").string() + "' on "));
  EXPECT_THAT(problem(dir / "file/below/it"), HasSubstr("is not a folder"));
  EXPECT_EQ(problem(dir / std::string(255, 'a') / "x"), "");
  EXPECT_THAT(problem(dir / std::string(256, 'a') / "x"), HasSubstr("255 bytes"));
  std::string deep = dir.path();
  while (deep.size() < 4000) deep += "/" + std::string(100, 'd');
  EXPECT_THAT(problem(deep), HasSubstr("bytes"));
  if (geteuid() == 0) return;  // may write everywhere
  std::filesystem::create_directories(dir / "closed");
  std::filesystem::permissions(dir / "closed", std::filesystem::perms::owner_read);
  EXPECT_THAT(problem(dir / "closed/new"), HasSubstr("cannot be written to"));
  EXPECT_THAT(problem(dir / "closed/new/er"), HasSubstr("cannot be written to"));
}

TEST(SubmissionTest, AFolderThatCannotBeMadeNamesItsReason) {
  TempDir dir;
  EXPECT_EQ(MakeFolder(dir / "a/b"), "");
  EXPECT_EQ(MakeFolder(dir / "a/b"), "");
  EXPECT_TRUE(std::filesystem::is_directory(dir / "a/b"));
  WriteText(dir / "file", "");
  EXPECT_THAT(MakeFolder(dir / "file/a"), HasSubstr("cannot be made"));
  EXPECT_THAT(MakeFolder("/proc/simpo/out"), HasSubstr("cannot be made"));
}

TEST(SubmissionTest, AnOutputFolderIsKeptByItsRealName) {
  TempDir dir;
  std::filesystem::create_directories(dir / "real");
  std::filesystem::create_symlink(dir / "real", dir / "link");
  std::filesystem::create_symlink(dir / "nowhere", dir / "dangling");
  const auto check = [&](const std::string& folder) {
    return CheckSubmission(SubmitRequest(JobYaml(1, absl::StrCat("output_dir: ", folder, "\n"))), 4);
  };
  for (const char* folder : {"real/out", "real/out/", "link/out", "real/./x/../out", "link/../real/out"}) {
    EXPECT_EQ(check(dir / folder).config.output_dir, dir / "real/out") << folder;
  }
  EXPECT_EQ(check("beside").config.output_dir, "beside") << "is chosen by the coordinator";
  std::filesystem::create_directories(dir / "\xff");
  std::filesystem::create_symlink(dir / "\xff", dir / "latin");
  EXPECT_THAT(AllText(check(dir / "latin/out").violations), HasSubstr("not UTF-8")) << "could not be stored";
  EXPECT_THAT(check("beside").notes,
              ::testing::Contains(HasSubstr("'beside' is relative: the results go to DATA_DIR")));
  EXPECT_THAT(check(dir / "real").notes, ::testing::Not(::testing::Contains(HasSubstr("is relative"))));
  EXPECT_THAT(AllText(check(dir / "dangling/out").violations), HasSubstr("output_dir"));
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
