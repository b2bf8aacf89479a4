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
  static std::string ProblemOfInput(const AllowedRoots& roots, const std::string& path) {
    Looks looks;
    return roots.ProblemOfInput(path, &looks);
  }
  static std::string ProblemOfOutput(const AllowedRoots& roots, const std::string& path) {
    Looks looks;
    return roots.ProblemOfOutput(path, &looks);
  }
  bool Reads(const std::string& path) { return ProblemOfInput(roots_, dir_ / path).empty(); }
  bool Writes(const std::string& path) { return ProblemOfOutput(roots_, dir_ / path).empty(); }
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
  for (const char* hub : {"org/model", "model", "true", "{{ messages }}"}) EXPECT_EQ(ProblemOfInput(roots_, hub), "");
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
  EXPECT_FALSE(ProblemOfInput(roots_, "/etc/passwd").empty());
  EXPECT_FALSE(ProblemOfInput(roots_, "/").empty());
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
  EXPECT_EQ(ProblemOfInput(linked, dir_ / "root-link/secret.jsonl"), "");
}

TEST_F(AllowedRootsTest, PathsThatLeadNowhereOrRoundAndRound) {
  fs::create_symlink(dir_ / "outside", dir_ / "allowed/link");
  EXPECT_FALSE(Reads("allowed/not-there/../link/secret.jsonl"));
  EXPECT_TRUE(Reads("allowed/not-there/../data"));
  fs::create_symlink("round", dir_ / "allowed/round");
  EXPECT_FALSE(Reads("allowed/round"));
  fs::create_symlink("../allowed/./model/../data/", dir_ / "allowed/inner");
  EXPECT_EQ(WithoutLinks(dir_ / "allowed/inner//./train.jsonl/"),
            fs::canonical(dir_.path()) / "allowed/data/train.jsonl");
  EXPECT_EQ(WithoutLinks("/../../"), "/");
  std::string deep;
  for (int i = 0; i < 130; ++i) deep += "/a";
  EXPECT_FALSE(WithoutLinks(deep));
  EXPECT_TRUE(WithoutLinks(deep.substr(0, 200)));
}

// Otherwise what the job writes, and what it removes as too old, could be another's.
TEST_F(AllowedRootsTest, NoLinkLeadsOutOfAnOutputFolder) {
  const fs::path out = dir_ / "allowed/out";
  WriteText(dir_ / "allowed/of-bob/checkpoints/step-000001/model", "");
  WriteText(out / "logs/attempt-1/rank-0.log", "");
  fs::create_directories(out / "checkpoints/step-000002");
  fs::create_symlink("step-000002", out / "checkpoints/latest");
  EXPECT_TRUE(Writes("allowed/out")) << "a link to the job's own files";
  JobConfig config;
  config.output_dir = out;
  for (const auto& [link, target] :
       {std::pair("job.yaml.tmp", dir_ / "outside/secret.jsonl"), std::pair("metrics.jsonl", dir_ / "allowed/later"),
        std::pair("final", dir_ / "allowed/of-bob"), std::pair("logs/attempt-2", dir_ / "allowed/of-bob"),
        std::pair("checkpoints/step-000003", dir_ / "allowed/of-bob/checkpoints/step-000001")}) {
    fs::create_symlink(target, out / link);
    const auto violations = roots_.Check(config);
    ASSERT_EQ(violations.size(), 1u) << link;
    EXPECT_EQ(violations[0].field, "output_dir");
    EXPECT_THAT(violations[0].description, HasSubstr((out / link).string()));
    EXPECT_THAT(violations[0].description, HasSubstr("remove it"));
    EXPECT_FALSE(CheckSubmission(SubmitRequest(JobYaml(1, absl::StrCat("output_dir: ", out.string(), "\n"))), 4, roots_)
                     .violations.empty());
    EXPECT_EQ(ProblemOfOutput(AllowedRoots(dir_ / "outputs", {}, [] { return false; }), out), "");
    fs::remove(out / link);
  }
  EXPECT_THAT(roots_.Check(config), IsEmpty());
}

// It is looked at on a thread that all jobs share.
TEST_F(AllowedRootsTest, WhatAJobNamesIsLookedAtSoFarAndNoFurther) {
  for (int i = 0; i < 500; ++i) WriteText(dir_ / "allowed/data" / absl::StrCat("part-", i), "");
  JobConfig config;
  const std::string folder = (dir_ / "allowed/data/").string();
  config.dataset_mixer.emplace_back(folder + "*", 1);
  config.dataset_mixer.emplace_back(folder, 1);
  EXPECT_THAT(roots_.Check(config), IsEmpty());
  std::string yaml = "model_name_or_path: org/model\nglobal_batch_size: 8\ndataset_mixer:\n";
  for (size_t stars = 1; stars <= 100; ++stars) {
    config.dataset_mixer.emplace_back(folder + std::string(stars, '*'), 1);
    absl::StrAppend(&yaml, "  '", folder, std::string(stars, '*'), "': 1.0\n");
  }
  for (const auto& violations : {roots_.Check(config), CheckSubmission(SubmitRequest(yaml), 64, roots_).violations}) {
    ASSERT_EQ(violations.size(), 1u);
    EXPECT_EQ(violations[0].field, "dataset_mixer");
    EXPECT_THAT(violations[0].description, HasSubstr("too many files to look at; name fewer"));
  }
  EXPECT_THAT(CheckSubmission(SubmitRequest(yaml), 64).violations, IsEmpty()) << "without roots the trainer looks";
  // A pattern alone, also one that goes through many folders.
  for (int i = 0; i < 30; ++i) fs::create_directory_symlink(".", dir_ / "allowed/model" / absl::StrCat("l", i));
  Looks looks;
  EXPECT_THAT(roots_.ProblemOfInput(dir_ / "allowed/model/*/*/*/*/*/*/*/*", &looks), HasSubstr("too many files"));
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
    const std::string there = ProblemOfInput(roots_, folder + "sec*.jsonl"),
                      not_there = ProblemOfInput(roots_, folder + "none*");
    EXPECT_NE(there, "") << folder;
    EXPECT_NE(not_there, "") << folder;
    EXPECT_THAT(there, Not(HasSubstr("secret"))) << folder;
  }
}

TEST_F(AllowedRootsTest, RestrictedOnlyWhenAsked) {
  bool restricted = false;
  const AllowedRoots roots(dir_ / "outputs", {}, [&] { return restricted; });
  EXPECT_EQ(ProblemOfInput(roots, "/etc/passwd"), "");
  EXPECT_EQ(ProblemOfOutput(roots, "/anywhere"), "");
  restricted = true;
  EXPECT_NE(ProblemOfInput(roots, "/etc/passwd"), "");
  EXPECT_NE(ProblemOfOutput(roots, "/anywhere"), "");
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
