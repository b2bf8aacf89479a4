#include "common/job_config_yaml.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <filesystem>
#include <limits>
#include <optional>
#include <set>
#include <type_traits>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "common/job_keys.h"

namespace simpo {
namespace {

constexpr size_t kMaxFileBytes = 1 << 20;

absl::string_view Absl(std::string_view text) { return {text.data(), text.size()}; }

// One `key: value` of the file or of --set, nested keys dotted.
struct Entry {
  std::string key;
  YAML::Node value;
  int line = 0;
};

std::optional<double> ToNumber(const std::string& text) {
  double value = 0;
  // "5e-7" without a dot is a number here, though YAML 1.1 calls it a string.
  if (!absl::SimpleAtod(text, &value) || !std::isfinite(value)) return std::nullopt;
  return value;
}

std::optional<bool> ToBool(const std::string& text) {
  const std::string lower = absl::AsciiStrToLower(text);
  if (lower == "true" || lower == "yes" || lower == "on") return true;
  if (lower == "false" || lower == "no" || lower == "off") return false;
  return std::nullopt;
}

// "90", "90s", "15m", "2h", "1d" in seconds.
std::optional<int64_t> ToDuration(const std::string& text) {
  if (text.empty()) return std::nullopt;
  double unit = 1;
  std::string number = text;
  switch (text.back()) {
    case 's': unit = 1; break;
    case 'm': unit = 60; break;
    case 'h': unit = 3600; break;
    case 'd': unit = 86400; break;
    default: number += 's';
  }
  number.pop_back();
  const std::optional<double> value = ToNumber(number);
  if (!value || *value < 0 || *value * unit > 1e12) return std::nullopt;
  return static_cast<int64_t>(std::llround(*value * unit));
}

// Levenshtein distance, for "did you mean".
size_t EditDistance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row.back();
}

std::string NearestKey(std::string_view key) {
  std::string best;
  size_t best_distance = std::max<size_t>(2, key.size() / 3) + 1;
  auto consider = [&](std::string_view candidate) {
    const size_t distance = EditDistance(key, candidate);
    if (distance < best_distance) {
      best_distance = distance;
      best = candidate;
    }
  };
  for (const JobKeyRow& row : JobKeyRows()) {
    consider(row.key.name);
    if (row.key.name.starts_with("resources.") && key == row.key.name.substr(10)) return std::string(row.key.name);
  }
  for (const JobKeyAlias& alias : JobKeyAliases()) consider(alias.alias);
  return best;
}

// The range text of a key, applied to a number; the message when it does not fit.
std::optional<std::string> CheckRange(std::string_view range, double value) {
  const std::vector<std::string> words = absl::StrSplit(Absl(range), ' ');
  bool fits = true;
  if (words.size() == 2 && words[0] == ">") fits = value > *ToNumber(words[1]);
  if (words.size() == 2 && words[0] == ">=") fits = value >= *ToNumber(words[1]);
  if (words.size() == 3) fits = value >= *ToNumber(words[0]) && value <= *ToNumber(words[2]);
  if (words.size() == 4) fits = value >= *ToNumber(words[0]) && value < *ToNumber(words[3]);
  if (fits) return std::nullopt;
  return absl::StrCat("must be ", std::string(range), ", not ", value);
}

bool Equal(double a, double b) { return a == b; }

class Parser {
 public:
  explicit Parser(const JobParseOptions& options) : options_(options) {
    base_dir_ = options.base_dir.empty() ? std::filesystem::current_path().string() : options.base_dir;
  }

  ParsedJob Parse(std::string_view yaml) {
    if (ReadFile(yaml)) {
      for (const std::string& text : options_.overrides) ReadOverride(text);
      DropOverridden();
      ConvertForeignKeys();
      for (const Entry& entry : entries_) Apply(entry);
      CheckTogether();
      FillIn();
    }
    return std::move(job_);
  }

 private:
  void Violation(std::string field, int line, std::string description) {
    job_.violations.push_back({std::move(field), line, std::move(description)});
  }
  void Note(std::string text) { job_.notes.push_back(std::move(text)); }

  bool ReadFile(std::string_view yaml);
  void ReadMap(const YAML::Node& map, const std::string& prefix);
  void ReadOverride(const std::string& text);
  void DropOverridden();
  void ConvertForeignKeys();
  void ConvertCpo();
  void ConvertDatasetName();
  void Apply(const Entry& entry);
  bool ApplyRefusedOrIgnored(const Entry& entry);
  void Set(const JobKeyRow& row, const Entry& entry);
  void SetScalar(const JobKeyRow& row, const Entry& entry, const std::string& text);
  void CheckTogether();
  void FillIn();
  std::string ResolvePath(const std::string& value) const;

  Entry* FindEntry(std::string_view key) {
    for (Entry& entry : entries_) {
      if (entry.key == key) return &entry;
    }
    return nullptr;
  }
  bool Given(std::string_view key) const { return given_.contains(std::string(key)); }
  int LineOf(std::string_view key) {
    const Entry* entry = FindEntry(key);
    return entry == nullptr ? 0 : entry->line;
  }
  // Takes a scalar entry out of the list.
  std::optional<Entry> Take(std::string_view key) {
    for (auto it = entries_.begin(); it != entries_.end(); ++it) {
      if (it->key != key) continue;
      Entry entry = *it;
      entries_.erase(it);
      return entry;
    }
    return std::nullopt;
  }

  const JobParseOptions& options_;
  std::string base_dir_;
  std::vector<Entry> entries_;
  size_t file_entries_ = 0;
  std::set<std::string> given_;
  ParsedJob job_;
};

bool IsValidUtf8(std::string_view text, size_t* bad) {
  for (size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    const size_t length = lead < 0x80 ? 1 : lead >= 0xc2 && lead < 0xe0 ? 2 : lead >= 0xe0 && lead < 0xf0 ? 3
                          : lead >= 0xf0 && lead < 0xf5 ? 4 : 0;
    *bad = i;
    if (length == 0 || i + length > text.size()) return false;
    for (size_t j = 1; j < length; ++j) {
      if ((static_cast<unsigned char>(text[i + j]) & 0xc0) != 0x80) return false;
    }
    i += length;
  }
  return true;
}

bool Parser::ReadFile(std::string_view yaml) {
  if (yaml.size() > kMaxFileBytes) {
    Violation("", 0, absl::StrCat("the file has ", yaml.size(), " bytes; a job file has at most ", kMaxFileBytes));
    return false;
  }
  if (size_t bad = 0; !IsValidUtf8(yaml, &bad)) {
    const auto line = 1 + std::count(yaml.begin(), yaml.begin() + static_cast<int64_t>(bad), '\n');
    Violation("", static_cast<int>(line), "the text is not UTF-8");
    return false;
  }
  try {
    const YAML::Node root = YAML::Load(std::string(yaml));
    if (root.IsNull()) {
      Violation("", 0, "the file is empty; a job needs at least model_name_or_path and dataset_mixer");
      return false;
    }
    if (!root.IsMap()) {
      Violation("", root.Mark().line + 1, "a job file is a list of `key: value` lines");
      return false;
    }
    ReadMap(root, "");
  } catch (const YAML::Exception& error) {
    Violation("", error.mark.line + 1, absl::StrCat("not valid YAML: ", error.msg, " (column ", error.mark.column + 1, ")"));
    return false;
  }
  file_entries_ = entries_.size();
  return true;
}

void Parser::ReadMap(const YAML::Node& map, const std::string& prefix) {
  std::set<std::string> seen;
  for (const auto& item : map) {
    const int line = item.first.Mark().line + 1;
    if (!item.first.IsScalar()) {
      Violation(prefix, line, "a key must be a word");
      continue;
    }
    const std::string key = prefix + item.first.Scalar();
    if (!seen.insert(key).second) {
      Violation(key, line, "the key stands twice; keep one");
    } else if (key == "resources" && item.second.IsMap()) {
      ReadMap(item.second, "resources.");
    } else {
      entries_.push_back({key, item.second, line});
    }
  }
}

void Parser::ReadOverride(const std::string& text) {
  const size_t equals = text.find('=');
  if (equals == std::string::npos || equals == 0) {
    Violation(text, 0, "--set takes key=value");
    return;
  }
  try {
    entries_.push_back({text.substr(0, equals), YAML::Load(text.substr(equals + 1)), 0});
  } catch (const YAML::Exception& error) {
    Violation(text.substr(0, equals), 0, absl::StrCat("--set: the value is not valid YAML: ", error.msg));
  }
}

std::string_view CanonicalName(std::string_view key) {
  for (const JobKeyAlias& alias : JobKeyAliases()) {
    if (alias.alias == key) return alias.name;
  }
  return key;
}

// Later entries of one key win over earlier ones: --set over the file.
void Parser::DropOverridden() {
  std::vector<Entry> kept;
  for (size_t i = 0; i < entries_.size(); ++i) {
    bool overridden = false;
    for (size_t j = std::max(i + 1, file_entries_); j < entries_.size(); ++j) {
      overridden = overridden || CanonicalName(entries_[j].key) == CanonicalName(entries_[i].key);
    }
    if (!overridden) kept.push_back(entries_[i]);
  }
  entries_ = std::move(kept);
}

// Files of TRL's CPOTrainer say SimPO in other words.
void Parser::ConvertCpo() {
  Entry* loss = FindEntry("loss_type");
  const bool says_simpo = loss != nullptr && loss->value.IsScalar() && loss->value.Scalar() == "simpo";
  const std::optional<Entry> gamma = Take("simpo_gamma");
  const std::optional<Entry> alpha = Take("cpo_alpha");
  if (!says_simpo && !gamma && !alpha) return;
  if (loss != nullptr && !says_simpo) {
    Violation("loss_type", loss->line, "a CPO file (simpo_gamma, cpo_alpha) must say loss_type: simpo; its other losses are not SimPO");
  }
  if (loss != nullptr) loss->value = YAML::Node("sigmoid");
  Entry* beta = FindEntry("beta");
  const std::optional<double> beta_value =
      beta != nullptr && beta->value.IsScalar() ? ToNumber(beta->value.Scalar()) : std::nullopt;
  if (!beta_value) Violation("beta", beta == nullptr ? 0 : beta->line, "a CPO file must say beta: TRL's silent default 0.1 is not SimPO");
  if (!gamma) {
    Violation("simpo_gamma", 0, "a CPO file must say simpo_gamma: TRL's silent default is not SimPO");
  } else if (const auto value = gamma->value.IsScalar() ? ToNumber(gamma->value.Scalar()) : std::nullopt; !value) {
    Violation("simpo_gamma", gamma->line, "must be a number");
  } else if (beta_value && *beta_value > 0) {
    entries_.push_back({"gamma_beta_ratio", YAML::Node(absl::StrFormat("%.17g", *value / *beta_value)), gamma->line});
    Note(absl::StrFormat("simpo_gamma %g with beta %g is gamma_beta_ratio %g", *value, *beta_value, *value / *beta_value));
  }
  if (!alpha) {
    Violation("cpo_alpha", 0, "a CPO file must say cpo_alpha (0 for SimPO): TRL's silent default 1.0 adds a full SFT term");
  } else {
    entries_.push_back({"sft_weight", alpha->value, alpha->line});
    Note("cpo_alpha is taken as sft_weight");
  }
}

void Parser::ConvertDatasetName() {
  if (const std::optional<Entry> name = Take("dataset_name")) {
    YAML::Node mixer;
    mixer[name->value.IsScalar() ? name->value.Scalar() : ""] = 1.0;
    entries_.push_back({"dataset_mixer", mixer, name->line});
  }
  const std::optional<Entry> train = Take("dataset_train_split");
  const std::optional<Entry> test = Take("dataset_test_split");
  if (train || test) {
    YAML::Node splits;
    splits.push_back(train ? train->value : YAML::Node("train"));
    if (test) splits.push_back(test->value);
    entries_.push_back({"dataset_splits", splits, train ? train->line : test->line});
  }
}

void Parser::ConvertForeignKeys() {
  ConvertCpo();
  ConvertDatasetName();
  for (Entry& entry : entries_) entry.key = CanonicalName(entry.key);
  if (const std::optional<Entry> gamma = Take("gamma")) {
    Entry* beta = FindEntry("beta");
    const double beta_value = beta != nullptr && beta->value.IsScalar() ? ToNumber(beta->value.Scalar()).value_or(2.0) : 2.0;
    const auto value = gamma->value.IsScalar() ? ToNumber(gamma->value.Scalar()) : std::nullopt;
    if (!value || beta_value <= 0) {
      Violation("gamma", gamma->line, "must be a number");
    } else {
      entries_.push_back({"gamma_beta_ratio", YAML::Node(absl::StrFormat("%.17g", *value / beta_value)), gamma->line});
      Note(absl::StrFormat("gamma %g with beta %g is gamma_beta_ratio %g", *value, beta_value, *value / beta_value));
    }
  }
  if (const std::optional<Entry> bf16 = Take("bf16"); bf16 && bf16->value.IsScalar()) {
    const std::optional<bool> on = ToBool(bf16->value.Scalar());
    if (!on) Violation("bf16", bf16->line, "must be true or false");
    if (on.value_or(false) && FindEntry("torch_dtype") == nullptr) {
      entries_.push_back({"torch_dtype", YAML::Node("bfloat16"), bf16->line});
    }
  }
  if (const std::optional<Entry> optim = Take("optim"); optim && optim->value.IsScalar()) {
    static const std::set<std::string> known = {"adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"};
    if (!known.contains(optim->value.Scalar())) {
      Violation("optim", optim->line, absl::StrCat("'", optim->value.Scalar(), "' is not supported; the optimizer is adamw_torch with fp32 masters and moments"));
    }
  }
}

bool IsOff(const YAML::Node& value) {
  if (value.IsNull()) return true;
  if (!value.IsScalar()) return false;
  return !ToBool(value.Scalar()).value_or(true) || value.Scalar() == "none";
}

bool Parser::ApplyRefusedOrIgnored(const Entry& entry) {
  for (const IgnoredJobKey& ignored : IgnoredJobKeys()) {
    if (entry.key != ignored.name) continue;
    Note(absl::StrCat(entry.key, " has no effect: ", std::string(ignored.instead)));
    return true;
  }
  for (const RefusedJobKey& refused : RefusedJobKeys()) {
    if (entry.key != refused.name) continue;
    if (!IsOff(entry.value)) Violation(entry.key, entry.line, std::string(refused.reason));
    return true;
  }
  if (entry.key.starts_with("lora_")) {
    Violation(entry.key, entry.line, "adapters are not supported: all weights are trained");
    return true;
  }
  return false;
}

void Parser::Apply(const Entry& entry) {
  if (ApplyRefusedOrIgnored(entry)) return;
  for (const JobKeyRow& row : JobKeyRows()) {
    if (row.key.name != entry.key) continue;
    if (entry.value.IsNull()) return;  // `key:` alone leaves the default
    given_.insert(entry.key);
    Set(row, entry);
    return;
  }
  const std::string nearest = NearestKey(entry.key);
  Violation(entry.key, entry.line,
            nearest.empty() ? "unknown key (see: simpoctl help job-file)"
                            : absl::StrCat("unknown key; did you mean ", nearest, "?"));
}

void Parser::Set(const JobKeyRow& row, const Entry& entry) {
  JobConfig& config = job_.config;
  auto wrong = [&](const char* expected) { Violation(entry.key, entry.line, absl::StrCat("must be ", expected)); };
  if (const auto* mixer = std::get_if<DatasetMixer JobConfig::*>(&row.field)) {
    if (entry.value.IsScalar()) {
      config.**mixer = {{ResolvePath(entry.value.Scalar()), 1.0}};
      return;
    }
    if (!entry.value.IsMap()) return wrong("a map of data file or folder to fraction, as `data/train.jsonl: 1.0`");
    (config.**mixer).clear();
    for (const auto& item : entry.value) {
      const std::string name = item.first.IsScalar() ? item.first.Scalar() : "";
      const std::optional<double> fraction = item.second.IsScalar() ? ToNumber(item.second.Scalar()) : std::nullopt;
      if (name.empty()) {
        Violation(entry.key, entry.line, "a data set must have a name");
      } else if (!fraction || *fraction <= 0 || *fraction > 1) {
        Violation(entry.key + "." + name, item.first.Mark().line + 1, "the fraction must be above 0 and at most 1");
      } else {
        (config.**mixer).emplace_back(ResolvePath(name), *fraction);
      }
    }
    return;
  }
  if (const auto* list = std::get_if<std::vector<std::string> JobConfig::*>(&row.field)) {
    (config.**list).clear();
    if (entry.value.IsScalar()) {
      (config.**list).push_back(entry.value.Scalar());
      return;
    }
    if (!entry.value.IsSequence()) return wrong("a list of words");
    for (const YAML::Node& item : entry.value) {
      if (!item.IsScalar()) return wrong("a list of words");
      (config.**list).push_back(item.Scalar());
    }
    return;
  }
  if (const auto* map = std::get_if<std::map<std::string, std::string> JobConfig::*>(&row.field)) {
    if (!entry.value.IsMap()) return wrong("a map of word to word");
    for (const auto& item : entry.value) {
      if (!item.first.IsScalar() || !item.second.IsScalar()) return wrong("a map of word to word");
      (config.**map)[item.first.Scalar()] = item.second.Scalar();
    }
    return;
  }
  if (!entry.value.IsScalar()) return wrong(absl::StrCat("one ", std::string(row.key.type)).c_str());
  SetScalar(row, entry, entry.value.Scalar());
}

void Parser::SetScalar(const JobKeyRow& row, const Entry& entry, const std::string& text) {
  JobConfig& config = job_.config;
  auto wrong = [&](const std::string& expected) {
    Violation(entry.key, entry.line, absl::StrCat("must be ", expected, ", not '", text.substr(0, 80), "'"));
  };
  if (const auto* field = std::get_if<std::string JobConfig::*>(&row.field)) {
    if (row.key.range.find(" | ") != std::string_view::npos || (!row.key.range.empty() && row.key.type == "string")) {
      const std::vector<std::string> choices = absl::StrSplit(Absl(row.key.range), " | ");
      if (std::find(choices.begin(), choices.end(), text) == choices.end()) {
        return wrong(choices.size() == 1 ? absl::StrCat(choices[0], " (others are not supported yet)")
                                         : absl::StrCat("one of ", std::string(row.key.range)));
      }
    }
    config.**field = row.is_path ? ResolvePath(text) : text;
    return;
  }
  if (const auto* field = std::get_if<bool JobConfig::*>(&row.field)) {
    const std::optional<bool> value = ToBool(text);
    if (!value) return wrong("true or false");
    config.**field = *value;
    return;
  }
  if (row.key.type == "duration") {
    const std::optional<int64_t> value = ToDuration(text);
    if (!value) return wrong("a time such as 90s, 15m, 2h or 1d");
    config.time_limit_s = *value;
    return;
  }
  const std::optional<double> value = ToNumber(text);
  if (!value) return wrong(absl::StrCat("a number (", std::string(row.key.type), ")"));
  if (row.key.name == "warmup_steps" && *value > 0 && *value < 1) {
    config.warmup_ratio = *value;
    Note(absl::StrFormat("warmup_steps %g is a fraction: taken as warmup_ratio", *value));
    return;
  }
  if (const std::optional<std::string> problem = CheckRange(row.key.range, *value)) {
    Violation(entry.key, entry.line, *problem);
    return;
  }
  if (const auto* field = std::get_if<double JobConfig::*>(&row.field)) {
    config.**field = *value;
    return;
  }
  if (*value != std::floor(*value) || std::abs(*value) > 9e15) return wrong("a whole number");
  if (const auto* field = std::get_if<int64_t JobConfig::*>(&row.field)) config.**field = static_cast<int64_t>(*value);
  if (const auto* field = std::get_if<int32_t JobConfig::*>(&row.field)) {
    if (std::abs(*value) > std::numeric_limits<int32_t>::max()) return wrong("a smaller number");
    config.**field = static_cast<int32_t>(*value);
  }
}

// A value that says it is a path, or that is one beside the job file, becomes absolute; anything else
// may be the name of a hub repository and stays.
std::string Parser::ResolvePath(const std::string& value) const {
  namespace fs = std::filesystem;
  if (value.empty() || value == "true" || value.find("{{") != std::string::npos || value.find("{%") != std::string::npos ||
      value.size() > 4096) {
    return value;
  }
  std::string expanded = value;
  if (value.starts_with("~/")) {
    const char* home = std::getenv("HOME");
    if (home != nullptr) expanded = absl::StrCat(home, value.substr(1));
  }
  const fs::path path = fs::path(expanded).is_absolute() ? fs::path(expanded) : fs::path(base_dir_) / expanded;
  const bool says_path = value.starts_with("./") || value.starts_with("../") || value.starts_with("~/") || value[0] == '/';
  std::error_code error;
  if (says_path || fs::exists(path, error)) return path.lexically_normal().string();
  return value;
}

// What no single key can tell.
void Parser::CheckTogether() {
  const JobConfig& config = job_.config;
  auto violated = [&](const char* key) {
    return std::any_of(job_.violations.begin(), job_.violations.end(), [&](const auto& v) { return v.field == key; });
  };
  if (config.model_name_or_path.empty() && !violated("model_name_or_path")) {
    Violation("model_name_or_path", 0, "required: the folder of the model to train");
  }
  if (config.dataset_mixer.empty() && !violated("dataset_mixer")) {
    Violation("dataset_mixer", 0, "required: the data to train on, as `dataset_mixer: {data/train.jsonl: 1.0}`");
  }
  if (config.max_prompt_length >= config.max_length) {
    Violation("max_prompt_length", LineOf("max_prompt_length"), absl::StrCat("must be below max_length (", config.max_length, ")"));
  }
  if (config.eval_strategy == "steps" && config.eval_steps <= 0) Violation("eval_steps", LineOf("eval_strategy"), "eval_strategy: steps needs eval_steps above 0");
  if (config.save_strategy == "steps" && config.save_steps <= 0) Violation("save_steps", LineOf("save_strategy"), "save_strategy: steps needs save_steps above 0");
  if (config.max_steps == 0) Violation("max_steps", LineOf("max_steps"), "must be -1 or above 0");
  if (config.max_steps > 0 && config.warmup_steps > config.max_steps) {
    Violation("warmup_steps", LineOf("warmup_steps"), absl::StrCat("is larger than max_steps (", config.max_steps, ")"));
  }
  if (config.dataset_splits.size() > 2) Violation("dataset_splits", LineOf("dataset_splits"), "takes a training split and at most one evaluation split");
  if (config.loss_type == "hinge" && config.label_smoothing > 0) Note("label_smoothing has no effect with loss_type: hinge");
}

void Parser::FillIn() {
  JobConfig& config = job_.config;
  const bool by_device = config.per_device_train_batch_size > 0 || config.gradient_accumulation_steps > 0;
  const int64_t product = static_cast<int64_t>(std::max(1, config.per_device_train_batch_size)) *
                          std::max(1, config.gradient_accumulation_steps) * config.Ranks();
  if (!Given("global_batch_size") && by_device) {
    if (product > 1048576) {
      Violation("per_device_train_batch_size", LineOf("per_device_train_batch_size"), "the global batch would be larger than 1048576 pairs");
      return;
    }
    config.global_batch_size = static_cast<int32_t>(product);
    Note(absl::StrFormat("global_batch_size %d = per_device_train_batch_size %d x gradient_accumulation_steps %d x %d rank(s)",
                         config.global_batch_size, std::max(1, config.per_device_train_batch_size),
                         std::max(1, config.gradient_accumulation_steps), config.Ranks()));
  } else if (Given("global_batch_size") && config.gradient_accumulation_steps > 0 && !Equal(config.global_batch_size, product)) {
    Note(absl::StrFormat("global_batch_size %d wins over per_device_train_batch_size x gradient_accumulation_steps x ranks = %d",
                         config.global_batch_size, product));
  }
  if (config.learning_rate >= 1e-5) Note(absl::StrFormat("learning_rate %g is high for SimPO (3e-7 to 1e-6 for models of 7B and more)", config.learning_rate));
  for (const char* key : {"beta", "gamma_beta_ratio", "learning_rate", "lr_scheduler_type", "warmup_ratio", "num_train_epochs", "global_batch_size", "max_length"}) {
    for (const JobKeyRow& row : JobKeyRows()) {
      if (row.key.name != key || Given(key) || (by_device && row.key.name == "global_batch_size")) continue;
      Note(absl::StrCat(key, " is not given: ", std::string(row.key.fallback)));
    }
  }
}

}  // namespace

ParsedJob ParseJobYaml(std::string_view yaml, const JobParseOptions& options) { return Parser(options).Parse(yaml); }

std::string FormatViolations(const std::vector<FieldViolation>& violations, std::string_view file_name) {
  std::string text;
  for (const FieldViolation& violation : violations) {
    absl::StrAppend(&text, text.empty() ? "" : "\n", std::string(file_name));
    if (violation.line > 0) absl::StrAppend(&text, ":", violation.line);
    absl::StrAppend(&text, ": ");
    if (!violation.field.empty()) absl::StrAppend(&text, violation.field, ": ");
    absl::StrAppend(&text, violation.description);
  }
  return text;
}

absl::StatusOr<ParsedJob> ParseJobYamlOrStatus(std::string_view yaml, const JobParseOptions& options) {
  ParsedJob job = ParseJobYaml(yaml, options);
  if (job.violations.empty()) return job;
  return absl::InvalidArgumentError(FormatViolations(job.violations, options.file_name));
}

std::string JobConfigToYaml(const JobConfig& config) {
  YAML::Emitter out;
  out << YAML::BeginMap;
  bool in_resources = false;
  for (const JobKeyRow& row : JobKeyRows()) {
    std::string_view name = row.key.name;
    const bool resource = name.starts_with("resources.");
    if (resource && !in_resources) out << YAML::Key << "resources" << YAML::Value << YAML::BeginMap;
    if (!resource && in_resources) out << YAML::EndMap;
    in_resources = resource;
    if (resource) name.remove_prefix(10);
    std::visit(
        [&](auto field) {
          const auto& value = config.*field;
          using T = std::decay_t<decltype(value)>;
          if constexpr (std::is_same_v<T, std::string>) {
            if (!value.empty()) out << YAML::Key << std::string(name) << YAML::Value << YAML::DoubleQuoted << value;
          } else if constexpr (std::is_same_v<T, double>) {
            out << YAML::Key << std::string(name) << YAML::Value << absl::StrFormat("%.17g", value);
          } else if constexpr (std::is_same_v<T, DatasetMixer> || std::is_same_v<T, std::map<std::string, std::string>>) {
            if (value.empty()) return;
            out << YAML::Key << std::string(name) << YAML::Value << YAML::BeginMap;
            for (const auto& [key, item] : value) out << YAML::Key << YAML::DoubleQuoted << key << YAML::Value << item;
            out << YAML::EndMap;
          } else if constexpr (std::is_same_v<T, std::vector<std::string>>) {
            if (!value.empty()) out << YAML::Key << std::string(name) << YAML::Value << YAML::Flow << value;
          } else {
            out << YAML::Key << std::string(name) << YAML::Value << value;
          }
        },
        row.field);
  }
  if (in_resources) out << YAML::EndMap;
  out << YAML::EndMap;
  return std::string(out.c_str()) + "\n";
}

}  // namespace simpo
