#include "coordinator/allowed_roots.h"

#include <gmock/gmock.h>

#include "coordinator/submission.h"
#include "testing.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

class AllowedRootsTest : public ::testing::Test {
 protected:
  AllowedRootsTest() {
    for (const char* file : {"allowed/data/train.jsonl", "allowed/model/config.json", "outside/secret.jsonl"}) {
      WriteText(dir_ / file, "{}\n");
    }
    fs::create_directories(dir_ / "outputs");
    roots_ = AllowedRoots(dir_ / "outputs", {dir_ / "allowed"}, nullptr);
  }
  bool Reads(const std::string& path) { return roots_.ProblemOfInput(dir_ / path).empty(); }
  bool Writes(const std::string& path) { return roots_.ProblemOfOutput(dir_ / path).empty(); }
  TempDir dir_;
  AllowedRoots roots_;
};

TEST_F(AllowedRootsTest, WhatLiesBelowARoot) {
  EXPECT_TRUE(Reads("allowed/data/train.jsonl"));
  EXPECT_TRUE(Reads("allowed/data"));
  EXPECT_TRUE(Reads("allowed"));
  EXPECT_TRUE(Reads("allowed/data/not-there-yet"));
  EXPECT_TRUE(Reads("outputs/earlier-job/final"));
  EXPECT_TRUE(Writes("allowed/out/new"));
  EXPECT_TRUE(Writes("outputs/new/"));
  for (const char* hub : {"org/model", "model", "true", "{{ messages }}"}) EXPECT_EQ(roots_.ProblemOfInput(hub), "");
}

TEST_F(AllowedRootsTest, NothingElse) {
  EXPECT_FALSE(Reads("outside/secret.jsonl"));
  EXPECT_FALSE(Reads("outside"));
  EXPECT_FALSE(Reads("allowed-not/x")) << "the name of a root is no prefix of text";
  EXPECT_FALSE(Reads("allowed/../outside/secret.jsonl"));
  EXPECT_FALSE(Reads("allowed/data/../../outside"));
  EXPECT_FALSE(Writes("outside/new"));
  EXPECT_FALSE(Writes("allowed/../outside"));
  EXPECT_FALSE(Writes("outputs")) << "a root itself is no job's";
  EXPECT_FALSE(Writes("allowed"));
  EXPECT_FALSE(roots_.ProblemOfInput("/etc/passwd").empty());
  EXPECT_FALSE(roots_.ProblemOfInput("/").empty());
}

TEST_F(AllowedRootsTest, LinksAreResolved) {
  fs::create_symlink(dir_ / "outside", dir_ / "allowed/link");
  fs::create_symlink("../data/train.jsonl", dir_ / "allowed/model/inner");
  EXPECT_FALSE(Reads("allowed/link"));
  EXPECT_FALSE(Reads("allowed/link/secret.jsonl"));
  EXPECT_FALSE(Writes("allowed/link/new"));
  EXPECT_TRUE(Reads("allowed/model")) << "a link within the root is none of our business";
  EXPECT_FALSE(Reads("allowed")) << "a folder with a link to the outside";
  fs::create_symlink(dir_ / "outside/secret.jsonl", dir_ / "allowed/data/more.jsonl");
  EXPECT_FALSE(Reads("allowed/data"));
  EXPECT_FALSE(Reads("allowed/data/*.jsonl"));
  fs::create_symlink(dir_ / "outside/later", dir_ / "allowed/dangling");
  EXPECT_FALSE(Writes("allowed/dangling")) << "where it leads may be made later";
  EXPECT_FALSE(Writes("allowed/dangling/new"));
  // A root may be a link itself.
  fs::create_symlink(dir_ / "outside", dir_ / "root-link");
  const AllowedRoots linked(dir_ / "outputs", {dir_ / "root-link"}, nullptr);
  EXPECT_EQ(linked.ProblemOfInput(dir_ / "root-link/secret.jsonl"), "");
}

TEST_F(AllowedRootsTest, Globs) {
  EXPECT_TRUE(Reads("allowed/data/*.jsonl"));
  EXPECT_FALSE(Reads("outside/*.jsonl"));
  EXPECT_FALSE(Reads("*/secret.jsonl"));
  EXPECT_FALSE(Reads("allowed/*/../../outside/secret.jsonl"));
}

// Patterns that are looked up elsewhere than they are checked, or whose refusal would tell what there is.
TEST_F(AllowedRootsTest, GlobsDoNotClimb) {
  WriteText(dir_ / "outside/{.jsonl", "{}\n");
  const auto problem = [&](const std::string& data) {
    v1::SubmitJobRequest request = SubmitRequest(
        absl::StrCat("model_name_or_path: org/model\ndataset_mixer: '", data, "'\nglobal_batch_size: 8\n"));
    request.set_base_dir(dir_ / "allowed/data");
    std::string text;
    for (const auto& violation : CheckSubmission(request, 64, roots_).violations) text += violation.description + "\n";
    return text;
  };
  EXPECT_EQ(problem("*.jsonl"), "");
  EXPECT_THAT(problem("../../outside/[{{s]*.jsonl"), HasSubstr("allowed_roots")) << "is no template";
  EXPECT_THAT(problem("../../outside/" + std::string(5'000, '*') + ".jsonl"), HasSubstr("4096 bytes"));
  const std::string outside = (dir_ / "allowed/.*/outside/").string(),
                    escaped = (dir_ / "allowed/\\../outside/").string();
  for (const std::string& folder : {outside, escaped}) {
    const std::string there = roots_.ProblemOfInput(folder + "sec*.jsonl"),
                      not_there = roots_.ProblemOfInput(folder + "none*");
    EXPECT_NE(there, "") << folder;
    EXPECT_NE(not_there, "") << folder;
    EXPECT_THAT(there, Not(HasSubstr("secret"))) << folder;
  }
}

TEST_F(AllowedRootsTest, RestrictedOnlyWhenAsked) {
  bool restricted = false;
  const AllowedRoots roots(dir_ / "outputs", {}, [&] { return restricted; });
  EXPECT_EQ(roots.ProblemOfInput("/etc/passwd"), "");
  EXPECT_EQ(roots.ProblemOfOutput("/anywhere"), "");
  restricted = true;
  EXPECT_NE(roots.ProblemOfInput("/etc/passwd"), "");
  EXPECT_NE(roots.ProblemOfOutput("/anywhere"), "");
}

TEST_F(AllowedRootsTest, ASubmissionIsToldOfEveryPathAndNothingOfWhatIsThere) {
  const std::string yaml = absl::StrCat(
      "model_name_or_path: ", (dir_ / "outside/secret.jsonl").string(),
      "\ntokenizer_name_or_path: ", (dir_ / "outside/nothing").string(),
      "\nchat_template: ", (dir_ / "outside/secret.jsonl").string(), "\ndataset_mixer: {",
      (dir_ / "allowed/../outside").string(),
      ": 1.0}\neval_dataset_mixer: {/etc/passwd: 1.0}\nresume_from_checkpoint: ", (dir_ / "outside").string(), "\n");
  const Submission submission = CheckSubmission(SubmitRequest(yaml), 4, roots_);
  std::vector<std::string> fields;
  for (const FieldViolation& violation : submission.violations) {
    fields.push_back(violation.field);
    EXPECT_THAT(violation.description, HasSubstr("allowed_roots")) << violation.field;
    EXPECT_THAT(violation.description, Not(HasSubstr("does not exist")));
  }
  EXPECT_THAT(fields, ::testing::UnorderedElementsAre("model_name_or_path", "tokenizer_name_or_path", "chat_template",
                                                      "dataset_mixer", "eval_dataset_mixer", "resume_from_checkpoint"));
  EXPECT_THAT(CheckSubmission(SubmitRequest(JobYaml()), 4, roots_).violations, IsEmpty());
}

TEST_F(AllowedRootsTest, CheckOfAWholeJob) {
  JobConfig config;
  config.output_dir = dir_ / "outside/out";
  config.model_name_or_path = dir_ / "allowed/model";
  const auto violations = roots_.Check(config);
  ASSERT_EQ(violations.size(), 1u);
  EXPECT_EQ(violations[0].field, "output_dir");
  config.output_dir = dir_ / "outputs/job";
  EXPECT_THAT(roots_.Check(config), IsEmpty());
}

}  // namespace
}  // namespace simpo
