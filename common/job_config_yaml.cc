#include "common/job_config_yaml.h"

#include <yaml-cpp/yaml.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <limits>
#include <map>
#include <set>
#include <type_traits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/job_entries.h"
#include "common/job_keys.h"
#include "common/job_values.h"
#include "common/metric_names.h"
#include "common/text.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kLargestBatch = 1048576;
constexpr size_t kMaxDatasets = 1000;
// Of labels: the coordinator keeps those of every job, several times.
constexpr size_t kMaxLabels = 64;
constexpr size_t kMaxLabelNameBytes = 128;
constexpr size_t kMaxLabelValueBytes = 256;

std::string TooLong(const std::string& dataset) {
  return absl::StrCat("the name of a data set has at most ", kMaxPathBytes, " bytes, not ", dataset.size());
}

// Entries to JobConfig. One per file.
class Parser {
 public:
  explicit Parser(const JobParseOptions& options) : options_(options) {
    base_dir_ = options.base_dir.empty() ? fs::current_path().string() : options.base_dir;
  }

  ParsedJob Parse(std::string_view yaml) {
    try {
      if (ReadJobEntries(yaml, options_.overrides, &reading_)) {
        // gamma is the paper's own key; its later files have the ratio and a hub_model_id.
        princeton_dialect_ = reading_.Find("gamma") != nullptr ||
                             (reading_.Find("gamma_beta_ratio") != nullptr &&
                              (reading_.Find("hub_model_id") != nullptr || reading_.Find("trainer_type") != nullptr));
        ConvertForeignKeys(&reading_);
        for (const JobEntry& entry : reading_.entries) Apply(entry);
        FillInCompat();
        CheckTogether();
        FillInBatch();
        NoteDefaults();
        CheckWritten(yaml);
      }
    } catch (const YAML::Exception& error) {
      reading_.Violation("", error.mark.line + 1, absl::StrCat("not a job file: ", error.msg));
    }
    // In the order of the file; what is missing, or came from --set, comes last.
    std::vector<FieldViolation>& violations = reading_.violations;
    std::stable_sort(violations.begin(), violations.end(), [](const FieldViolation& a, const FieldViolation& b) {
      return (a.line > 0 ? a.line : std::numeric_limits<int>::max()) <
             (b.line > 0 ? b.line : std::numeric_limits<int>::max());
    });
    if (reading_.violations_left_out > 0) {
      violations.push_back(
          {"", 0, absl::StrCat("and ", reading_.violations_left_out, " more; they are told when these are corrected")});
    }
    std::map<std::string, int> lines;
    for (const JobEntry& entry : reading_.entries) {
      if (entry.line <= 0) continue;
      lines.emplace(entry.key, entry.line);
      // What is wrong with several of them together is told where the first stands.
      if (entry.key.starts_with("resources.")) lines.emplace("resources", entry.line);
    }
    return {std::move(config_), std::move(reading_.notes), std::move(violations), std::move(lines)};
  }

 private:
  using Words = std::vector<std::string>;
  using Labels = std::map<std::string, std::string>;

  void Apply(const JobEntry& entry);
  bool ApplyIgnored(const JobEntry& entry);
  bool ApplyRefused(const JobEntry& entry);
  void Set(const JobKeyRow& row, const JobEntry& entry);
  void SetMixer(const JobEntry& entry, DatasetMixer* mixer);
  void SetWords(const JobEntry& entry, Words* words);
  void SetLabels(const JobEntry& entry, Labels* labels);
  void SetScalar(const JobKeyRow& row, const JobEntry& entry, std::string text);
  void SetNumber(const JobKeyRow& row, const JobEntry& entry, const std::string& text);
  void FillInCompat();
  void CheckTogether();
  void CheckBestModel();
  void FillInBatch();
  void NoteDefaults();
  void CheckWritten(std::string_view yaml);
  std::string ResolvePath(const std::string& value, bool globs = false) const;

  // A value that is wrong, told under the name that the user wrote.
  void Wrong(const JobEntry& entry, std::string_view problem) {
    const std::string as = entry.written == entry.key ? "" : absl::StrCat("(as ", entry.key, ") ");
    reading_.Violation(entry.written, entry.line, absl::StrCat(as, std::string(problem)));
  }
  void MustBe(const JobEntry& entry, std::string_view expected) {
    Wrong(entry, absl::StrCat("must be ", std::string(expected)));
  }
  bool Given(std::string_view key) const { return given_.contains(std::string(key)); }
  bool IsWrong(std::string_view key) const {
    return std::any_of(reading_.violations.begin(), reading_.violations.end(),
                       [&](const FieldViolation& violation) { return violation.field == key; });
  }

  const JobParseOptions& options_;
  std::string base_dir_;
  JobReading reading_;
  std::map<std::string, std::string> given_;  // key -> how and where it was written
  JobConfig config_;
  bool princeton_dialect_ = false;
};

bool Parser::ApplyIgnored(const JobEntry& entry) {
  for (const IgnoredJobKey& ignored : IgnoredJobKeys()) {
    if (!MatchesJobKey(ignored.name, entry.key)) continue;
    if (!IsOff(entry.value)) {
      reading_.Note(absl::StrCat(entry.key, " has no effect: ", std::string(ignored.instead)));
    }
    return true;
  }
  return false;
}

bool Parser::ApplyRefused(const JobEntry& entry) {
  for (const RefusedJobKey& refused : RefusedJobKeys()) {
    if (!MatchesJobKey(refused.name, entry.key)) continue;
    if (IsOff(entry.value)) return true;
    const JobEntry* condition = refused.unless.empty() ? nullptr : reading_.Find(refused.unless);
    if (condition != nullptr && IsOff(condition->value)) {
      reading_.Note(absl::StrCat(entry.key, " has no effect: ", std::string(refused.unless), " is off"));
    } else {
      reading_.Violation(entry.written, entry.line, std::string(refused.reason));
    }
    return true;
  }
  return false;
}

void Parser::Apply(const JobEntry& entry) {
  if (ApplyIgnored(entry) || ApplyRefused(entry)) return;
  for (const JobKeyRow& row : JobKeyRows()) {
    if (row.key.name != entry.key) continue;
    if (entry.value.IsNull()) return;  // `key:` alone leaves the default
    const std::string where = entry.line == 0 ? "in --set" : absl::StrCat("in line ", entry.line);
    const auto [earlier, is_new] = given_.emplace(entry.key, absl::StrCat(entry.written, " ", where));
    if (!is_new) return Wrong(entry, absl::StrCat("says the same as ", earlier->second, "; keep one"));
    return Set(row, entry);
  }
  for (const std::string_view map :
       {"labels", "dataset_mixer", "eval_dataset_mixer"}) {  // their keys are the user's own
    if (entry.key.size() <= map.size() || !entry.key.starts_with(map) || entry.key[map.size()] != '.') continue;
    return Wrong(entry, absl::StrCat("unknown key; write the whole map, as ", std::string(map),
                                     entry.line == 0 ? "=" : ": ", "{", OneLine(entry.key.substr(map.size() + 1), 80),
                                     ": ", OneLine(ScalarText(entry.value), 80), "}"));
  }
  const std::string nearest = reading_.IsFull() ? "" : NearestKey(entry.key);  // takes its time
  Wrong(entry, nearest.empty() ? "unknown key (see: simpoctl help job-file)"
                               : absl::StrCat("unknown key; did you mean ", nearest, "?"));
}

void Parser::Set(const JobKeyRow& row, const JobEntry& entry) {
  if (const auto* mixer = std::get_if<DatasetMixer JobConfig::*>(&row.field)) {
    return SetMixer(entry, &(config_.**mixer));
  }
  if (const auto* words = std::get_if<Words JobConfig::*>(&row.field)) return SetWords(entry, &(config_.**words));
  if (const auto* labels = std::get_if<Labels JobConfig::*>(&row.field)) return SetLabels(entry, &(config_.**labels));
  if (!entry.value.IsScalar()) return MustBe(entry, absl::StrCat("one ", std::string(row.key.type)));
  SetScalar(row, entry, entry.value.Scalar());
}

void Parser::SetMixer(const JobEntry& entry, DatasetMixer* mixer) {
  mixer->clear();
  if (entry.value.IsScalar()) {
    const std::string& name = entry.value.Scalar();
    if (name.empty() || name.find('\0') != std::string::npos) {
      return MustBe(entry, "the name of a data file or folder");
    }
    // A pattern that is too long for a path may match all the same, from wherever the worker is.
    if (name.size() > kMaxPathBytes) return Wrong(entry, TooLong(name));
    mixer->emplace_back(ResolvePath(name, /*globs=*/true), 1.0);
    return;
  }
  if (!entry.value.IsMap() || entry.value.size() == 0) {
    return MustBe(entry, "a map of data file or folder to fraction, as `data/train.jsonl: 1.0`");
  }
  if (entry.value.size() > kMaxDatasets) {
    return Wrong(entry, absl::StrCat("names ", entry.value.size(), " data sets; at most ", kMaxDatasets,
                                     " are taken. A folder or a glob names many files at once"));
  }
  std::set<std::string> known;
  for (const auto& item : entry.value) {
    const std::string name = ScalarText(item.first);
    const std::optional<double> fraction = ScalarNumber(item.second);
    // A name that was converted has no place of its own; its fraction has.
    const int line = entry.line == 0 ? 0 : std::max(item.first.Mark().line, item.second.Mark().line) + 1;
    const std::string field = absl::StrCat(entry.written, ".", name);
    if (name.empty() || name.find('\0') != std::string::npos) {
      reading_.Violation(entry.written, line, "a data set must have a name");
    } else if (name.size() > kMaxPathBytes) {
      reading_.Violation(entry.written, line, TooLong(name));
    } else if (!fraction || *fraction <= 0 || *fraction > 1) {
      const std::string said =
          item.second.IsScalar() ? absl::StrCat(", not '", OneLine(item.second.Scalar(), 80), "'") : "";
      reading_.Violation(field, line, absl::StrCat("the fraction must be above 0 and at most 1", said));
    } else if (std::string path = ResolvePath(name, /*globs=*/true); !known.insert(path).second) {
      reading_.Violation(field, line, "the data set stands twice; keep one");
    } else {
      mixer->emplace_back(std::move(path), *fraction);
    }
  }
}

void Parser::SetWords(const JobEntry& entry, Words* words) {
  words->clear();
  if (entry.value.IsScalar()) {
    words->push_back(entry.value.Scalar());
    return;
  }
  if (!entry.value.IsSequence()) return MustBe(entry, "a list of words");
  for (const YAML::Node& item : entry.value) {
    if (!item.IsScalar()) return MustBe(entry, "a list of words");
    words->push_back(item.Scalar());
  }
}

void Parser::SetLabels(const JobEntry& entry, Labels* labels) {
  if (!entry.value.IsMap()) return MustBe(entry, "a map of word to word");
  if (entry.value.size() > kMaxLabels) {
    return Wrong(entry, absl::StrCat("has ", entry.value.size(), " labels; at most ", kMaxLabels, " are taken"));
  }
  for (const auto& item : entry.value) {
    if (!item.first.IsScalar() || !item.second.IsScalar()) return MustBe(entry, "a map of word to word");
    const std::string& name = item.first.Scalar();
    const std::string& value = item.second.Scalar();
    const int line = entry.line == 0 ? 0 : item.first.Mark().line + 1;
    if (name.size() > kMaxLabelNameBytes) {
      reading_.Violation(entry.written, line,
                         absl::StrCat("a label's name has at most ", kMaxLabelNameBytes, " bytes, not ", name.size()));
    } else if (value.size() > kMaxLabelValueBytes) {
      reading_.Violation(entry.written, line,
                         absl::StrCat("the value of '", OneLine(name, 80), "' has at most ", kMaxLabelValueBytes,
                                      " bytes, not ", value.size()));
    }
    (*labels)[name] = value;
  }
}

void Parser::SetScalar(const JobKeyRow& row, const JobEntry& entry, std::string text) {
  const std::string shown = OneLine(text, 80);
  if (const auto* field = std::get_if<std::string JobConfig::*>(&row.field)) {
    if (text.find('\0') != std::string::npos) return MustBe(entry, "text without a zero byte");
    // YAML 1.1 reads and writes `no` as false; `resume_from_checkpoint: false` means none.
    if (row.key.range.starts_with("no | ") && ToBool(text) == false) text = "no";
    if (row.key.name == "resume_from_checkpoint") {
      if (const std::optional<bool> on = ToBool(text)) text = *on ? "true" : "";
    }
    if (row.key.name == "greater_is_better" && !text.empty()) {
      const std::optional<bool> greater = ToBool(text);
      if (!greater) return MustBe(entry, absl::StrCat("true or false, not '", shown, "'"));
      text = *greater ? "true" : "false";
    }
    if (const std::optional<std::string> problem = CheckChoice(row.key.range, text)) return Wrong(entry, *problem);
    if (text.empty()) text = std::string(row.key.fallback);  // `key: ""` leaves the default too
    const bool is_template = row.key.name == "chat_template" &&
                             (text.find("{{") != std::string::npos || text.find("{%") != std::string::npos);
    config_.** field = row.is_path && !is_template ? ResolvePath(text) : text;
    return;
  }
  if (const auto* field = std::get_if<bool JobConfig::*>(&row.field)) {
    const std::optional<bool> value = ToBool(text);
    if (!value) return MustBe(entry, absl::StrCat("true or false, not '", shown, "'"));
    config_.** field = *value;
    return;
  }
  SetNumber(row, entry, text);
}

void Parser::SetNumber(const JobKeyRow& row, const JobEntry& entry, const std::string& text) {
  const std::string shown = OneLine(text, 80);
  std::optional<double> value = ToNumber(text);
  if (row.key.type == "duration") {
    value = ToDuration(text);
    if (!value) return MustBe(entry, absl::StrCat("a time such as 90s, 15m, 2h or 1d, not '", shown, "'"));
  }
  if (!value) {
    const char* expected = row.key.type == "integer" ? "a whole number" : "a number";
    return MustBe(entry, absl::StrCat(expected, ", not '", shown, "'"));
  }
  if (const std::optional<std::string> problem = CheckRange(row.key.range, *value)) return Wrong(entry, *problem);
  if (const auto* field = std::get_if<double JobConfig::*>(&row.field)) {
    config_.** field = *value;
    return;
  }
  if (*value != std::floor(*value) || std::abs(*value) > 9e15) {
    return MustBe(entry, absl::StrCat("a whole number, not '", shown, "'"));
  }
  if (const auto* field = std::get_if<int64_t JobConfig::*>(&row.field))
    config_.** field = static_cast<int64_t>(*value);
  if (const auto* field = std::get_if<int32_t JobConfig::*>(&row.field)) {
    constexpr int32_t kLargest = std::numeric_limits<int32_t>::max();
    if (std::abs(*value) > kLargest) return MustBe(entry, absl::StrCat("at most ", kLargest, ", not '", shown, "'"));
    config_.** field = static_cast<int32_t>(*value);
  }
}

// A value that can only be a path, or that is one beside the job file, becomes absolute. Anything else
// may be the name of a hub repository ("owner/name") and stays. `globs`: a pattern can only be a path.
std::string Parser::ResolvePath(const std::string& value, bool globs) const {
  if (value.empty() || value == "true" || value.size() > kMaxPathBytes) return value;
  std::string expanded = value;
  if (value.starts_with("~/")) {
    const char* home = std::getenv("HOME");
    if (home != nullptr) expanded = absl::StrCat(home, value.substr(1));
  }
  const fs::path path = fs::path(expanded).is_absolute() ? fs::path(expanded) : fs::path(base_dir_) / expanded;
  static const std::set<std::string> kFileEndings = {".jsonl",   ".json",  ".csv",        ".gz",
                                                     ".parquet", ".jinja", ".safetensors"};
  const bool says_path = value.starts_with("./") || value.starts_with("../") || value.starts_with("~/") ||
                         value[0] == '/' || value == "." || value == ".." || (globs && IsGlob(value)) ||
                         std::count(value.begin(), value.end(), '/') > 1 ||
                         kFileEndings.contains(path.extension().string());
  std::error_code error;
  return says_path || fs::exists(path, error) ? path.lexically_normal().string() : value;
}

// The paper's trainer cuts gradients only when asked; a file of its kind that does not say compat is
// told what differs.
void Parser::FillInCompat() {
  if (config_.compat == "princeton" && !Given("max_grad_norm")) {
    config_.max_grad_norm = 0;
    given_.emplace("max_grad_norm", "");
    reading_.Note("compat princeton: max_grad_norm 0 (gradients are not clipped), since it is not given");
  }
  if (Given("compat") || !princeton_dialect_) return;
  reading_.Note(
      "this looks like a file of the paper's trainer: by default the generation header is not scored, truncation is "
      "per "
      "response and gradients are clipped at 1.0; compat: princeton keeps that trainer's rules");
}

// What no single key can tell.
void Parser::CheckTogether() {
  const JobConfig& config = config_;
  auto violation = [&](const char* key, const char* line_of, const std::string& description) {
    if (!IsWrong(key)) reading_.Violation(key, reading_.LineOf(line_of), description);
  };
  if (config.model_name_or_path.empty()) {
    violation("model_name_or_path", "model_name_or_path", "required: the folder of the model to train");
  }
  const bool other_form_is_wrong = IsWrong("dataset_mixture") || IsWrong("datasets") || IsWrong("dataset_name");
  if (!Given("dataset_mixer") && !other_form_is_wrong) {
    violation("dataset_mixer", "dataset_mixer",
              "required: the data to train on, as `dataset_mixer: {data/train.jsonl: 1.0}`");
  }
  if (config.max_prompt_length >= config.max_length) {
    violation("max_prompt_length", Given("max_prompt_length") ? "max_prompt_length" : "max_length",
              absl::StrCat("must be below max_length (", config.max_length, ")"));
  }
  if (config.eval_strategy == "steps" && config.eval_steps <= 0) {
    violation("eval_steps", "eval_strategy", "eval_strategy: steps needs eval_steps above 0");
  }
  if (config.save_strategy == "steps" && config.save_steps <= 0) {
    violation("save_steps", "save_strategy", "save_strategy: steps needs save_steps above 0");
  }
  if (config.load_best_model_at_end) CheckBestModel();
  if (config.max_steps == 0) violation("max_steps", "max_steps", "must be -1 or above 0");
  if (config.max_steps > 0 && config.warmup_steps > config.max_steps) {
    violation("warmup_steps", "warmup_steps", absl::StrCat("is larger than max_steps (", config.max_steps, ")"));
  }
  if (config.dataset_splits.size() > 2) {
    violation("dataset_splits", "dataset_splits", "takes a training split and at most one evaluation split");
  }
  if (config.loss_type == "hinge" && config.label_smoothing > 0) {
    reading_.Note("label_smoothing has no effect with loss_type: hinge");
  }
  if (config.learning_rate >= 1e-5) {
    reading_.Note(absl::StrCat("learning_rate ", NumberText(config.learning_rate),
                               " is high for SimPO (3e-7 to 1e-6 for models of 7B and more)"));
  }
}

// Every checkpoint must have an evaluation to be judged by, as in transformers.
void Parser::CheckBestModel() {
  const JobConfig& config = config_;
  auto violation = [&](const char* key, const std::string& description) {
    const char* line_of = Given(key) ? key : "load_best_model_at_end";
    if (!IsWrong(key)) reading_.Violation(key, reading_.LineOf(line_of), description);
  };
  const bool saves = config.save_strategy == "steps" || config.save_strategy == "epoch";
  if (!saves || config.eval_strategy != config.save_strategy) {
    violation("save_strategy",
              "load_best_model_at_end needs save_strategy and eval_strategy to be the same, steps or epoch");
  } else if (config.save_strategy == "steps" && config.eval_steps > 0 && config.save_steps % config.eval_steps != 0) {
    violation("save_steps", absl::StrCat("load_best_model_at_end needs save_steps to be a multiple of eval_steps (",
                                         config.eval_steps, ")"));
  }
  std::string_view metric = config.metric_for_best_model;
  if (metric.starts_with(kEvalPrefix)) metric.remove_prefix(kEvalPrefix.size());
  std::string known;
  for (const MetricName& name : MetricNames()) {
    if (!name.in_eval) continue;
    if (name.key == metric) return;
    absl::StrAppend(&known, known.empty() ? "" : ", ", std::string(kEvalPrefix), std::string(name.key));
  }
  violation("metric_for_best_model", absl::StrCat("must be one of ", known));
}

// global_batch_size = per_device_train_batch_size x gradient_accumulation_steps x ranks, unless given.
void Parser::FillInBatch() {
  JobConfig& config = config_;
  const bool product_given = config.per_device_train_batch_size > 0 && config.gradient_accumulation_steps > 0;
  const int64_t product =
      static_cast<int64_t>(config.per_device_train_batch_size) * config.gradient_accumulation_steps * config.Ranks();
  if (Given("global_batch_size")) {
    if (product_given && config.global_batch_size != product) {
      reading_.Note(absl::StrCat("global_batch_size ", config.global_batch_size,
                                 " wins over per_device_train_batch_size"
                                 " x gradient_accumulation_steps x ranks = ",
                                 product));
    }
  } else if (product_given && product > kLargestBatch) {
    reading_.Violation("per_device_train_batch_size", reading_.LineOf("per_device_train_batch_size"),
                       absl::StrCat("the global batch would be larger than ", kLargestBatch, " pairs"));
  } else if (product_given) {
    config.global_batch_size = static_cast<int32_t>(product);
    given_.emplace("global_batch_size", "");
    reading_.Note(absl::StrFormat(
        "global_batch_size %d = per_device_train_batch_size %d x gradient_accumulation_steps %d x %d rank(s)", product,
        config.per_device_train_batch_size, config.gradient_accumulation_steps, config.Ranks()));
  } else if (config.gradient_accumulation_steps > 0) {
    reading_.Violation("gradient_accumulation_steps", reading_.LineOf("gradient_accumulation_steps"),
                       "says a batch only together with per_device_train_batch_size; give that, or global_batch_size");
  } else if (config.per_device_train_batch_size > 0) {
    reading_.Note(absl::StrCat("gradient_accumulation_steps is not given: derived from global_batch_size ",
                               config.global_batch_size));
  }
}

// What is stored, and given to the worker, is the config with every default, long paths and escapes; that must be a
// job file too. Only what is large already can come near.
void Parser::CheckWritten(std::string_view yaml) {
  constexpr size_t kLongestEscape = 6;  // of a byte
  size_t could_be = yaml.size() * kLongestEscape +
                    base_dir_.size() * (config_.dataset_mixer.size() + config_.eval_dataset_mixer.size() + 16);
  for (const std::string& text : options_.overrides) could_be += text.size() * kLongestEscape;
  if (could_be + (16 << 10) < kMaxJobFileBytes || !reading_.violations.empty()) return;
  if (const size_t bytes = JobConfigToYaml(config_).size(); bytes > kMaxJobFileBytes) {
    reading_.Violation("", 0,
                       absl::StrCat("the file would have ", bytes,
                                    " bytes with full paths and every default; a "
                                    "job file has at most ",
                                    kMaxJobFileBytes));
  }
}

// One note per section with the values that the file leaves to us. Zero and -1 mean "none" or "chosen
// later", which is no value to tell.
void Parser::NoteDefaults() {
  std::vector<std::pair<std::string, Words>> sections;
  for (const JobKeyRow& row : JobKeyRows()) {
    const JobKey& key = row.key;
    const bool says_nothing =
        key.fallback.empty() || key.fallback == "-1" || (key.fallback == "0" && key.type != "number");
    if (says_nothing || Given(key.name)) continue;
    if (sections.empty() || sections.back().first != key.section) sections.emplace_back(key.section, Words());
    sections.back().second.push_back(absl::StrCat(std::string(key.name), " ", std::string(key.fallback)));
  }
  for (const auto& [section, values] : sections) {
    reading_.Note(absl::StrCat(section, ", not given: ", absl::StrJoin(values, ", ")));
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

}  // namespace simpo
