#include "worker/data/prepare.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <fstream>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "common/atomic_file.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/data/preference_dataset.h"
#include "worker/data/tokenize_pairs.h"
#include "worker/data/tokenized_dataset.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
using Progress = std::function<void(int64_t, int64_t)>;

// Part of every cache key: raise it when the rules or the file's form change.
constexpr int kRulesVersion = 1;

// The files of one split and how much of each source is taken.
struct SplitSource {
  std::vector<fs::path> files;
  double fraction = 1.0;
};
using Split = std::vector<SplitSource>;

class FileLock {
 public:
  explicit FileLock(const fs::path& path) : fd_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
    if (fd_ >= 0) flock(fd_, LOCK_EX);
  }
  ~FileLock() {
    if (fd_ >= 0) close(fd_);
  }

 private:
  int fd_;
};

// Where the sources of a mixer come from, other than from paths.
struct Sources {
  const std::vector<std::string>& hub_configs;  // one for each source, or none
  HubAccess hub_access;
  std::vector<std::string>& notes;
};

// A path wins over a hub id of the same name.
absl::StatusOr<std::vector<fs::path>> FindSourceFiles(const std::string& source, size_t index, const std::string& name,
                                                      bool is_train, const Sources& sources) {
  std::error_code error;
  if (fs::exists(source, error) || !IsHubId(source)) return FindSplitFiles(source, name, is_train);
  const std::string config = index < sources.hub_configs.size() ? sources.hub_configs[index] : "";
  absl::StatusOr<HubFiles> found = FetchSplit(source, config, name, /*required=*/is_train, sources.hub_access);
  if (!found.ok()) {
    return absl::Status(found.status().code(), absl::StrCat("dataset '", source,
                                                            "' is neither a file nor a folder here, "
                                                            "and from the hub: ",
                                                            found.status().message()));
  }
  if (!found->files.empty()) {
    sources.notes.push_back(absl::StrCat("data set ", found->source, ": split ", name));
    for (const std::string& note : found->notes) sources.notes.push_back(note);
  }
  return found->files;
}

absl::StatusOr<Split> FindSplit(const std::vector<std::pair<std::string, double>>& mixer, const std::string& name,
                                bool is_train, bool whole, const Sources& sources) {
  Split split;
  for (size_t i = 0; i < mixer.size(); ++i) {
    const auto& [source, fraction] = mixer[i];
    SIMPO_ASSIGN_OR_RETURN(std::vector<fs::path> files, FindSourceFiles(source, i, name, is_train, sources));
    if (!files.empty()) {
      split.push_back({std::move(files), whole ? 1.0 : fraction});
    } else if (is_train) {
      return absl::NotFoundError(
          absl::StrCat("dataset '", source, "' has no ", name, ".jsonl; name its training split with dataset_splits"));
    }
  }
  return split;
}

absl::StatusOr<std::vector<PreferenceRow>> ReadSplit(const Split& split) {
  std::vector<PreferenceRow> rows;
  for (const SplitSource& source : split) {
    std::vector<PreferenceRow> part;
    for (const fs::path& file : source.files) {
      SIMPO_ASSIGN_OR_RETURN(std::vector<PreferenceRow> more, ReadPreferenceFile(file));
      std::move(more.begin(), more.end(), std::back_inserter(part));
    }
    // As alignment-handbook: the first rows of each source, then all sources one after the other.
    part.resize(static_cast<size_t>(source.fraction * static_cast<double>(part.size())));
    std::move(part.begin(), part.end(), std::back_inserter(rows));
  }
  return rows;
}

// Tokenises on several threads; the first failing row in file order is the error.
absl::StatusOr<std::vector<TokenizedRow>> TokenizeRows(const std::vector<PreferenceRow>& rows,
                                                       const Tokenizer& tokenizer, const ChatTemplate* chat_template,
                                                       const TokenizeRules& rules, int threads,
                                                       const Progress& progress) {
  std::vector<TokenizedRow> results(rows.size());
  std::vector<absl::Status> errors(rows.size());
  std::atomic<size_t> next = 0;
  std::atomic<size_t> done = 0;
  std::mutex progress_mutex;
  auto work = [&] {
    for (size_t i = next++; i < rows.size(); i = next++) {
      absl::StatusOr<TokenizedRow> row = TokenizeRow(rows[i], tokenizer, chat_template, rules);
      if (row.ok()) {
        results[i] = *std::move(row);
      } else {
        errors[i] = row.status();
      }
      const size_t finished = ++done;
      if (progress && (finished % 1000 == 0 || finished == rows.size())) {
        const std::lock_guard lock(progress_mutex);
        progress(static_cast<int64_t>(finished), static_cast<int64_t>(rows.size()));
      }
    }
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < threads; ++i) pool.emplace_back(work);
  work();
  for (std::thread& thread : pool) thread.join();
  for (const absl::Status& error : errors) SIMPO_RETURN_IF_ERROR(error);
  return results;
}

DataReport MakeReport(const std::vector<TokenizedRow>& rows, const std::vector<OwnedPair>& pairs) {
  DataReport report{.rows = static_cast<int64_t>(rows.size()), .pairs = static_cast<int64_t>(pairs.size())};
  for (const TokenizedRow& row : rows) {
    if (!row.pair) ++report.dropped[row.dropped];
  }
  double shared = 0;
  double total = 0;
  for (const OwnedPair& pair : pairs) {
    report.truncated += pair.truncated ? 1 : 0;
    report.mean_prompt_tokens += pair.chosen_prompt_length;
    report.mean_chosen_tokens += static_cast<double>(pair.chosen.size()) - pair.chosen_prompt_length;
    report.mean_rejected_tokens += static_cast<double>(pair.rejected.size()) - pair.rejected_prompt_length;
    report.longest_sequence = std::max({report.longest_sequence, static_cast<int64_t>(pair.chosen.size()),
                                        static_cast<int64_t>(pair.rejected.size())});
    shared += TokenizedPair{.chosen = pair.chosen, .rejected = pair.rejected}.SharedPrefixLength();
    total += static_cast<double>(pair.chosen.size() + pair.rejected.size());
  }
  const double n = std::max<double>(1, static_cast<double>(pairs.size()));
  report.mean_prompt_tokens /= n;
  report.mean_chosen_tokens /= n;
  report.mean_rejected_tokens /= n;
  report.shared_prefix_share = total > 0 ? 2 * shared / total : 0;
  return report;
}

Json ReportToJson(const DataReport& r) {
  return {{"rows", r.rows},
          {"pairs", r.pairs},
          {"dropped", r.dropped},
          {"truncated", r.truncated},
          {"mean_prompt_tokens", r.mean_prompt_tokens},
          {"mean_chosen_tokens", r.mean_chosen_tokens},
          {"mean_rejected_tokens", r.mean_rejected_tokens},
          {"longest_sequence", r.longest_sequence},
          {"shared_prefix_share", r.shared_prefix_share}};
}

DataReport ReportFromJson(const Json& json) {
  return {.rows = json["rows"],
          .pairs = json["pairs"],
          .dropped = json["dropped"].get<std::map<std::string, int64_t>>(),
          .truncated = json["truncated"],
          .mean_prompt_tokens = json["mean_prompt_tokens"],
          .mean_chosen_tokens = json["mean_chosen_tokens"],
          .mean_rejected_tokens = json["mean_rejected_tokens"],
          .longest_sequence = json["longest_sequence"],
          .shared_prefix_share = json["shared_prefix_share"]};
}

// What a split's tokens depend on.
absl::StatusOr<std::string> CacheKey(const Split& split, const Tokenizer& tokenizer, const std::string& chat_template,
                                     const TokenizeRules& rules) {
  std::string text =
      absl::StrCat(kRulesVersion, "\n", tokenizer.digest(), "\n", Sha256(chat_template), "\n", rules.max_length, " ",
                   rules.max_prompt_length, " ", rules.keep_end, " ", rules.drop_ties);
  for (const SplitSource& source : split) {
    absl::StrAppend(&text, "\n", absl::StrFormat("%.17g", source.fraction));
    for (const fs::path& file : source.files) {
      SIMPO_ASSIGN_OR_RETURN(const std::string digest, Sha256OfFile(file));
      absl::StrAppend(&text, " ", digest);
    }
  }
  return Sha256(text).substr(0, 32);
}

// Everything that the tokens of both splits depend on besides the rows.
struct Rules {
  std::unique_ptr<Tokenizer> tokenizer;
  std::string template_text;
  std::string template_source;
  TokenizeRules tokenize;
  int threads = 1;
};

// The split's cache file, made if it is not there yet.
absl::StatusOr<fs::path> PrepareSplit(const Split& split, const Rules& rules, const fs::path& cache_dir,
                                      const Progress& progress, DataReport* report, bool* conversational) {
  SIMPO_ASSIGN_OR_RETURN(const std::string key, CacheKey(split, *rules.tokenizer, rules.template_text, rules.tokenize));
  const fs::path tokens = cache_dir / (key + ".tokens");
  const fs::path facts = cache_dir / (key + ".json");
  const FileLock lock(cache_dir / (key + ".lock"));
  if (fs::exists(tokens) && fs::exists(facts)) {
    SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadFile(facts, 1 << 20));
    const Json json = Json::parse(text, nullptr, false);
    if (json.is_object() && TokenizedDataset::Open(tokens).ok()) {
      *report = ReportFromJson(json["report"]);
      *conversational = json["conversational"];
      return tokens;
    }
  }
  SIMPO_ASSIGN_OR_RETURN(const std::vector<PreferenceRow> rows, ReadSplit(split));
  *conversational = std::any_of(rows.begin(), rows.end(), [](const PreferenceRow& row) { return row.conversational; });
  std::unique_ptr<ChatTemplate> chat_template;
  if (*conversational) {
    absl::StatusOr<std::unique_ptr<ChatTemplate>> parsed = ChatTemplate::Parse(rules.template_text);
    if (!parsed.ok())
      return absl::InvalidArgumentError(
          absl::StrCat("chat template of ", rules.template_source, ": ", parsed.status().message()));
    chat_template = *std::move(parsed);
  }
  SIMPO_ASSIGN_OR_RETURN(
      const std::vector<TokenizedRow> results,
      TokenizeRows(rows, *rules.tokenizer, chat_template.get(), rules.tokenize, rules.threads, progress));
  std::vector<OwnedPair> pairs;
  for (const TokenizedRow& row : results) {
    if (row.pair) pairs.push_back(*row.pair);
  }
  *report = MakeReport(results, pairs);
  if (pairs.empty()) {
    std::string reasons;
    for (const auto& [reason, count] : report->dropped)
      absl::StrAppend(&reasons, reasons.empty() ? "" : ", ", reason, ": ", count);
    return absl::InvalidArgumentError(absl::StrCat(split.front().files.front().string(), ": no pair is left of ",
                                                   report->rows, " rows (",
                                                   reasons.empty() ? "the file is empty" : reasons, ")"));
  }
  SIMPO_RETURN_IF_ERROR(WriteTokenizedDataset(tokens, pairs, report->rows - report->pairs));
  const Json json = {{"report", ReportToJson(*report)}, {"conversational", *conversational}};
  SIMPO_RETURN_IF_ERROR(WriteFileAtomically(facts, json.dump(1)));
  return tokens;
}

std::string ModelType(const fs::path& model_dir) {
  std::ifstream file(model_dir / "config.json");
  const Json config = Json::parse(file, nullptr, false);
  return config.is_object() ? config.value("model_type", "") : "";
}

absl::StatusOr<Rules> MakeRules(const JobConfig& config) {
  Rules rules;
  const fs::path dir =
      config.tokenizer_name_or_path.empty() ? config.model_name_or_path : config.tokenizer_name_or_path;
  SIMPO_ASSIGN_OR_RETURN(rules.tokenizer, Tokenizer::Load(dir));
  std::error_code error;
  if (!config.chat_template.empty()) {
    rules.template_source = "the job file";
    rules.template_text = config.chat_template;
    if (config.chat_template.size() < 4096 && fs::is_regular_file(config.chat_template, error)) {
      SIMPO_ASSIGN_OR_RETURN(rules.template_text, ReadFile(config.chat_template, 1 << 20));
      rules.template_source = config.chat_template;
    }
  } else if (!rules.tokenizer->chat_template().empty()) {
    rules.template_text = rules.tokenizer->chat_template();
    rules.template_source = rules.tokenizer->chat_template_source();
  } else {
    rules.template_text = DefaultChatTemplate(ModelType(config.model_name_or_path), &rules.template_source);
  }
  rules.tokenize = TokenizeRules::FromConfig(config);
  rules.threads = config.preprocessing_num_workers > 0
                      ? config.preprocessing_num_workers
                      : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  return rules;
}

}  // namespace

std::string DataReport::ToString() const {
  std::string text = absl::StrFormat("  %d rows, %d pairs", rows, pairs);
  for (const auto& [reason, count] : dropped) absl::StrAppend(&text, ", ", count, " dropped (", reason, ")");
  absl::StrAppend(
      &text, absl::StrFormat(
                 ", %d truncated\n  tokens on average: prompt %.1f, chosen %.1f, rejected %.1f; longest sequence %d; "
                 "%.0f%% of all tokens are in prefixes that both responses share\n",
                 truncated, mean_prompt_tokens, mean_chosen_tokens, mean_rejected_tokens, longest_sequence,
                 100 * shared_prefix_share));
  return text;
}

absl::StatusOr<PreparedData> PrepareData(const JobConfig& config, const fs::path& cache_dir, const Progress& progress,
                                         HubAccess hub_access) {
  std::error_code error;
  fs::create_directories(cache_dir, error);
  if (error)
    return absl::UnavailableError(absl::StrCat("cannot make the cache folder ", cache_dir.string(), ": ",
                                               error.message(), " (SIMPO_CACHE_DIR names another)"));
  const std::string train_name = config.dataset_splits.empty() ? "train" : config.dataset_splits[0];
  const std::string eval_name = config.dataset_splits.size() < 2 ? "test" : config.dataset_splits[1];
  PreparedData data;
  const Sources sources{config.dataset_configs, hub_access, data.notes};
  SIMPO_ASSIGN_OR_RETURN(const Split train,
                         FindSplit(config.dataset_mixer, train_name, /*is_train=*/true, /*whole=*/false, sources));
  Split eval;
  if (!config.eval_dataset_mixer.empty()) {
    SIMPO_ASSIGN_OR_RETURN(
        eval, FindSplit(config.eval_dataset_mixer, eval_name, /*is_train=*/true, /*whole=*/false, sources));
  } else {
    SIMPO_ASSIGN_OR_RETURN(eval,
                           FindSplit(config.dataset_mixer, eval_name, /*is_train=*/false, /*whole=*/true, sources));
  }
  SIMPO_ASSIGN_OR_RETURN(const Rules rules, MakeRules(config));
  bool conversational = false;
  SIMPO_ASSIGN_OR_RETURN(data.train_cache,
                         PrepareSplit(train, rules, cache_dir, progress, &data.train_report, &conversational));
  if (eval.empty()) {
    if (config.do_eval) data.notes.push_back(absl::StrCat("no evaluation: the data has no split ", eval_name));
  } else {
    DataReport report;
    bool eval_conversational = false;
    SIMPO_ASSIGN_OR_RETURN(data.eval_cache,
                           PrepareSplit(eval, rules, cache_dir, progress, &report, &eval_conversational));
    data.eval_report = report;
    conversational |= eval_conversational;
  }
  data.chat_template = conversational ? rules.template_text : "";
  data.chat_template_source = conversational ? rules.template_source : "none: the rows are plain texts";
  return data;
}

}  // namespace simpo
