// Whatever a job file holds, reading it ends with a config or with violations.
#include <gtest/gtest.h>

#include <algorithm>
#include <iterator>
#include <random>

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

constexpr const char* kPieces[] = {"\n",
                                   ": ",
                                   "- ",
                                   "{",
                                   "}",
                                   "[",
                                   "]",
                                   "&a ",
                                   "*a",
                                   "!!str ",
                                   "!x ",
                                   "? ",
                                   "|\n",
                                   ">\n",
                                   "'",
                                   "\"",
                                   "\\",
                                   "#",
                                   "%",
                                   "---\n",
                                   "...\n",
                                   "<<: ",
                                   "~",
                                   "null",
                                   "true",
                                   "no",
                                   "1e999",
                                   "-1",
                                   "0",
                                   ".nan",
                                   "9999999999999999999",
                                   "\t",
                                   "  ",
                                   "beta: ",
                                   "datasets: ",
                                   "dataset_mixture: ",
                                   "resources: ",
                                   "gamma: ",
                                   "dataset_name: x\n",
                                   "\xff",
                                   "\xc3\xa9",
                                   "\"\\0\"",
                                   "\"\\uD800\"",
                                   "lora_r: 8\n",
                                   "warmup_steps: 0\n"};

std::string Mutate(std::string text, std::mt19937_64& random) {
  auto below = [&](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(random); };
  const size_t changes = 1 + below(4);
  for (size_t i = 0; i < changes && !text.empty(); ++i) {
    const size_t at = below(text.size());
    switch (below(5)) {
      case 0:
        text[at] = static_cast<char>(below(256));
        break;
      case 1:
        text.erase(at, 1 + below(12));
        break;
      case 2:
        text.insert(at, kPieces[below(std::size(kPieces))]);
        break;
      case 3: {  // a line again, elsewhere
        const size_t begin = text.rfind('\n', at) == std::string::npos ? 0 : text.rfind('\n', at) + 1;
        const size_t end = text.find('\n', at) == std::string::npos ? text.size() : text.find('\n', at) + 1;
        if (end <= begin) break;  // `at` is the line's end
        text.insert(below(text.size()), text.substr(begin, end - begin));
        break;
      }
      default:
        text.resize(at);
    }
  }
  return text;
}

TEST(JobMutation, ReadingAlwaysEnds) {
  std::mt19937_64 random(20240611);
  int accepted = 0;
  int refused = 0;
  for (int i = 0; i < 6000; ++i) {
    const std::string yaml = Mutate(kSeedFile, random);
    const ParsedJob job = Parse(yaml);
    if (!job.violations.empty()) {
      ++refused;
      for (const FieldViolation& violation : job.violations) {
        ASSERT_FALSE(violation.description.empty()) << yaml;
        ASSERT_GE(violation.line, 0) << yaml;
        ASSERT_LE(violation.line, 2 + std::count(yaml.begin(), yaml.end(), '\n')) << yaml;
      }
      continue;
    }
    ++accepted;
    const ParsedJob again = Parse(JobConfigToYaml(job.config));
    ASSERT_TRUE(again.violations.empty()) << yaml << "\n" << FormatViolations(again.violations, "again");
    ASSERT_EQ(again.config, job.config) << yaml;
  }
  // The mutations are mild enough to reach both ends.
  EXPECT_GT(accepted, 300);
  EXPECT_GT(refused, 300);
}

TEST(JobMutation, OverridesNeverCrash) {
  std::mt19937_64 random(7);
  for (int i = 0; i < 2000; ++i) {
    const std::string set = Mutate("dataset_mixer={owner/data: 0.5}", random);
    const ParsedJob job = Parse(kRequired, {set, Mutate("beta=2.5", random)});
    for (const FieldViolation& violation : job.violations) ASSERT_FALSE(violation.description.empty()) << set;
  }
}

}  // namespace
}  // namespace simpo
