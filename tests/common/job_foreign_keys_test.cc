// The job files of TRL, alignment-handbook and transformers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "common/job_entries.h"
#include "tests/common/job_text.h"

namespace simpo {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::Pair;
using ::testing::StartsWith;

TEST(ForeignKeys, CpoInAnyOrderOfItsLines) {
  std::vector<std::string> lines = {"beta: 2.5\n", "cpo_alpha: 0.1\n", "loss_type: simpo\n", "simpo_gamma: 1.0\n",
                                    "learning_rate: 1e-6\n"};
  std::sort(lines.begin(), lines.end());
  do {
    std::string yaml;
    for (const std::string& line : lines) yaml += line;
    const ParsedJob job = ParseWith(yaml);
    const JobConfig config = ConfigOf(job);
    ASSERT_EQ(config.loss_type, "sigmoid") << yaml;
    ASSERT_EQ(config.beta, 2.5) << yaml;
    ASSERT_EQ(config.gamma_beta_ratio, 1.0 / 2.5) << yaml;
    ASSERT_EQ(config.sft_weight, 0.1) << yaml;
    ASSERT_EQ(config.learning_rate, 1e-6) << yaml;
    ASSERT_THAT(job.notes, Contains("simpo_gamma 1 with beta 2.5 is gamma_beta_ratio 0.4"));
    ASSERT_THAT(job.notes, Contains("cpo_alpha 0.1 is taken as sft_weight"));
  } while (std::next_permutation(lines.begin(), lines.end()));
}

TEST(ForeignKeys, CpoMustSayWhatIsNotSimpoByDefault) {
  EXPECT_THAT(Problems(ParseWith("loss_type: simpo\n")),
              ElementsAre(StartsWith("0: beta: "), StartsWith("0: simpo_gamma: "), StartsWith("0: cpo_alpha: ")));
  EXPECT_THAT(Problems(ParseWith("cpo_alpha: 0\nbeta: 2\nsimpo_gamma: 1\n")),
              ElementsAre(StartsWith("0: loss_type: ")));
  for (const char* other : {"sigmoid", "hinge", "ipo", "alphapo"}) {
    const std::string yaml = "beta: 2\nsimpo_gamma: 1\ncpo_alpha: 0\nloss_type: " + std::string(other) + "\n";
    EXPECT_THAT(Problems(ParseWith(yaml)), ElementsAre(AllOf(StartsWith("6: loss_type: "), HasSubstr("not SimPO"))));
  }
  EXPECT_THAT(Problems(ParseWith("beta: 2\nsimpo_gamma: much\ncpo_alpha: 0\nloss_type: simpo\n")),
              ElementsAre("4: simpo_gamma: must be a number"));
  EXPECT_THAT(Problems(ParseWith("beta: 2\nsimpo_gamma: -1\ncpo_alpha: 0\nloss_type: simpo\n")),
              ElementsAre("4: simpo_gamma: (as gamma_beta_ratio) must be >= 0, not -0.5"));
}

TEST(ForeignKeys, SetWinsOverConvertedKeys) {
  const std::string cpo = "beta: 2\nsimpo_gamma: 1\ncpo_alpha: 1\nloss_type: simpo\n";
  const JobConfig config = ConfigOf(ParseWith(cpo, {"gamma_beta_ratio=0.3", "sft_weight=0"}));
  EXPECT_EQ(config.gamma_beta_ratio, 0.3);
  EXPECT_EQ(config.sft_weight, 0.0);
  EXPECT_EQ(ConfigOf(ParseWith(cpo, {"beta=4"})).gamma_beta_ratio, 0.25);
  EXPECT_EQ(ConfigOf(ParseWith("bf16: true\n", {"torch_dtype=float32"})).torch_dtype, "float32");
  EXPECT_EQ(ConfigOf(ParseWith("torch_dtype: float32\n", {"bf16=true"})).torch_dtype, "bfloat16");
  EXPECT_EQ(ConfigOf(ParseWith("warmup_steps: 0.2\n", {"warmup_ratio=0.3"})).warmup_ratio, 0.3);
  EXPECT_THAT(ConfigOf(Parse("model_name_or_path: m\ndataset_mixture: {datasets: [{id: a/b, split: x}]}\n",
                             {"dataset_splits=[y]"}))
                  .dataset_splits,
              ElementsAre("y"));
}

TEST(ForeignKeys, ConvertedAndOwnKeyTogetherAreRefused) {
  EXPECT_THAT(Problems(ParseWith("gamma: 1\ngamma_beta_ratio: 0.5\n")), ElementsAre(HasSubstr("keep one")));
  EXPECT_THAT(Problems(ParseWith("dataset_name: a/b\n")), ElementsAre(HasSubstr("keep one")));
}

TEST(ForeignKeys, PrincetonGamma) {
  EXPECT_EQ(ConfigOf(ParseWith("beta: 2.5\ngamma: 1.5\n")).gamma_beta_ratio, 0.6);
  EXPECT_EQ(ConfigOf(ParseWith("gamma: 1.0\n")).gamma_beta_ratio, 0.5);  // beta 2 is the default there too
  EXPECT_THAT(Problems(ParseWith("gamma: x\n")), ElementsAre("3: gamma: must be a number"));
}

TEST(ForeignKeys, Bf16) {
  const ParsedJob job = ParseWith("bf16: true\n");
  EXPECT_EQ(ConfigOf(job).torch_dtype, "bfloat16");
  EXPECT_THAT(job.notes, Contains("bf16 is taken as torch_dtype: bfloat16"));
  EXPECT_EQ(ConfigOf(ParseWith("bf16: true\ntorch_dtype: auto\n")).torch_dtype, "bfloat16");
  EXPECT_EQ(ConfigOf(ParseWith("torch_dtype:\nbf16: true\n")).torch_dtype, "bfloat16");
  EXPECT_EQ(ConfigOf(ParseWith("bf16: false\n")).torch_dtype, "auto");
  EXPECT_EQ(ConfigOf(ParseWith("bf16: false\ndtype: bfloat16\n")).torch_dtype, "bfloat16");
  EXPECT_THAT(Problems(ParseWith("bf16: very\n")), ElementsAre(StartsWith("3: bf16: must be true or false")));
  EXPECT_THAT(Problems(ParseWith("torch_dtype: float16\n")), ElementsAre(HasSubstr("auto | float32 | bfloat16")));
}

TEST(ForeignKeys, Optimizers) {
  for (const char* known : {"adamw_torch", "adamw_torch_fused", "adamw_hf"}) {
    EXPECT_THAT(Problems(ParseWith("optim: " + std::string(known) + "\n")), IsEmpty());
  }
  for (const char* other :
       {"adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "sgd", "[adamw]"}) {
    EXPECT_THAT(Problems(ParseWith("optim: " + std::string(other) + "\n")),
                ElementsAre(AllOf(StartsWith("3: optim: "), HasSubstr("not supported"))));
  }
}

TEST(ForeignKeys, Warmup) {
  const ParsedJob fraction = ParseWith("warmup_steps: 0.05\n");
  EXPECT_EQ(ConfigOf(fraction).warmup_ratio, 0.05);
  EXPECT_EQ(fraction.config.warmup_steps, -1);
  EXPECT_THAT(fraction.notes, Contains("warmup_steps 0.05 is a fraction: taken as warmup_ratio"));
  EXPECT_EQ(ConfigOf(ParseWith("warmup_steps: 0.05\nwarmup_ratio: 0.3\n")).warmup_ratio, 0.05);
  EXPECT_EQ(ConfigOf(ParseWith("warmup_steps: 20\n")).warmup_steps, 20);
  EXPECT_EQ(ConfigOf(ParseWith("warmup_steps: 0\n")).warmup_ratio, 0.0);
  EXPECT_EQ(ConfigOf(ParseWith("warmup_steps: 0\nwarmup_ratio: 0.2\n")).warmup_ratio, 0.2);
  EXPECT_THAT(Problems(ParseWith("warmup_steps: 1.5\n")),
              ElementsAre("3: warmup_steps: must be a whole number, not '1.5'"));
}

TEST(ForeignKeys, StepsWithoutAStrategy) {
  const ParsedJob job = ParseWith("save_steps: 100\neval_steps: 50\n");
  EXPECT_EQ(ConfigOf(job).save_strategy, "steps");
  EXPECT_EQ(job.config.eval_strategy, "steps");
  EXPECT_THAT(job.notes, Contains("save_steps is given: taken as save_strategy: steps too"));
  EXPECT_EQ(ConfigOf(ParseWith("save_steps: 100\nsave_strategy: no\n")).save_strategy, "no");
  EXPECT_THAT(Problems(ParseWith("eval_steps: 0.2\n")), ElementsAre(HasSubstr("whole number")));
}

ParsedJob ParseData(const std::string& data) { return Parse("model_name_or_path: m\n" + data); }

TEST(ForeignKeys, DatasetName) {
  const JobConfig config =
      ConfigOf(ParseData("dataset_name: owner/data\ndataset_config: small\ndataset_train_split: "
                         "train_prefs\ndataset_test_split: test_prefs\n"
                         "dataset_num_proc: 4\n"));
  EXPECT_THAT(config.dataset_mixer, ElementsAre(Pair("owner/data", 1.0)));
  EXPECT_THAT(config.dataset_splits, ElementsAre("train_prefs", "test_prefs"));
  EXPECT_THAT(config.dataset_configs, ElementsAre("small"));
  EXPECT_EQ(config.preprocessing_num_workers, 4);
  EXPECT_THAT(ConfigOf(ParseData("dataset_name: a/b\ndataset_test_split: held_out\n")).dataset_splits,
              ElementsAre("train", "held_out"));
  EXPECT_THAT(Problems(ParseData("dataset_name: [a]\n")), ElementsAre(StartsWith("2: dataset_name: ")));
}

TEST(ForeignKeys, DatasetMixture) {
  const ParsedJob job = ParseData(
      "dataset_mixture:\n"
      "  datasets:\n"
      "    - id: owner/a\n"
      "      config: default\n"
      "      split: train_prefs\n"
      "      columns: [chosen, rejected]\n"
      "      weight: 0.5\n"
      "    - {id: owner/b, split: train_prefs}\n"
      "  seed: 7\n");
  EXPECT_THAT(ConfigOf(job).dataset_mixer, ElementsAre(Pair("owner/a", 0.5), Pair("owner/b", 1.0)));
  EXPECT_THAT(job.config.dataset_splits, ElementsAre("train_prefs"));
  EXPECT_THAT(job.config.dataset_configs, ElementsAre("default"));
  EXPECT_THAT(job.notes, Contains(HasSubstr("dataset_mixture.seed has no effect")));
  // The older form, and TRL's list.
  EXPECT_THAT(ConfigOf(ParseData("dataset_mixture: {owner/a: 0.25}\n")).dataset_mixer,
              ElementsAre(Pair("owner/a", 0.25)));
  EXPECT_THAT(ConfigOf(ParseData("datasets:\n  - path: owner/a\n  - owner/b\n")).dataset_mixer,
              ElementsAre(Pair("owner/a", 1.0), Pair("owner/b", 1.0)));
}

TEST(ForeignKeys, DatasetMixtureMistakes) {
  const ParsedJob job = ParseData(
      "dataset_mixture:\n"
      "  datasets:\n"
      "    - weight: 1.0\n"
      "    - {id: owner/b, wieght: 1.0}\n"
      "    - {id: owner/c, weight: 3}\n"
      "  test_split_size: 100\n"
      "  shards: 2\n");
  EXPECT_THAT(Problems(job),
              ElementsAre("4: dataset_mixture: each data set of the list needs an id (or path)",
                          StartsWith("5: dataset_mixture.wieght: unknown"),
                          "6: dataset_mixture.owner/c: the fraction must be above 0 and at most 1, not '3'",
                          StartsWith("7: dataset_mixture.test_split_size: holding out"),
                          StartsWith("8: dataset_mixture.shards: unknown")));
  EXPECT_THAT(Problems(ParseData("datasets: [{id: a, split: x}, {id: b, split: y}]\n")),
              ElementsAre(HasSubstr("different splits")));
}

TEST(ForeignKeys, RefusedUnlessOff) {
  EXPECT_THAT(Problems(ParseWith("fp16: true\n")), ElementsAre(StartsWith("3: fp16: ")));
  EXPECT_THAT(Problems(ParseWith("fp16: false\nload_in_4bit: false\nuse_peft: false\ntest_split_size: null\n")),
              IsEmpty());
  EXPECT_THAT(Problems(ParseWith("use_peft: true\nlora_r: 16\n")),
              ElementsAre(StartsWith("3: use_peft: "), StartsWith("4: lora_r: ")));
  EXPECT_THAT(Problems(ParseWith("lora_r: 16\n")), ElementsAre(StartsWith("3: lora_r: ")));
  const ParsedJob off = ParseWith("use_peft: false\nlora_r: 16\n");
  EXPECT_THAT(Problems(off), IsEmpty());
  EXPECT_THAT(off.notes, Contains("lora_r has no effect: use_peft is off"));
  EXPECT_THAT(Problems(ParseWith("load_in_8bit: true\n")), ElementsAre(HasSubstr("quantised")));
}

TEST(ForeignKeys, IgnoredWithANote) {
  const ParsedJob job = ParseWith(
      "report_to: [wandb]\npush_to_hub: true\ndeepspeed: zero3.json\nddp_bucket_cap_mb: 25\ntf32: true\n"
      "attn_implementation: flash_attention_2\ngradient_checkpointing_kwargs: {use_reentrant: false}\n");
  EXPECT_THAT(Problems(job), IsEmpty());
  for (const char* key : {"report_to", "push_to_hub", "deepspeed", "ddp_bucket_cap_mb", "tf32", "attn_implementation",
                          "gradient_checkpointing_kwargs"}) {
    EXPECT_THAT(job.notes, Contains(StartsWith(std::string(key) + " has no effect: ")));
  }
  // What is off needs no words.
  EXPECT_THAT(ParseWith("push_to_hub: false\nreport_to: none\n").notes, Each(Not(HasSubstr("has no effect"))));
}

TEST(JobReading, TakingAnEntryLeavesItAndTheOthersAsTheyWere) {
  JobReading reading;
  ASSERT_TRUE(ReadJobEntries("a: 1\nb: 2\nc: 3\n", {}, &reading));
  const std::optional<JobEntry> taken = reading.Take("a");
  ASSERT_TRUE(taken.has_value());
  EXPECT_EQ(ScalarText(taken->value), "1");
  EXPECT_EQ(ScalarText(reading.Find("b")->value), "2");
  EXPECT_EQ(ScalarText(reading.Find("c")->value), "3");
  EXPECT_EQ(reading.Find("a"), nullptr);
}

}  // namespace
}  // namespace simpo
