// The program itself, where it needs no coordinator.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/simpoctl/fake_service.h"
#include "tests/simpoctl/run_simpoctl.h"
#include "tests/simpoctl/test_jobs.h"

namespace simpo {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::MatchesRegex;
using ::testing::Not;
using ::testing::StartsWith;

// Runs `simpoctl <arguments>`; nobody listens at its default address. `arguments` are of the shell.
Outcome Simpoctl(const std::string& arguments) { return RunSimpoctl("127.0.0.1:1", arguments); }

std::string DryRun(const char* file) { return absl::StrCat("submit --dry-run ", SIMPOCTL_TESTDATA, "/", file, " "); }

TEST(Program, RecipesPassADryRun) {
  for (const char* file : {"paper-recipe.yaml", "short-recipe.yaml", "trl-cpo.yaml"}) {
    const Outcome outcome = Simpoctl(DryRun(file));
    EXPECT_EQ(outcome.code, 0) << outcome.err;
    EXPECT_EQ(outcome.out, absl::StrCat(SIMPOCTL_TESTDATA, "/", file, ": a valid job\n"));
    EXPECT_THAT(outcome.err, HasSubstr("no coordinator answered at 127.0.0.1:1; the file was checked here only"));
  }
}

// Between two looks the attempt has ended, and the next one runs already.
TEST(Program, WaitingForACheckpointEndsWithTheAttempt) {
  FakeService service;
  int looks = 0;
  service.on_get = [&](const v1::GetJobRequest&, v1::GetJobResponse* response) {
    *response->mutable_job() = RunningJob();
    if (++looks > 2) response->mutable_job()->set_attempt(2);
    return grpc::Status::OK;
  };
  service.on_checkpoint = [](const v1::CheckpointJobRequest&, v1::CheckpointJobResponse* response) {
    *response->mutable_job() = RunningJob();
    return grpc::Status::OK;
  };
  const Outcome outcome = RunSimpoctl(service.address(), "checkpoint first --wait");
  service.Settle();
  EXPECT_EQ(outcome.code, 1);
  EXPECT_THAT(outcome.err, HasSubstr("is RUNNING in attempt 2 and has written no checkpoint since it was asked in "
                                     "attempt 1"));
}

TEST(Program, ListSaysThatThereAreMoreAndAsksForLabels) {
  FakeService service;
  std::vector<v1::ListJobsRequest> asked;
  service.on_list = [&](const v1::ListJobsRequest& request, v1::ListJobsResponse* response) {
    asked.push_back(request);
    for (int i = 0; i < std::min(request.page_size(), 3); ++i) *response->add_jobs() = RunningJob();
    if (request.page_size() < 3) response->set_next_page_token("7");
    return grpc::Status::OK;
  };
  Outcome outcome = RunSimpoctl(service.address(), "list --limit 2 -o name --label team=a=b --label x=");
  service.Settle();
  EXPECT_EQ(outcome.code, 0);
  EXPECT_EQ(outcome.out, "ab12cd\nab12cd\n");
  EXPECT_EQ(outcome.err, "These are the newest 2; there are more. See --limit, --state, --user, --label\n");
  ASSERT_EQ(asked.size(), 1u);
  EXPECT_EQ(asked[0].labels_size(), 2);
  EXPECT_EQ(asked[0].labels().at("team"), "a=b");
  EXPECT_EQ(asked[0].labels().at("x"), "");
  outcome = RunSimpoctl(service.address(), "list");
  service.Settle();
  EXPECT_THAT(outcome.out, HasSubstr("ab12cd"));
  EXPECT_EQ(outcome.err, "");
}

TEST(Program, CancelSaysThatAJobHadEndedAlready) {
  FakeService service;
  service.on_get = [](const v1::GetJobRequest&, v1::GetJobResponse* response) {
    *response->mutable_job() = EndedJob(v1::JOB_STATE_FAILED);
    return grpc::Status::OK;
  };
  service.on_cancel = [](const v1::CancelJobRequest&, v1::CancelJobResponse* response) {
    *response->mutable_job() = EndedJob(v1::JOB_STATE_FAILED);
    return grpc::Status::OK;
  };
  EXPECT_EQ(RunSimpoctl(service.address(), "cancel first").out, "Job ab12cd (first) had already ended: FAILED\n");
}

// Both streams in one file: in the order in which they were written.
TEST(Program, AMessageStandsAfterWhatItIsAbout) {
  FakeService service;
  service.on_submit = [](const v1::SubmitJobRequest&, v1::SubmitJobResponse* response) {
    *response->mutable_job() = RunningJob();
    return grpc::Status::OK;
  };
  const std::string file = absl::StrCat(::testing::TempDir(), "/simpoctl_both_", getpid());
  const std::string text =
      RunSimpoctl(service.address(), absl::StrCat("submit ", SIMPOCTL_TESTDATA, "/short-recipe.yaml >", file,
                                                  " 2>&1; cat ", file, "; rm ", file))
          .out;
  ASSERT_THAT(text, AllOf(HasSubstr("submitted: RUNNING"), HasSubstr("Next:")));
  EXPECT_LT(text.find("submitted: RUNNING"), text.find("Next:")) << text;
}

TEST(Program, DryRunShowsTheWholeJob) {
  const std::string paper = Simpoctl(DryRun("paper-recipe.yaml") + "-o yaml --set beta=2.5").out;
  for (const char* line : {"\nbeta: 2.5\n", "\nglobal_batch_size: 32\n", "\ntorch_dtype: \"bfloat16\"\n",
                           "\nlearning_rate: 3e-07\n", "\neval_strategy: \"steps\"\n", "\nmax_prompt_length: 512\n"}) {
    EXPECT_THAT(paper, HasSubstr(line));
  }
  const std::string cpo = Simpoctl(DryRun("trl-cpo.yaml") + "-o json").out;
  EXPECT_THAT(cpo, AllOf(HasSubstr("\"valid\": true"), HasSubstr("gamma_beta_ratio: 0.5\\n"),
                         HasSubstr("\"simpo_gamma 1.25 with beta 2.5 is gamma_beta_ratio 0.5\"")));
}

TEST(Program, DryRunTellsEveryMistakeWithItsLine) {
  const Outcome outcome = Simpoctl(DryRun("wrong.yaml"));
  EXPECT_EQ(outcome.code, 2);
  EXPECT_THAT(outcome.out, IsEmpty());
  for (const char* part : {"wrong.yaml:3: dataset_mixer.owner/data: ",
                           "wrong.yaml:4: learing_rate: unknown key; did you "
                           "mean learning_rate?",
                           "wrong.yaml:5: beta: must be > 0", "wrong.yaml:6: loss_type: ", "wrong.yaml:7: max_length: ",
                           "wrong.yaml:8: fp16: ", "wrong.yaml:9: optim: "}) {
    EXPECT_THAT(outcome.err, HasSubstr(part));
  }
  // Without --dry-run a bad file is refused just so, also when no coordinator answers.
  const Outcome submitted = Simpoctl(absl::StrCat("submit ", SIMPOCTL_TESTDATA, "/wrong.yaml"));
  EXPECT_EQ(submitted.code, 2);
  EXPECT_EQ(submitted.err, outcome.err);
}

TEST(Program, BadUsage) {
  for (const char* arguments : {"",
                                "frobnicate",
                                "submit",
                                "get",
                                "submit /no/such/file.yaml",
                                "list --limit 0",
                                "logs x --rank -2",
                                "metrics x -o xml",
                                "submit a.yaml --wait --follow",
                                "--address nonsense list",
                                "list --state sleeping",
                                "list --label team",
                                "list --label =a",
                                "list --label a=1 --label a=2",
                                "completion fish",
                                "help nothing",
                                "wait x --timeout -1",
                                "priority x",
                                "priority x high",
                                "priority x 1000001",
                                "nodes -o xml",
                                "drain",
                                "undrain",
                                "checkpoint"}) {
    const Outcome outcome = Simpoctl(arguments);
    EXPECT_EQ(outcome.code, 2) << arguments << "\n" << outcome.err;
    EXPECT_THAT(outcome.err, StartsWith("simpoctl: ")) << arguments;
    EXPECT_THAT(outcome.out, IsEmpty()) << arguments;
  }
}

TEST(Program, NoCoordinatorIsOneLine) {
  for (const char* arguments :
       {"list", "get x", "describe x", "watch x", "wait x", "logs x", "logs x -f", "metrics x", "cancel x",
        "priority x -5", "nodes", "checkpoint x", "checkpoint x --wait", "drain n", "undrain n"}) {
    const Outcome outcome = Simpoctl(arguments);
    EXPECT_EQ(outcome.code, 1) << arguments;
    EXPECT_THAT(outcome.err, MatchesRegex("simpoctl: cannot reach the coordinator at 127.0.0.1:1 [^\n]*"
                                          "simpo-coordinator --data-dir [^\n]*\n"))
        << arguments;
    EXPECT_THAT(outcome.out, IsEmpty()) << arguments;
  }
}

TEST(Program, Help) {
  for (const char* arguments : {"--help", "help", "submit --help", "help submit", "help job-file", "help exit-codes"}) {
    const Outcome outcome = Simpoctl(arguments);
    EXPECT_EQ(outcome.code, 0) << arguments;
    EXPECT_THAT(outcome.out, Not(IsEmpty())) << arguments;
    EXPECT_THAT(outcome.err, IsEmpty()) << arguments;
  }
  EXPECT_THAT(Simpoctl("help job-file").out, HasSubstr("gamma_beta_ratio: number, >= 0 (default 0.5)"));
  EXPECT_EQ(Simpoctl("version").code, 0);
  EXPECT_EQ(Simpoctl("--version").out, "simpoctl " SIMPO_VERSION "\n");
}

// What bash offers for a command line that ends with the word to complete.
std::string BashCompletion(const std::string& words) {
  const std::string script =
      absl::StrCat("'source <(", SIMPOCTL_PROGRAM, " completion bash); COMP_WORDS=(simpoctl ", words,
                   "); COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _simpoctl; printf \"%s\\n\" \"${COMPREPLY[@]}\"'");
  FILE* pipe = popen(absl::StrCat("bash -c ", script).c_str(), "r");
  std::string out;
  char buffer[4096];
  for (size_t got; (got = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) out.append(buffer, got);
  EXPECT_EQ(pclose(pipe), 0);
  return out;
}

TEST(Program, CompletionOffersCommandsAndOptions) {
  EXPECT_EQ(BashCompletion("sub"), "submit\n");
  EXPECT_EQ(BashCompletion("submit --dr"), "--dry-run\n");
  EXPECT_EQ(BashCompletion("--address h:1 logs --foll"), "--follow\n");
  EXPECT_EQ(BashCompletion("--ca ca.pem list --lab"), "--label\n");
  EXPECT_EQ(BashCompletion("help j"), "job-file\n");
  EXPECT_THAT(Simpoctl("completion zsh").out, AllOf(StartsWith("#compdef simpoctl\n"), HasSubstr("--dry-run")));
}

}  // namespace
}  // namespace simpo
