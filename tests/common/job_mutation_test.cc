// Whatever a job file holds, reading it ends with a config or with violations that name the place. A short form of
// mutate_job_files.cc.
#include "tests/common/job_mutation.h"

#include <gtest/gtest.h>

#include "tests/common/job_text.h"

namespace simpo {
namespace {

constexpr char kSeedFile[] =
    "# a comment\n"
    "model_name_or_path: owner/model\n"
    "dataset_mixer:\n"
    "  owner/data: 1.0\n"
    "  /abs/train.jsonl: 0.5\n"
    "dataset_splits: [train_prefs, test_prefs]\n"
    "labels: {team: a}\n"
    "loss_type: simpo\n"
    "beta: 2.5\n"
    "simpo_gamma: 1.0\n"
    "cpo_alpha: 0.0\n"
    "learning_rate: 5e-7\n"
    "warmup_steps: 0.1\n"
    "bf16: true\n"
    "optim: adamw_torch\n"
    "gradient_checkpointing_kwargs: {use_reentrant: false}\n"
    "chat_template: |\n"
    "  {% for m in messages %}{{ m.content }}{% endfor %}\n"
    "eval_strategy: steps\n"
    "eval_steps: 10\n"
    "resources: {ranks_per_node: 2, threads_per_rank: 1}\n"
    "time_limit: 2h\n";

TEST(JobMutation, EveryFileIsAcceptedOrRefusedClearly) {
  JobMutator mutator(20240611);
  int accepted_count = 0;
  constexpr int kFiles = 8000;
  for (int i = 0; i < kFiles; ++i) {
    const MutatedJob job = mutator.Mutate(kSeedFile);
    JobAnswer answer;
    ASSERT_EQ(ProblemOfAnswer(job, &answer), "") << job.yaml;
    accepted_count += answer.accepted();
  }
  // The mutations are mild enough to reach both ends.
  EXPECT_GT(accepted_count, kFiles / 20);
  EXPECT_LT(accepted_count, kFiles / 2);
}

}  // namespace
}  // namespace simpo
