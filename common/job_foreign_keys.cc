// The keys of TRL, alignment-handbook and transformers that need more than another name.
#include <algorithm>
#include <array>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/job_entries.h"
#include "common/job_keys.h"
#include "common/job_values.h"
#include "common/text.h"

namespace simpo {
namespace {

// gamma and simpo_gamma are the margin itself, ours is relative to beta.
void ConvertGamma(const JobEntry& gamma, std::optional<double> beta, JobReading* reading) {
  const std::optional<double> value = ScalarNumber(gamma.value);
  if (!value) {
    reading->Violation(gamma.written, gamma.line, "must be a number");
    return;
  }
  if (!beta || *beta <= 0) return;  // beta has its own violation
  const std::string ratio = NumberText(*value / *beta);
  reading->AddConverted("gamma_beta_ratio", YAML::Node(ratio), gamma);
  reading->Note(absl::StrFormat("%s %s with beta %s is gamma_beta_ratio %s", gamma.written, NumberText(*value),
                                NumberText(*beta), ratio));
}

// Files of TRL's CPOTrainer say SimPO in other words, and leave out what is not SimPO by default there.
void ConvertCpo(JobReading* reading) {
  JobEntry* loss = reading->Find("loss_type");
  const bool says_simpo = loss != nullptr && ScalarText(loss->value) == "simpo";
  const bool has_gamma = reading->Find("simpo_gamma") != nullptr;
  const bool has_alpha = reading->Find("cpo_alpha") != nullptr;
  if (!says_simpo && !has_gamma && !has_alpha) return;
  if (loss == nullptr) {
    reading->Violation("loss_type", 0,
                       "a CPO file (simpo_gamma, cpo_alpha) must say loss_type: simpo: TRL's silent "
                       "default, sigmoid, is not SimPO");
  } else if (!says_simpo) {
    reading->Violation("loss_type", loss->line,
                       "a CPO file (simpo_gamma, cpo_alpha) must say loss_type: simpo; its "
                       "other losses are not SimPO");
  }
  if (loss != nullptr) loss->value.reset(YAML::Node("sigmoid"));
  const JobEntry* beta = reading->Find("beta");
  const std::optional<double> beta_value = beta == nullptr ? std::nullopt : ScalarNumber(beta->value);
  if (beta == nullptr) {
    reading->Violation("beta", 0, "a CPO file must say beta: TRL's silent default 0.1 is not SimPO");
  }
  if (const std::optional<JobEntry> gamma = reading->Take("simpo_gamma")) {
    ConvertGamma(*gamma, beta_value, reading);
  } else if (reading->Find("gamma_beta_ratio") == nullptr) {
    reading->Violation("simpo_gamma", 0, "a CPO file must say simpo_gamma: its silent default does not fit every beta");
  }
  if (const std::optional<JobEntry> alpha = reading->Take("cpo_alpha")) {
    reading->AddConverted("sft_weight", alpha->value, *alpha);
    reading->Note(absl::StrCat("cpo_alpha ", ScalarText(alpha->value), " is taken as sft_weight"));
  } else if (reading->Find("sft_weight") == nullptr) {
    reading->Violation("cpo_alpha", 0,
                       "a CPO file must say cpo_alpha (0 for SimPO): TRL's silent default 1.0 adds a "
                       "full SFT term");
  }
}

void ConvertPrincetonGamma(JobReading* reading) {
  const std::optional<JobEntry> gamma = reading->Take("gamma");
  if (!gamma) return;
  const JobEntry* beta = reading->Find("beta");
  ConvertGamma(*gamma, beta == nullptr ? JobConfig().beta : ScalarNumber(beta->value), reading);
}

// One data set of a list: {id or path, weight, split, config}. Adds it to the mixer.
void ConvertListedDataset(const YAML::Node& item, const JobEntry& origin, YAML::Node* mixer,
                          std::set<std::string>* splits, std::set<std::string>* configs, JobReading* reading) {
  const int line = origin.line == 0 ? 0 : item.Mark().line + 1;
  if (item.IsScalar()) {
    mixer->force_insert(item.Scalar(), 1.0);
    return;
  }
  std::string name;
  YAML::Node weight(1.0);
  if (item.IsMap()) {
    for (const auto& field : item) {
      const std::string key = ScalarText(field.first);
      if (key == "id" || key == "path") {
        name = ScalarText(field.second);
      } else if (key == "weight") {
        weight = field.second;
      } else if (key == "split") {
        splits->insert(ScalarText(field.second));
      } else if (key == "config" || key == "name") {
        if (!field.second.IsNull()) configs->insert(ScalarText(field.second));
      } else if (key != "columns") {  // those that are needed are found by name
        reading->Violation(absl::StrCat(origin.written, ".", key), line,
                           "unknown; a data set has id or path, weight, split, config and columns");
      }
    }
  }
  if (name.empty()) {
    reading->Violation(origin.written, line, "each data set of the list needs an id (or path)");
    return;
  }
  mixer->force_insert(name, weight);
}

void ConvertDatasetList(const YAML::Node& list, const JobEntry& origin, JobReading* reading) {
  YAML::Node mixer(YAML::NodeType::Map);
  std::set<std::string> splits;
  std::set<std::string> configs;
  for (const YAML::Node& item : list) ConvertListedDataset(item, origin, &mixer, &splits, &configs, reading);
  if (splits.size() > 1 || configs.size() > 1) {
    reading->Violation(origin.written, origin.line,
                       "data sets with different splits or configs in one job are not supported");
    return;
  }
  if (mixer.size() > 0) reading->AddConverted("dataset_mixer", mixer, origin);
  if (!splits.empty()) reading->AddConverted("dataset_splits", YAML::Node(*splits.begin()), origin);
  if (!configs.empty()) reading->AddConverted("dataset_configs", YAML::Node(*configs.begin()), origin);
}

// alignment-handbook's newer form: {datasets: [{id, weight, ...}], seed, test_split_size}; a plain map
// of name to fraction is the older one.
void ConvertMixture(JobReading* reading) {
  for (const char* key : {"dataset_mixture", "datasets"}) {
    const std::optional<JobEntry> mixture = reading->Take(key);
    if (!mixture || mixture->value.IsNull()) continue;
    if (mixture->value.IsSequence()) {
      ConvertDatasetList(mixture->value, *mixture, reading);
      continue;
    }
    const YAML::Node list = mixture->value.IsMap() ? mixture->value["datasets"] : YAML::Node();
    if (!list.IsDefined() || !list.IsSequence()) {
      reading->AddConverted("dataset_mixer", mixture->value, *mixture);
      continue;
    }
    ConvertDatasetList(list, *mixture, reading);
    for (const auto& item : mixture->value) {
      const std::string name = ScalarText(item.first);
      const int line = mixture->line == 0 ? 0 : item.first.Mark().line + 1;
      if (name == "datasets") continue;
      if (name == "seed") {
        reading->Note("dataset_mixture.seed has no effect: the order of the pairs is said by seed");
      } else if (name == "test_split_size") {
        reading->entries.push_back({name, item.second, line, absl::StrCat(mixture->written, ".", name)});
      } else {
        reading->Violation(absl::StrCat(mixture->written, ".", name), line,
                           "unknown; a mixture has datasets, seed and test_split_size");
      }
    }
  }
}

void ConvertDatasetName(JobReading* reading) {
  if (const std::optional<JobEntry> name = reading->Take("dataset_name")) {
    if (!name->value.IsScalar()) {
      reading->Violation(name->written, name->line, "must be one name");
    } else {
      YAML::Node mixer(YAML::NodeType::Map);
      mixer[name->value.Scalar()] = 1.0;
      reading->AddConverted("dataset_mixer", mixer, *name);
    }
  }
  const std::optional<JobEntry> train = reading->Take("dataset_train_split");
  const std::optional<JobEntry> test = reading->Take("dataset_test_split");
  if (!train && !test) return;
  YAML::Node splits(YAML::NodeType::Sequence);
  splits.push_back(train ? train->value : YAML::Node("train"));
  if (test) splits.push_back(test->value);
  reading->AddConverted("dataset_splits", splits, train ? *train : *test);
}

// bf16 is transformers' mixed precision: bfloat16 arithmetic over float32 masters, which is what
// torch_dtype: bfloat16 means here, whatever type the file's weights are loaded in there.
void ConvertBf16(JobReading* reading) {
  const std::optional<JobEntry> bf16 = reading->Take("bf16");
  if (!bf16 || bf16->value.IsNull()) return;
  const std::string text = ScalarText(bf16->value);
  const std::optional<bool> on = text == "auto" ? std::optional<bool>(false) : ToBool(text);
  if (!on) {
    reading->Violation(bf16->written, bf16->line, absl::StrCat("must be true or false, not '", OneLine(text, 80), "'"));
    return;
  }
  if (!*on) return;
  JobEntry* dtype = reading->Find("torch_dtype");
  if (dtype == nullptr) {
    reading->AddConverted("torch_dtype", YAML::Node("bfloat16"), *bf16);
    reading->Note("bf16 is taken as torch_dtype: bfloat16");
    return;
  }
  const std::string said = ScalarText(dtype->value);
  if (said == "bfloat16") return;
  if (dtype->line == 0 && bf16->line > 0) {  // --set wins over the file
    reading->Note(absl::StrCat("bf16 has no effect: --set says torch_dtype: ", said));
    return;
  }
  dtype->value.reset(YAML::Node("bfloat16"));
  reading->Note("bf16 is taken as torch_dtype: bfloat16; master weights are float32 always");
}

void CheckOptimizer(JobReading* reading) {
  const std::optional<JobEntry> optim = reading->Take("optim");
  if (!optim || optim->value.IsNull()) return;
  constexpr std::array kKnown = {"adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"};
  const std::string name = ScalarText(optim->value);
  if (std::find(kKnown.begin(), kKnown.end(), name) != kKnown.end()) return;
  reading->Violation(optim->written, optim->line,
                     absl::StrCat("'", OneLine(name, 80),
                                  "' is not supported; the optimizer is adamw_torch with "
                                  "float32 masters and moments"));
}

// In transformers a fraction is the ratio, and 0 leaves the warm-up to warmup_ratio.
void ConvertWarmup(JobReading* reading) {
  const JobEntry* warmup = reading->Find("warmup_steps");
  const std::optional<double> value = warmup == nullptr ? std::nullopt : ScalarNumber(warmup->value);
  if (!value || *value < 0 || *value >= 1) return;
  const JobEntry steps = *reading->Take("warmup_steps");
  if (*value == 0 && reading->Find("warmup_ratio") != nullptr) {
    reading->Note("warmup_steps 0 leaves the warm-up to warmup_ratio");
    return;
  }
  if (const JobEntry* ratio = reading->Find("warmup_ratio"); ratio != nullptr && ratio->line > 0) {
    reading->Take("warmup_ratio");
  }
  reading->AddConverted("warmup_ratio", steps.value, steps);
  if (*value > 0)
    reading->Note(absl::StrCat("warmup_steps ", NumberText(*value), " is a fraction: taken as warmup_ratio"));
}

// Steps without a strategy would have no effect; that cannot be meant.
void ConvertStrategies(JobReading* reading) {
  constexpr std::pair<const char*, const char*> kPairs[] = {{"eval_steps", "eval_strategy"},
                                                            {"save_steps", "save_strategy"}};
  for (const auto& [steps, strategy] : kPairs) {
    const JobEntry* entry = reading->Find(steps);
    if (entry == nullptr || ScalarNumber(entry->value).value_or(0) <= 0 || reading->Find(strategy) != nullptr) continue;
    const JobEntry origin = *entry;
    reading->AddConverted(strategy, YAML::Node("steps"), origin);
    reading->Note(absl::StrCat(steps, " is given: taken as ", strategy, ": steps too"));
  }
}

}  // namespace

void ConvertForeignKeys(JobReading* reading) {
  for (JobEntry& entry : reading->entries) {
    for (const JobKeyAlias& alias : JobKeyAliases()) {
      if (alias.alias == entry.key) entry.key = alias.name;
    }
  }
  ConvertCpo(reading);
  ConvertPrincetonGamma(reading);
  ConvertMixture(reading);
  ConvertDatasetName(reading);
  ConvertBf16(reading);
  CheckOptimizer(reading);
  ConvertWarmup(reading);
  ConvertStrategies(reading);
}

}  // namespace simpo
