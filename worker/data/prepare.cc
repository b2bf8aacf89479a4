#include "worker/data/prepare.h"

#include <errno.h>
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

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "common/atomic_file.h"
#include "common/sha256.h"
#include "common/status_macros.h"
#include "worker/data/isolated.h"
#include "worker/data/preference_dataset.h"
#include "worker/data/row_files.h"
#include "worker/data/tokenize_pairs.h"
#include "worker/data/tokenized_dataset.h"

namespace simpo {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;
using Progress = std::function<void(int64_t, int64_t)>;

// Part of every cache key: raise it when the rules or the file's form change.
constexpr int kRulesVersion = 2;
constexpr size_t kBatchRows = 4096;
constexpr size_t kBatchBytes = 256 << 20;
constexpr size_t kListedRows = 20;
constexpr int64_t kBaseMemory = int64_t{4} << 30;
constexpr int64_t kMemoryPerByte = 100;

// The files of one split and how much of each source is taken.
struct SplitSource {
  std::vector<fs::path> files;
  double fraction = 1.0;
};
using Split = std::vector<SplitSource>;

class FileLock {
 public:
  // Another job may hold it for long; waiting is no stall.
  FileLock(const fs::path& path, BusyWith& busy) : fd_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
    while (fd_ >= 0 && flock(fd_, LOCK_EX | LOCK_NB) != 0 && (errno == EWOULDBLOCK || errno == EINTR)) {
      busy.Set(path.string());
      usleep(50'000);
    }
  }
  ~FileLock() {
    if (fd_ >= 0) close(fd_);
  }

 private:
  int fd_;
};

// dataset_configs says one configuration for all sources, or one for each.
absl::StatusOr<std::string> ConfigOf(const JobConfig& config, size_t source, size_t sources) {
  const std::vector<std::string>& configs = config.dataset_configs;
  if (configs.empty()) return std::string();
  if (configs.size() == 1) return configs[0];
  if (configs.size() == sources) return configs[source];
  return absl::InvalidArgumentError(absl::StrCat("dataset_configs names ", configs.size(), " configurations for ",
                                                 sources, " data sets; give one for all, or one for each"));
}

struct SplitNames {
  std::string train = "train";
  std::string eval = "test";
};

// The first is trained on, unless only the second one is called train something, as alignment-handbook
// tells them.
SplitNames NamesOfSplits(const std::vector<std::string>& splits) {
  SplitNames names;
  if (!splits.empty()) names.train = splits[0];
  if (splits.size() < 2) return names;
  names.eval = splits[1];
  auto is_train = [](const std::string& name) { return name.find("train") != std::string::npos; };
  if (is_train(names.eval) && !is_train(names.train)) std::swap(names.train, names.eval);
  return names;
}

// Where the sources of a mixer come from, other than from paths.
struct Sources {
  HubAccess hub_access;
  std::vector<std::string>& notes;
};

// A path wins over a hub id of the same name.
absl::StatusOr<std::vector<fs::path>> FindSourceFiles(const std::string& source, const SplitQuery& query,
                                                      const Sources& sources) {
  std::error_code error;
  if (fs::exists(source, error) || !IsHubDataset(source)) return FindSplitFiles(source, query);
  absl::StatusOr<HubFiles> found =
      FetchSplit(source, query.config, query.split, /*required=*/query.unnamed, sources.hub_access);
  if (!found.ok()) {
    return absl::Status(found.status().code(), absl::StrCat("dataset '", source,
                                                            "' is neither a file nor a folder here, "
                                                            "and from the hub: ",
                                                            found.status().message()));
  }
  if (!found->files.empty()) {
    sources.notes.push_back(absl::StrCat("data set ", found->source, ": split ", query.split));
    for (const std::string& note : found->notes) sources.notes.push_back(note);
  }
  return found->files;
}

// Every source must have the split when it is `required`. `whole` leaves the fractions out.
absl::StatusOr<Split> FindSplit(const JobConfig& config, const std::vector<std::pair<std::string, double>>& mixer,
                                const std::string& name, bool required, bool whole, const Sources& sources) {
  Split split;
  for (size_t i = 0; i < mixer.size(); ++i) {
    const auto& [source, fraction] = mixer[i];
    SIMPO_ASSIGN_OR_RETURN(const std::string folder, ConfigOf(config, i, mixer.size()));
    SIMPO_ASSIGN_OR_RETURN(std::vector<fs::path> files,
                           FindSourceFiles(source, {.split = name, .config = folder, .unnamed = required}, sources));
    if (!files.empty()) {
      split.push_back({std::move(files), whole ? 1.0 : fraction});
    } else if (required) {
      return absl::NotFoundError(absl::StrCat("dataset '", source, "' has no ", name,
                                              ".jsonl (.json, .csv, .parquet); name its training split with "
                                              "dataset_splits"));
    }
  }
  return split;
}

// A row as it was cut out of its file.
struct RawRow {
  std::string json, where;
};

// Calls work(i) for every i below `count`, on several threads.
void ParallelFor(size_t count, int threads, const std::function<void(size_t)>& work) {
  std::atomic<size_t> next = 0;
  auto run = [&] {
    for (size_t i = next++; i < count; i = next++) work(i);
  };
  std::vector<std::thread> pool;
  for (int i = 1; i < std::min(threads, static_cast<int>(count)); ++i) pool.emplace_back(run);
  run();
  for (std::thread& thread : pool) thread.join();
}

// What a split's tokens depend on.
absl::StatusOr<std::string> CacheKey(const Split& split, const Tokenizer& tokenizer, const std::string& chat_template,
                                     const TokenizeRules& rules) {
  std::string text =
      absl::StrCat(kRulesVersion, "\n", tokenizer.digest(), "\n", Sha256(chat_template), "\n", rules.max_length, " ",
                   rules.max_prompt_length, " ", rules.keep_end, " ", rules.drop_ties, " ", rules.princeton);
  for (const SplitSource& source : split) {
    absl::StrAppend(&text, "\n", absl::StrFormat("%.17g", source.fraction));
    for (const fs::path& file : source.files) {
      SIMPO_ASSIGN_OR_RETURN(const std::string digest, Sha256OfFile(file));
      absl::StrAppend(&text, " ", digest, file.extension().string());
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
  BusyWith* busy = nullptr;
};

// Reads the rows of a split in batches and tokenises each batch on several threads.
class SplitTokenizer {
 public:
  SplitTokenizer(const Rules& rules, const Progress& progress) : rules_(rules), progress_(progress) {}

  absl::Status Run(const Split& split) {
    std::vector<int64_t> wanted;
    for (const SplitSource& source : split) {
      int64_t rows = 0;
      for (const fs::path& file : source.files) {
        rules_.busy->Set(file.string());
        SIMPO_ASSIGN_OR_RETURN(const int64_t more, CountRows(file));
        rows += more;
      }
      // As alignment-handbook: the first rows of each source, then all sources one after the other.
      wanted.push_back(static_cast<int64_t>(source.fraction * static_cast<double>(rows)));
      total_ += wanted.back();
    }
    for (size_t i = 0; i < split.size(); ++i) SIMPO_RETURN_IF_ERROR(ReadSource(split[i], wanted[i]));
    report_.Measure(pairs_);
    return absl::OkStatus();
  }

  bool conversational() const { return conversational_; }
  const DataReport& report() const { return report_; }
  const std::vector<OwnedPair>& pairs() const { return pairs_; }

 private:
  absl::Status ReadSource(const SplitSource& source, int64_t wanted) {
    absl::Status failure;
    for (const fs::path& file : source.files) {
      if (wanted == 0) break;
      const absl::Status read = ReadRows(file, [&](std::string_view json, const std::string& where) {
        batch_.push_back({std::string(json), where});
        batch_bytes_ += json.size();
        rules_.busy->Set(where);
        if (batch_.size() == kBatchRows || batch_bytes_ > kBatchBytes) failure = TokenizeBatch();
        return --wanted > 0 && failure.ok();
      });
      SIMPO_RETURN_IF_ERROR(failure);
      SIMPO_RETURN_IF_ERROR(TokenizeBatch());  // what is wrong with earlier rows comes first
      SIMPO_RETURN_IF_ERROR(read);
    }
    return absl::OkStatus();
  }

  absl::Status TokenizeBatch() {
    std::vector<absl::StatusOr<PreferenceRow>> rows(batch_.size(), absl::UnknownError(""));
    ParallelFor(batch_.size(), rules_.threads, [&](size_t i) {
      rules_.busy->Set(batch_[i].where);
      rows[i] = ParsePreferenceRow(batch_[i].json);
      if (rows[i].ok()) rows[i]->where = batch_[i].where;
      batch_[i].json.clear();
    });
    SIMPO_RETURN_IF_ERROR(ParseTemplate(rows));
    std::vector<absl::StatusOr<TokenizedRow>> results(batch_.size(), absl::UnknownError(""));
    ParallelFor(rows.size(), rules_.threads, [&](size_t i) {
      rules_.busy->Set(batch_[i].where);
      if (!rows[i].ok()) {
        results[i] = absl::InvalidArgumentError(absl::StrCat(batch_[i].where, ": ", rows[i].status().message()));
      } else {
        results[i] = TokenizeRow(*rows[i], *rules_.tokenizer, chat_template_.get(), rules_.tokenize);
      }
    });
    SIMPO_RETURN_IF_ERROR(CheckRows(results));
    for (size_t i = 0; i < results.size(); ++i) {
      ++report_.rows;
      report_.ties += rows[i]->tie ? 1 : 0;
      if (results[i]->pair) {
        pairs_.push_back(*std::move(results[i]->pair));
      } else {
        ++report_.dropped[results[i]->dropped];
      }
    }
    batch_.clear();
    batch_bytes_ = 0;
    if (progress_) progress_(report_.rows, total_);
    return absl::OkStatus();
  }

  // The first conversation needs the template.
  absl::Status ParseTemplate(const std::vector<absl::StatusOr<PreferenceRow>>& rows) {
    if (conversational_ || std::none_of(rows.begin(), rows.end(), [](const absl::StatusOr<PreferenceRow>& row) {
          return row.ok() && row->conversational;
        }))
      return absl::OkStatus();
    conversational_ = true;
    absl::StatusOr<std::unique_ptr<ChatTemplate>> parsed = ChatTemplate::Parse(rules_.template_text);
    if (!parsed.ok())
      return absl::InvalidArgumentError(
          absl::StrCat("chat template of ", rules_.template_source, ": ", parsed.status().message()));
    chat_template_ = *std::move(parsed);
    return absl::OkStatus();
  }

  // The first bad rows of the batch, each with its place, and how many there are.
  static absl::Status CheckRows(const std::vector<absl::StatusOr<TokenizedRow>>& results) {
    std::vector<std::string> problems;
    size_t bad = 0;
    for (const absl::StatusOr<TokenizedRow>& result : results) {
      if (!result.ok() && ++bad <= kListedRows) problems.emplace_back(result.status().message());
    }
    if (bad == 0) return absl::OkStatus();
    if (bad > kListedRows) problems.push_back(absl::StrCat("... and ", bad - kListedRows, " more bad rows"));
    return absl::InvalidArgumentError(absl::StrJoin(problems, "\n"));
  }

  const Rules& rules_;
  const Progress& progress_;
  std::unique_ptr<ChatTemplate> chat_template_;
  bool conversational_ = false;
  int64_t total_ = 0;
  std::vector<RawRow> batch_;
  size_t batch_bytes_ = 0;
  std::vector<OwnedPair> pairs_;
  DataReport report_;
};

std::string DroppedReasons(const DataReport& report) {
  std::string reasons;
  for (const auto& [reason, count] : report.dropped)
    absl::StrAppend(&reasons, reasons.empty() ? "" : ", ", reason, ": ", count);
  return reasons.empty() ? "the file is empty" : reasons;
}

// The split's cache file, made if it is not there yet.
absl::StatusOr<fs::path> PrepareSplit(const Split& split, const Rules& rules, const fs::path& cache_dir,
                                      const Progress& progress, DataReport* report, bool* conversational) {
  SIMPO_ASSIGN_OR_RETURN(const std::string key, CacheKey(split, *rules.tokenizer, rules.template_text, rules.tokenize));
  const fs::path tokens = cache_dir / (key + ".tokens");
  const fs::path facts = cache_dir / (key + ".json");
  const FileLock lock(cache_dir / (key + ".lock"), *rules.busy);
  if (fs::exists(tokens) && fs::exists(facts)) {
    SIMPO_ASSIGN_OR_RETURN(const std::string text, ReadFile(facts, 1 << 20));
    const Json json = Json::parse(text, nullptr, false);
    if (json.is_object() && TokenizedDataset::Open(tokens).ok()) {
      *report = ReportFromJson(json["report"]);
      *conversational = json["conversational"];
      return tokens;
    }
  }
  SplitTokenizer tokenizer(rules, progress);
  SIMPO_RETURN_IF_ERROR(tokenizer.Run(split));
  *report = tokenizer.report();
  *conversational = tokenizer.conversational();
  if (tokenizer.pairs().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(split.front().files.front().string(), ": no pair is left of ",
                                                   report->rows, " rows (", DroppedReasons(*report), ")"));
  }
  SIMPO_RETURN_IF_ERROR(WriteTokenizedDataset(tokens, tokenizer.pairs(), report->rows - report->pairs));
  const Json json = {{"report", ToJson(*report)}, {"conversational", *conversational}};
  SIMPO_RETURN_IF_ERROR(WriteFileAtomically(facts, json.dump(1)));
  return tokens;
}

std::string ModelType(const fs::path& model_dir) {
  std::ifstream file(model_dir / "config.json");
  const Json config = Json::parse(file, nullptr, false);
  return config.is_object() ? config.value("model_type", "") : "";
}

absl::StatusOr<Rules> MakeRules(const JobConfig& config, BusyWith* busy) {
  Rules rules;
  rules.busy = busy;
  const fs::path dir =
      config.tokenizer_name_or_path.empty() ? config.model_name_or_path : config.tokenizer_name_or_path;
  busy->Set((dir / "tokenizer.json").string());
  SIMPO_ASSIGN_OR_RETURN(rules.tokenizer, Tokenizer::Load(dir));
  std::error_code error;
  const bool their_mistral = config.compat == "princeton" &&
                             absl::AsciiStrToLower(config.model_name_or_path).find("mistral") != std::string::npos;
  if (!config.chat_template.empty()) {
    rules.template_source = "the job file";
    rules.template_text = config.chat_template;
    if (config.chat_template.size() < 4096 && fs::is_regular_file(config.chat_template, error)) {
      SIMPO_ASSIGN_OR_RETURN(rules.template_text, ReadFile(config.chat_template, 1 << 20));
      rules.template_source = config.chat_template;
    }
  } else if (their_mistral) {
    rules.template_text = PrincetonMistralTemplate();
    rules.template_source = "compat: princeton for models with mistral in their name";
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

absl::Status WriteDataReport(const PreparedData& data, const fs::path& output_dir) {
  Json json = {{"train", ToJson(data.train_report)}};
  if (data.eval_report) json["evaluation"] = ToJson(*data.eval_report);
  json["chat_template"] = data.chat_template_source;
  json["notes"] = data.notes;
  return WriteFileAtomically(output_dir / "data_report.json",
                             json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");
}

namespace {

// Where the rows come from, and what was said when they were found.
struct Splits {
  SplitNames names;
  Split train, eval;
  std::vector<std::string> notes;
};

absl::StatusOr<Splits> FindSplits(const JobConfig& config, HubAccess hub_access) {
  Splits splits{.names = NamesOfSplits(config.dataset_splits), .train = {}, .eval = {}, .notes = {}};
  const Sources sources{hub_access, splits.notes};
  SIMPO_ASSIGN_OR_RETURN(splits.train, FindSplit(config, config.dataset_mixer, splits.names.train, /*required=*/true,
                                                 /*whole=*/false, sources));
  const bool own_eval = !config.eval_dataset_mixer.empty();
  // Test splits are taken whole, so that runs stay comparable.
  SIMPO_ASSIGN_OR_RETURN(
      splits.eval, FindSplit(config, own_eval ? config.eval_dataset_mixer : config.dataset_mixer, splits.names.eval,
                             /*required=*/own_eval, /*whole=*/!own_eval, sources));
  return splits;
}

// Reads the tokenizer and prepares each split.
absl::StatusOr<PreparedData> PrepareHere(const JobConfig& config, const Splits& splits, const fs::path& cache_dir,
                                         const Progress& progress, BusyWith* busy) {
  SIMPO_ASSIGN_OR_RETURN(const Rules rules, MakeRules(config, busy));
  PreparedData data;
  data.notes = splits.notes;
  if (rules.tokenize.max_prompt_length != config.max_prompt_length) {
    data.notes.push_back(absl::StrCat("max_prompt_length is not given: ", rules.tokenize.max_prompt_length,
                                      ", as in the paper's trainer (compat: princeton)"));
  }
  bool conversational = false;
  SIMPO_ASSIGN_OR_RETURN(data.train_cache,
                         PrepareSplit(splits.train, rules, cache_dir, progress, &data.train_report, &conversational));
  if (splits.eval.empty()) {
    if (config.do_eval) data.notes.push_back(absl::StrCat("no evaluation: the data has no split ", splits.names.eval));
  } else {
    DataReport report;
    bool eval_conversational = false;
    SIMPO_ASSIGN_OR_RETURN(data.eval_cache,
                           PrepareSplit(splits.eval, rules, cache_dir, progress, &report, &eval_conversational));
    data.eval_report = report;
    conversational |= eval_conversational;
  }
  data.chat_template = conversational ? rules.template_text : "";
  data.chat_template_source = conversational ? rules.template_source : "none: the rows are plain texts";
  return data;
}

Json ToJson(const PreparedData& data) {
  Json json = {{"train_cache", data.train_cache.string()}, {"train_report", ToJson(data.train_report)}};
  if (data.eval_cache) json["eval_cache"] = data.eval_cache->string();
  if (data.eval_report) json["eval_report"] = ToJson(*data.eval_report);
  json["chat_template"] = data.chat_template;
  json["chat_template_source"] = data.chat_template_source;
  json["notes"] = data.notes;
  return json;
}

PreparedData PreparedFromJson(const Json& json) {
  PreparedData data{.train_cache = json["train_cache"].get<std::string>(),
                    .eval_cache = std::nullopt,
                    .train_report = ReportFromJson(json["train_report"]),
                    .eval_report = std::nullopt,
                    .chat_template = json["chat_template"],
                    .chat_template_source = json["chat_template_source"],
                    .notes = json["notes"]};
  if (json.contains("eval_cache")) data.eval_cache = json["eval_cache"].get<std::string>();
  if (json.contains("eval_report")) data.eval_report = ReportFromJson(json["eval_report"]);
  return data;
}

// More than any honest data of its size takes, compressed or not.
IsolationLimits LimitsFor(const Splits& splits) {
  int64_t bytes = 0;
  std::error_code error;
  for (const Split* split : {&splits.train, &splits.eval}) {
    for (const SplitSource& source : *split) {
      for (const fs::path& file : source.files) {
        const auto size = static_cast<int64_t>(fs::file_size(file, error));
        if (!error) bytes += size;
      }
    }
  }
  return {.memory_bytes = kBaseMemory + kMemoryPerByte * bytes};
}

}  // namespace

absl::StatusOr<PreparedData> PrepareData(const JobConfig& config, const fs::path& cache_dir, const Progress& progress,
                                         HubAccess hub_access) {
  std::error_code error;
  fs::create_directories(cache_dir, error);
  if (error)
    return absl::UnavailableError(absl::StrCat("cannot make the cache folder ", cache_dir.string(), ": ",
                                               error.message(), " (SIMPO_CACHE_DIR names another)"));
  SIMPO_ASSIGN_OR_RETURN(const Splits splits, FindSplits(config, hub_access));
  SIMPO_ASSIGN_OR_RETURN(
      const std::string answer, RunIsolated(LimitsFor(splits), [&](BusyWith& busy) -> absl::StatusOr<std::string> {
        SIMPO_ASSIGN_OR_RETURN(const PreparedData data, PrepareHere(config, splits, cache_dir, progress, &busy));
        return ToJson(data).dump(-1, ' ', false, Json::error_handler_t::replace);
      }));
  return PreparedFromJson(Json::parse(answer));
}

}  // namespace simpo
