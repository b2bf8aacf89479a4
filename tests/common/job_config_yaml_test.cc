#include "common/job_config_yaml.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <set>

#include "absl/strings/str_cat.h"
#include "common/job_keys.h"
#include "tests/common/job_text.h"
#include "tests/temp_dir.h"

namespace simpo {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::Pair;
using ::testing::StartsWith;

// Every key with a value that is not its default.
constexpr char kEveryKey[] = R"(
name: every key
priority: 7
labels: {team: a, "with space": "true"}
max_restarts: 5
time_limit: 2h
launcher: mpirun
model_name_or_path: owner/model
model_revision: v2
tokenizer_name_or_path: owner/tokenizer
chat_template: "{% for m in messages %}\n{{ m }}\t\"'é{% endfor %}"
torch_dtype: bfloat16
dataset_mixer: {owner/data: 0.1, /abs/train.jsonl: 1}
eval_dataset_mixer: {/abs/test.jsonl: 1}
dataset_splits: [train_prefs, "test_prefs"]
dataset_configs: [default]
preprocessing_num_workers: 3
shuffle: false
seed: 123456789012
max_length: 1024
max_prompt_length: 512
truncation_mode: keep_start
compat: princeton
drop_ties: true
beta: 2.1
gamma_beta_ratio: 0.3
loss_type: hinge
label_smoothing: 0.05
sft_weight: 0.1
learning_rate: 3e-7
lr_scheduler_type: linear
warmup_ratio: 0.07
warmup_steps: 11
weight_decay: 0.01
adam_beta1: 0.8
adam_beta2: 0.95
adam_epsilon: 1e-6
max_grad_norm: 0.5
num_train_epochs: 2.5
max_steps: 100
per_device_train_batch_size: 2
per_device_eval_batch_size: 4
gradient_accumulation_steps: 8
global_batch_size: 32
max_tokens_per_micro_batch: 4096
gradient_checkpointing: true
zero_stage: 3
offload_optimizer: cpu
reduce_dtype: bfloat16
deterministic: true
resources: {nodes: 1, ranks_per_node: 2, device: cuda, threads_per_rank: 1}
do_eval: false
eval_on_start: true
eval_strategy: steps
eval_steps: 10
save_strategy: steps
save_steps: 20
save_total_limit: 2
load_best_model_at_end: true
metric_for_best_model: eval_rewards/margins
greater_is_better: True
logging_steps: 5
recovery_minutes: 2.5
output_dir: ./out
overwrite_output_dir: true
resume_from_checkpoint: true
)";

TEST(JobConfigYaml, ReadsEveryKey) {
  const JobConfig config = ConfigOf(Parse(kEveryKey));
  EXPECT_EQ(config.name, "every key");
  EXPECT_EQ(config.priority, 7);
  EXPECT_THAT(config.labels, ElementsAre(Pair("team", "a"), Pair("with space", "true")));
  EXPECT_EQ(config.time_limit_s, 7200);
  EXPECT_EQ(config.chat_template, "{% for m in messages %}\n{{ m }}\t\"'\xc3\xa9{% endfor %}");
  EXPECT_THAT(config.dataset_mixer, ElementsAre(Pair("owner/data", 0.1), Pair("/abs/train.jsonl", 1.0)));
  EXPECT_THAT(config.dataset_splits, ElementsAre("train_prefs", "test_prefs"));
  EXPECT_EQ(config.seed, 123456789012);
  EXPECT_EQ(config.learning_rate, 3e-7);
  EXPECT_EQ(config.warmup_steps, 11);
  EXPECT_EQ(config.ranks_per_node, 2);
  EXPECT_EQ(config.Ranks(), 2);
  EXPECT_EQ(config.recovery_minutes, 2.5);
  EXPECT_EQ(config.output_dir, "./out");
  EXPECT_EQ(config.resume_from_checkpoint, "true");
  // The text above must grow with the table: no key may still have its default, but those with one value.
  const std::set<std::string_view> one_value = {"launcher", "resources.nodes"};
  const JobConfig defaults;
  for (const JobKeyRow& row : JobKeyRows()) {
    if (one_value.contains(row.key.name)) continue;
    std::visit([&](auto field) { EXPECT_FALSE(config.*field == defaults.*field) << row.key.name; }, row.field);
  }
}

TEST(JobConfigYaml, WritesWhatItReads) {
  for (const std::string& yaml : {std::string(kEveryKey), std::string(kRequired)}) {
    const JobConfig config = ConfigOf(Parse(yaml));
    const std::string text = JobConfigToYaml(config);
    EXPECT_EQ(ConfigOf(Parse(text)), config) << text;
    EXPECT_EQ(JobConfigToYaml(ConfigOf(Parse(text))), text);
  }
}

// The paper's trainer does not clip unless asked.
TEST(JobConfigYaml, CompatPrincetonLeavesGradientsAsTheyAre) {
  EXPECT_EQ(ConfigOf(ParseWith("compat: princeton")).max_grad_norm, 0);
  EXPECT_EQ(ConfigOf(ParseWith("compat: princeton\nmax_grad_norm: 1.0")).max_grad_norm, 1);
  EXPECT_EQ(ConfigOf(ParseWith("compat: trl")).max_grad_norm, 1);
  EXPECT_THAT(ParseWith("compat: princeton").notes, Contains(HasSubstr("gradients are not clipped")));
}

TEST(JobConfigYaml, AFileOfThePapersTrainerIsToldWhatDiffers) {
  for (const char* dialect : {"gamma: 1.0", "gamma_beta_ratio: 0.5\nhub_model_id: simpo-exps"}) {
    EXPECT_THAT(ParseWith(dialect).notes, Contains(HasSubstr("compat: princeton keeps"))) << dialect;
    EXPECT_THAT(ParseWith(std::string(dialect) + "\ncompat: trl").notes, Not(Contains(HasSubstr("keeps"))));
  }
  EXPECT_THAT(ParseWith("gamma_beta_ratio: 0.5").notes, Not(Contains(HasSubstr("keeps"))));
}

TEST(JobConfigYaml, WritesNumbersAsPeopleDo) {
  EXPECT_THAT(JobConfigToYaml(ConfigOf(ParseWith("learning_rate: 5e-7\nbeta: 2.1"))),
              AllOf(HasSubstr("learning_rate: 5e-07\n"), HasSubstr("beta: 2.1\n")));
}

TEST(JobKeys, EachDefaultIsTheOneOfJobConfig) {
  const JobConfig defaults;
  for (const JobKeyRow& row : JobKeyRows()) {
    if (row.key.fallback.empty()) {
      std::visit(
          [&](auto field) {
            if constexpr (requires { (defaults.*field).empty(); }) {
              EXPECT_TRUE((defaults.*field).empty()) << row.key.name << " has a default that its row does not tell";
            } else {
              ADD_FAILURE() << row.key.name << " needs a default in its row";
            }
          },
          row.field);
      continue;
    }
    const ParsedJob job = ParseWith(absl::StrCat(std::string(row.key.name), ": ", std::string(row.key.fallback), "\n"));
    EXPECT_THAT(Problems(job), IsEmpty()) << row.key.name;
    std::visit([&](auto field) { EXPECT_EQ(job.config.*field, defaults.*field) << row.key.name; }, row.field);
  }
}

TEST(JobKeys, NoNameStandsTwice) {
  std::set<std::string_view> names;
  for (const JobKeyRow& row : JobKeyRows()) EXPECT_TRUE(names.insert(row.key.name).second) << row.key.name;
  for (const JobKeyAlias& alias : JobKeyAliases()) {
    EXPECT_TRUE(names.contains(alias.name)) << alias.alias << " is another name of no key";
    EXPECT_TRUE(names.insert(alias.alias).second) << alias.alias;
  }
  for (const ConvertedJobKey& key : ConvertedJobKeys()) {
    EXPECT_TRUE(key.sets.empty() || names.contains(key.sets)) << key.name;
    EXPECT_TRUE(names.insert(key.name).second) << key.name;
  }
  for (const IgnoredJobKey& key : IgnoredJobKeys()) EXPECT_TRUE(names.insert(key.name).second) << key.name;
  for (const RefusedJobKey& key : RefusedJobKeys()) EXPECT_TRUE(names.insert(key.name).second) << key.name;
}

TEST(JobKeys, HelpNamesEveryKey) {
  const std::string help = JobFileHelp();
  for (const JobKeyRow& row : JobKeyRows()) {
    EXPECT_THAT(help, HasSubstr(absl::StrCat("\n  ", std::string(row.key.name), ": "))) << row.key.name;
    EXPECT_THAT(help, HasSubstr(std::string(row.key.help)));
  }
  for (const ConvertedJobKey& key : ConvertedJobKeys()) {
    EXPECT_THAT(help, HasSubstr(absl::StrCat("\n  ", std::string(key.name), ": ")));
  }
  for (const IgnoredJobKey& key : IgnoredJobKeys()) {
    EXPECT_THAT(help, HasSubstr(absl::StrCat("\n  ", std::string(key.name), ": ")));
  }
  for (const RefusedJobKey& key : RefusedJobKeys()) {
    EXPECT_THAT(help, HasSubstr(absl::StrCat("\n  ", std::string(key.name), ": ")));
  }
}

TEST(JobConfigYaml, TwoLinesAreAJob) {
  const ParsedJob job = Parse(kRequired);
  JobConfig expected;
  expected.model_name_or_path = "owner/model";
  expected.dataset_mixer = {{"owner/data", 1.0}};
  EXPECT_EQ(ConfigOf(job), expected);
  EXPECT_THAT(job.notes, Contains(AllOf(StartsWith("Loss, not given: "), HasSubstr("beta 2.0"),
                                        HasSubstr("gamma_beta_ratio 0.5"), HasSubstr("loss_type sigmoid"))));
  EXPECT_THAT(job.notes, Contains(AllOf(HasSubstr("learning_rate 5e-7"), HasSubstr("warmup_ratio 0.1"))));
}

TEST(JobConfigYaml, GivenKeysAreNotToldAsFilledIn) {
  const ParsedJob job = ParseWith("beta: 2.5\nlearning_rate: 1e-6\n");
  EXPECT_THAT(job.notes, Not(Contains(HasSubstr("beta 2.0"))));
  EXPECT_THAT(job.notes, Not(Contains(HasSubstr("learning_rate"))));
}

TEST(JobConfigYaml, NumbersNeedNoDot) {
  EXPECT_EQ(ConfigOf(ParseWith("learning_rate: 5e-7")).learning_rate, 5e-7);
  EXPECT_EQ(ConfigOf(ParseWith("learning_rate: '5.0e-07'")).learning_rate, 5e-7);
  EXPECT_EQ(ConfigOf(ParseWith("beta: 10")).beta, 10.0);
  EXPECT_EQ(ConfigOf(ParseWith("max_length: 2e3")).max_length, 2000);
}

TEST(JobConfigYaml, EveryMistakeIsToldAtOnce) {
  const ParsedJob job = ParseWith(
      "learing_rate: 5e-7\n"      // 3
      "beta: -1\n"                // 4
      "loss_type: ipo\n"          // 5
      "max_length: abc\n"         // 6
      "shuffle: perhaps\n"        // 7
      "warmup_ratio: 1.5\n"       // 8
      "max_steps: 1.5\n"          // 9
      "time_limit: soon\n"        // 10
      "resources:\n"              // 11
      "  rank_per_node: 2\n"      // 12
      "  nodes: 3\n"              // 13
      "label_smoothing: 0.5\n"    // 14
      "dataset_splits: {a: b}\n"  // 15
      "zero_stage: 4\n"           // 16
      "labels: word\n"            // 17
      "seed: [1, 2]\n");          // 18
  EXPECT_THAT(Problems(job),
              ElementsAre("3: learing_rate: unknown key; did you mean learning_rate?", "4: beta: must be > 0, not -1",
                          "5: loss_type: must be one of sigmoid | hinge, not 'ipo'",
                          "6: max_length: must be a whole number, not 'abc'",
                          "7: shuffle: must be true or false, not 'perhaps'",
                          "8: warmup_ratio: must be 0 to 1, not 1.5", "9: max_steps: must be a whole number, not '1.5'",
                          "10: time_limit: must be a time such as 90s, 15m, 2h or 1d, not 'soon'",
                          "12: resources.rank_per_node: unknown key; did you mean resources.ranks_per_node?",
                          "13: resources.nodes: must be 1 (others are not supported yet), not 3",
                          "14: label_smoothing: must be 0 to below 0.5, not 0.5",
                          "15: dataset_splits: must be a list of words", "16: zero_stage: must be 0 to 3, not 4",
                          "17: labels: must be a map of word to word", "18: seed: must be one integer"));
}

TEST(JobConfigYaml, LabelsAreFewAndShort) {
  const auto labels = [](int count, size_t key, size_t value) {
    std::string text = "labels:\n";
    for (int i = 0; i < count; ++i) {
      std::string name = absl::StrCat(i);
      name.resize(key, 'k');
      absl::StrAppend(&text, "  '", name, "': '", std::string(value, 'v'), "'\n");
    }
    return Problems(ParseWith(text));
  };
  EXPECT_THAT(labels(64, 128, 256), IsEmpty());
  EXPECT_THAT(labels(65, 8, 8), ElementsAre("3: labels: has 65 labels; at most 64 are taken"));
  EXPECT_THAT(labels(1, 129, 1), ElementsAre("4: labels: a label's name has at most 128 bytes, not 129"));
  EXPECT_THAT(labels(2, 1, 257), Contains(HasSubstr("4: labels: the value of '0' has at most 256 bytes, not 257")));
}

TEST(JobConfigYaml, AKeyOfTheUsersOwnMapsIsNotSetAlone) {
  EXPECT_THAT(
      Problems(ParseWith("labels.team: red\n", {"dataset_mixer.a.jsonl=0.5"})),
      ElementsAre("3: labels.team: unknown key; write the whole map, as labels: {team: red}",
                  "0: dataset_mixer.a.jsonl: unknown key; write the whole map, as dataset_mixer={a.jsonl: 0.5}"));
}

TEST(JobConfigYaml, OneStatusListsThemWithFileAndLine) {
  const absl::StatusOr<ParsedJob> job =
      ParseJobYamlOrStatus("beta: x\nnonsense_key_of_ours: 1\n", {.file_name = "dir/a.yaml", .base_dir = kBaseDir});
  EXPECT_EQ(job.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(job.status().message(),
            "dir/a.yaml:1: beta: must be a number, not 'x'\n"
            "dir/a.yaml:2: nonsense_key_of_ours: unknown key (see: simpoctl help job-file)\n"
            "dir/a.yaml: model_name_or_path: required: the folder of the model to train\n"
            "dir/a.yaml: dataset_mixer: required: the data to train on, as `dataset_mixer: {data/train.jsonl: 1.0}`");
}

TEST(JobConfigYaml, NamesTheNearestKey) {
  auto nearest = [](const std::string& key) { return Problems(ParseWith(key + ": 1\n")).at(0); };
  EXPECT_THAT(nearest("gama_beta_ratio"), HasSubstr("did you mean gamma_beta_ratio?"));
  EXPECT_THAT(nearest("ranks_per_node"), HasSubstr("did you mean resources.ranks_per_node?"));
  EXPECT_THAT(nearest("evaluation_stategy"), HasSubstr("did you mean evaluation_strategy?"));
  EXPECT_THAT(nearest("per_device_train_batch"), HasSubstr("did you mean per_device_train_batch_size?"));
  EXPECT_THAT(nearest("completely_unlike_anything"), HasSubstr("simpoctl help job-file"));
}

TEST(JobConfigYaml, AKeyStandsOnce) {
  EXPECT_THAT(Problems(ParseWith("beta: 2\nbeta: 3\n")), ElementsAre("4: beta: the key stands twice; keep one"));
  EXPECT_THAT(
      Problems(ParseWith("eval_strategy: no\nevaluation_strategy: epoch\n")),
      ElementsAre("4: evaluation_strategy: (as eval_strategy) says the same as eval_strategy in line 3; keep one"));
  EXPECT_THAT(Problems(ParseWith("resources: {nodes: 1}\nresources.nodes: 1\n")), ElementsAre(HasSubstr("keep one")));
}

TEST(JobConfigYaml, MixerIsChecked) {
  const ParsedJob job = Parse(
      "model_name_or_path: m\n"
      "dataset_mixer:\n"
      "  a/b: 1.5\n"
      "  c/d: half\n"
      "  e/f: 1\n"
      "  e/f: 0.5\n"
      "  g/h: 0\n");
  EXPECT_THAT(Problems(job), ElementsAre("3: dataset_mixer.a/b: the fraction must be above 0 and at most 1, not '1.5'",
                                         "4: dataset_mixer.c/d: the fraction must be above 0 and at most 1, not 'half'",
                                         "6: dataset_mixer.e/f: the data set stands twice; keep one",
                                         "7: dataset_mixer.g/h: the fraction must be above 0 and at most 1, not '0'"));
  EXPECT_THAT(Problems(Parse("model_name_or_path: m\ndataset_mixer: {}\n")), ElementsAre(HasSubstr("must be a map")));
  EXPECT_THAT(Problems(Parse("model_name_or_path: m\ndataset_mixer: [a]\n")), ElementsAre(HasSubstr("must be a map")));
  EXPECT_THAT(ConfigOf(Parse("model_name_or_path: m\ndataset_mixer: owner/data\n")).dataset_mixer,
              ElementsAre(Pair("owner/data", 1.0)));
}

TEST(JobConfigYaml, WhatIsNoJobFile) {
  EXPECT_THAT(Problems(Parse("")), ElementsAre(HasSubstr("the file is empty")));
  EXPECT_THAT(Problems(Parse("# only a comment\n")), ElementsAre(HasSubstr("the file is empty")));
  EXPECT_THAT(Problems(Parse("- a\n- b\n")), ElementsAre(StartsWith("1: : a job file is a list of `key: value`")));
  EXPECT_THAT(Problems(Parse("a: b\n c: [d\n")), ElementsAre(HasSubstr("not valid YAML")));
  EXPECT_THAT(Problems(Parse("beta: 1\n---\nbeta: 2\n")), ElementsAre(StartsWith("2: : a second document")));
  // To the YAML library this is an empty document, and then another, without end.
  EXPECT_THAT(Problems(Parse(", a")), ElementsAre(StartsWith("1: : a second document")));
  EXPECT_THAT(Problems(Parse("  a: 1\nb: 2\n")), ElementsAre(StartsWith("2: : a second document")));
  EXPECT_THAT(Problems(Parse("a: 1\nb: 2\nc: \xff\n")), ElementsAre("3: : the text is not UTF-8"));
  // The YAML library takes a zero byte for the backslash of an escape, and makes single bytes of \\N and \\_.
  EXPECT_THAT(Problems(Parse(std::string("a: 1\nb: x\0N\n", 11))),
              ElementsAre(StartsWith("2: : the text has a zero byte")));
  EXPECT_THAT(Problems(ParseWith("name: \"a\\Nb\"\n")), ElementsAre(HasSubstr("write \\u0085 or \\u00a0")));
  EXPECT_THAT(Problems(ParseWith("labels: {\"a\\_b\": c}\n")), ElementsAre(HasSubstr("write \\u0085 or \\u00a0")));
  EXPECT_THAT(Problems(ParseWith("", {"name=\"a\\Nb\""})), ElementsAre(HasSubstr("--set: \\N and \\_")));
  EXPECT_THAT(Problems(ParseWith("", {std::string("name=a\0N", 8)})),
              ElementsAre(HasSubstr("a --set has a zero byte")));
  EXPECT_EQ(ParseWith("name: \"a\\u0085b\"\n").config.name, "a\u0085b");
  EXPECT_THAT(Problems(Parse(std::string(2 << 20, 'a'))), ElementsAre(HasSubstr("bytes; a job file has at most")));
  EXPECT_THAT(Problems(Parse("[a, b]: c\n")), Contains(HasSubstr("a key must be a word")));
  EXPECT_THAT(Problems(Parse(std::string(100000, '['))), ElementsAre(StartsWith("1: : lists and maps lie too deep")));
  EXPECT_THAT(Problems(ParseWith("resources: 2\n")), ElementsAre(HasSubstr("must be a map")));
  EXPECT_THAT(Problems(ParseWith("name: \"a\\0b\"\n")), ElementsAre(HasSubstr("zero byte")));
  EXPECT_THAT(Problems(ParseWith("", {"datasets=\"\\0\""})), ElementsAre(HasSubstr("the name of a data file")));
}

TEST(JobConfigYaml, BadYamlIsToldWithARemedy) {
  EXPECT_THAT(Problems(Parse("a: b: c\n")), ElementsAre(AllOf(StartsWith("1: : "), HasSubstr("in quotes"))));
  EXPECT_THAT(Problems(Parse("a: 1\nb:\n\tc: 1\n")), ElementsAre(AllOf(StartsWith("3: : "), HasSubstr("spaces"))));
  EXPECT_THAT(Problems(Parse("a: 1\nbeta 2\nc: 3\n")), ElementsAre(HasSubstr("lacks its colon")));
  EXPECT_THAT(Problems(ParseWith("", {"name=[x"})), ElementsAre(HasSubstr("not closed by ]")));
}

TEST(JobConfigYaml, WhatIsToldIsShortWhateverTheFileHolds) {
  std::string yaml;
  for (int i = 0; i < 5000; ++i) yaml += "key" + std::to_string(i) + ": 1\n";
  const ParsedJob many = ParseWith(yaml);
  ASSERT_EQ(many.violations.size(), 101u);
  EXPECT_EQ(many.violations.back().description, "and 4900 more; they are told when these are corrected");
  const ParsedJob longest =
      ParseWith(std::string(900, 'k') + ": 1\n\"a\\nb\": 1\nbeta: \"" + std::string(300, 'v') +
                "\\n\"\nloss_type: " + std::string(40, 'v') + "\xe2\x82\xac" + std::string(300, 'v') + "\n");
  ASSERT_EQ(longest.violations.size(), 4u);
  for (const FieldViolation& violation : longest.violations) {
    EXPECT_LE(violation.field.size(), 160u);
    EXPECT_LE(violation.description.size(), 300u);
    EXPECT_EQ(violation.field.find('\n'), std::string::npos);
  }
}

TEST(JobConfigYaml, WhatCannotBeStoredIsRefused) {
  std::string mixer = "model_name_or_path: m\ndataset_mixer:\n";
  for (int i = 0; i < 1000; ++i) mixer += "  ./" + std::to_string(i) + ": 1\n";
  EXPECT_THAT(Problems(Parse(mixer)), IsEmpty());
  EXPECT_THAT(Problems(Parse(mixer + "  more: 1\n")), ElementsAre(HasSubstr("at most 1000 are taken")));
  // Each byte of the template takes four when it is written.
  const std::string escapes = "chat_template: \"{{ x }}" + std::string(400'000, '\x02') + "\"\n";
  EXPECT_THAT(Problems(ParseWith(escapes)), ElementsAre(HasSubstr("with full paths and every default")));
  const ParsedJob far = ParseJobYaml(mixer, {.file_name = "job.yaml", .base_dir = "/" + std::string(4000, 'd')});
  EXPECT_THAT(Problems(far), ElementsAre(HasSubstr("with full paths and every default")));
}

TEST(JobConfigYaml, AnEmptyTextLeavesTheDefault) {
  const JobConfig config = ConfigOf(ParseWith("model_revision: \"\"\nmetric_for_best_model: ''\n"));
  EXPECT_EQ(config.model_revision, "main");
  EXPECT_EQ(config.metric_for_best_model, "eval_loss");
}

TEST(JobConfigYaml, AnyCharacterIsWrittenAndReadAgain) {
  JobConfig config = ConfigOf(Parse(std::string(kRequired)));
  for (char32_t c :
       {U'\x01', U'\t',     U'\n',     U'\r',     U'"',      U'\\',     U'\x7f',   U'\x80',   U'\x85',    U'\xa0',
        U'\xe9', U'\x2028', U'\x2029', U'\xfdd0', U'\xfeff', U'\xfffd', U'\xfffe', U'\xffff', U'\x1f600', U'\x1ffff'}) {
    const std::string text = std::filesystem::path(std::u32string({c})).string();
    config.labels["a" + text] = text + " b" + text + text;
  }
  const std::string written = JobConfigToYaml(config);
  EXPECT_EQ(ConfigOf(Parse(written)), config) << written;
  for (const char* escaped :
       {"\\x01", "\\x0a", "\\\"", "\\x7f", "\\u0085", "\\u00a0", "\\u2028", "\\ufeff", "\u00e9"}) {
    EXPECT_THAT(written, HasSubstr(escaped));
  }
}

TEST(JobConfigYaml, ALongNameIsWrittenAndReadAgain) {
  const std::string path = "/" + std::string(3000, 'd');
  const JobConfig config = ConfigOf(Parse("model_name_or_path: m\ndataset_mixer:\n  ? " + path + "\n  : 0.5\n"));
  EXPECT_THAT(config.dataset_mixer, ElementsAre(Pair(path, 0.5)));
  EXPECT_EQ(ConfigOf(Parse(JobConfigToYaml(config))), config);
}

TEST(JobConfigYaml, OverridesWin) {
  const ParsedJob job =
      ParseWith("beta: 2\nrun_name: file\n", {"beta=3", "beta=4", "name=set", "resources.ranks_per_node=2"});
  EXPECT_EQ(ConfigOf(job).beta, 4.0);
  EXPECT_EQ(job.config.name, "set");
  EXPECT_EQ(job.config.ranks_per_node, 2);
  EXPECT_EQ(ConfigOf(ParseWith("", {"resources={ranks_per_node: 4}"})).ranks_per_node, 4);
  EXPECT_THAT(ConfigOf(ParseWith("", {"dataset_splits=[a, b]"})).dataset_splits, ElementsAre("a", "b"));
  EXPECT_THAT(
      Problems(ParseWith("", {"beta", "=1", "bta=1", "name=[x"})),
      ElementsAre(StartsWith("0: beta: --set takes key=value"), StartsWith("0: =1: --set takes key=value"),
                  HasSubstr("0: name: --set: the value is not valid YAML"), "0: bta: unknown key; did you mean beta?"));
  // A wrong value of the file that --set replaces is no mistake.
  EXPECT_THAT(Problems(ParseWith("beta: x\n", {"beta=1"})), IsEmpty());
}

TEST(JobConfigYaml, ValuesMustFitTogether) {
  EXPECT_THAT(Problems(ParseWith("max_length: 100\nmax_prompt_length: 100\n")),
              ElementsAre("4: max_prompt_length: must be below max_length (100)"));
  EXPECT_THAT(Problems(ParseWith("eval_strategy: steps\n")), ElementsAre(StartsWith("3: eval_steps: ")));
  EXPECT_THAT(Problems(ParseWith("save_strategy: steps\n")), ElementsAre(StartsWith("3: save_steps: ")));
  EXPECT_THAT(Problems(ParseWith("max_steps: 0\n")), ElementsAre(StartsWith("3: max_steps: ")));
  EXPECT_THAT(Problems(ParseWith("max_steps: 5\nwarmup_steps: 6\n")), ElementsAre(StartsWith("4: warmup_steps: ")));
  EXPECT_THAT(Problems(ParseWith("dataset_splits: [a, b, c]\n")), ElementsAre(StartsWith("3: dataset_splits: ")));
}

// As transformers asks: every checkpoint has an evaluation to be judged by.
TEST(JobConfigYaml, TheBestModelNeedsMatchingEvaluations) {
  const std::string best = "load_best_model_at_end: true\n";
  const std::string steps = best + "eval_strategy: steps\neval_steps: 10\nsave_strategy: steps\n";
  EXPECT_EQ(ConfigOf(ParseWith(steps + "save_steps: 20\n")).greater_is_better, "");
  EXPECT_EQ(ConfigOf(ParseWith(best + "eval_strategy: epoch\nsave_strategy: epoch\ngreater_is_better: no\n"
                                      "metric_for_best_model: rewards/accuracies\n"))
                .greater_is_better,
            "false");
  EXPECT_THAT(Problems(ParseWith(best)), ElementsAre(StartsWith("3: save_strategy: ")));
  EXPECT_THAT(Problems(ParseWith(best + "eval_strategy: epoch\nsave_strategy: steps\nsave_steps: 5\n")),
              ElementsAre(StartsWith("5: save_strategy: ")));
  EXPECT_THAT(Problems(ParseWith(steps + "save_steps: 15\n")), ElementsAre(StartsWith("7: save_steps: ")));
  EXPECT_THAT(Problems(ParseWith(steps + "save_steps: 20\nmetric_for_best_model: accuracy\n")),
              ElementsAre(AllOf(StartsWith("8: metric_for_best_model: "), HasSubstr("eval_rewards/accuracies"))));
  EXPECT_THAT(Problems(ParseWith("greater_is_better: maybe\n")), ElementsAre(StartsWith("3: greater_is_better: ")));
  EXPECT_THAT(ParseWith("save_only_model: true\n").notes, Contains(HasSubstr("save_only_model")));
}

TEST(JobConfigYaml, GlobalBatch) {
  EXPECT_EQ(ConfigOf(ParseWith("")).global_batch_size, 128);
  const ParsedJob product =
      ParseWith("per_device_train_batch_size: 2\ngradient_accumulation_steps: 4\nresources: {ranks_per_node: 2}\n");
  EXPECT_EQ(ConfigOf(product).global_batch_size, 16);
  EXPECT_THAT(product.notes, Contains(HasSubstr("global_batch_size 16 = ")));
  const ParsedJob given =
      ParseWith("per_device_train_batch_size: 2\ngradient_accumulation_steps: 4\nglobal_batch_size: 6\n");
  EXPECT_EQ(ConfigOf(given).global_batch_size, 6);
  EXPECT_THAT(given.notes, Contains(HasSubstr("wins over")));
  const ParsedJob derived = ParseWith("per_device_train_batch_size: 2\n");
  EXPECT_EQ(ConfigOf(derived).global_batch_size, 128);
  EXPECT_THAT(derived.notes, Contains(HasSubstr("gradient_accumulation_steps is not given: derived")));
  EXPECT_THAT(Problems(ParseWith("gradient_accumulation_steps: 4\n")),
              ElementsAre(StartsWith("3: gradient_accumulation_steps: says a batch only together with")));
  EXPECT_THAT(Problems(ParseWith("per_device_train_batch_size: 65536\ngradient_accumulation_steps: 1048576\n")),
              ElementsAre(HasSubstr("larger than 1048576 pairs")));
}

TEST(JobConfigYaml, NoIsAWordThatYamlTakesForFalse) {
  EXPECT_EQ(ConfigOf(ParseWith("eval_strategy: no\n")).eval_strategy, "no");
  EXPECT_EQ(ConfigOf(ParseWith("eval_strategy: false\n")).eval_strategy, "no");
  EXPECT_EQ(ConfigOf(ParseWith("save_strategy: \"no\"\n")).save_strategy, "no");
  EXPECT_EQ(ConfigOf(ParseWith("resume_from_checkpoint: false\n")).resume_from_checkpoint, "");
  EXPECT_EQ(ConfigOf(ParseWith("beta:\nmax_steps: null\n")).beta, 2.0);
}

class Paths : public ::testing::Test {
 protected:
  void SetUp() override {
    std::filesystem::create_directories(folder_ / "jobs");
    std::filesystem::create_directories(folder_ / "data" / "pairs");
    std::ofstream(folder_ / "jobs" / "train.jsonl") << "{}\n";
  }

  std::string Resolved(const std::string& name) {
    const std::string yaml = "model_name_or_path: " + name + "\ndataset_mixer: {owner/data: 1}\n";
    return ParseJobYaml(yaml, {.base_dir = (folder_ / "jobs").string(), .overrides = {}}).config.model_name_or_path;
  }

  const TempDir temporary_;
  const std::filesystem::path folder_ = temporary_.path();
};

TEST_F(Paths, RelativeOnesStartAtTheFile) {
  EXPECT_EQ(Resolved("train.jsonl"), (folder_ / "jobs/train.jsonl").string());
  EXPECT_EQ(Resolved("../data/pairs"), (folder_ / "data/pairs").string());
  EXPECT_EQ(Resolved("./not/there"), (folder_ / "jobs/not/there").string());
  EXPECT_EQ(Resolved("/abs/../x"), "/x");
}

TEST_F(Paths, HubNamesStay) {
  EXPECT_EQ(Resolved("owner/name"), "owner/name");
  EXPECT_EQ(Resolved("meta-llama/Meta-Llama-3-8B-Instruct"), "meta-llama/Meta-Llama-3-8B-Instruct");
  EXPECT_EQ(Resolved("gpt2"), "gpt2");
}

TEST_F(Paths, WhatCanOnlyBeAFileIsNoHubName) {
  EXPECT_EQ(Resolved("data/train.jsonl"), (folder_ / "jobs/data/train.jsonl").string());
  EXPECT_EQ(Resolved("a/b/c"), (folder_ / "jobs/a/b/c").string());
}

TEST_F(Paths, HomeIsExpanded) {
  const char* home = std::getenv("HOME");
  ASSERT_NE(home, nullptr);
  EXPECT_EQ(Resolved("~/models/x"), std::filesystem::path(std::string(home) + "/models/x").lexically_normal().string());
}

// Every job file that the project ships, against the paper's table where it is one of the paper's.
TEST(Configs, AreCompleteJobs) {
  namespace fs = std::filesystem;
  int paper = 0;
  for (const auto& item : fs::recursive_directory_iterator(SIMPO_CONFIGS_DIR)) {
    if (item.path().extension() != ".yaml") continue;
    SCOPED_TRACE(item.path());
    std::ifstream file(item.path());
    const std::string yaml{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
    const JobConfig config = ConfigOf(
        ParseJobYaml(yaml, {.file_name = item.path(), .base_dir = item.path().parent_path(), .overrides = {}}));
    EXPECT_EQ(config.name, item.path().stem());
    if (item.path().parent_path().filename() != "paper") continue;
    ++paper;
    EXPECT_EQ(config.compat, "princeton");
    EXPECT_EQ(config.global_batch_size, 128);
    EXPECT_EQ(config.max_grad_norm, 0);
    EXPECT_EQ(config.max_length, config.name.starts_with("mistral-7b-base") ? 1024 : 2048);
  }
  EXPECT_EQ(paper, 6);
}

}  // namespace
}  // namespace simpo
