#ifndef SIMPO_WORKER_DATA_PREPARE_H_
#define SIMPO_WORKER_DATA_PREPARE_H_

#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "common/job_config.h"
#include "worker/data/data_report.h"
#include "worker/data/hub.h"

namespace simpo {

// The result of preparing a job: files that every rank maps, and facts about the tokenizer.
struct PreparedData {
  std::filesystem::path train_cache;                // see TokenizedDataset
  std::optional<std::filesystem::path> eval_cache;  // absent when there is no evaluation split
  DataReport train_report;
  std::optional<DataReport> eval_report;
  std::string chat_template;         // the effective template's text; empty when rows are plain strings
  std::string chat_template_source;  // "job file", "tokenizer_config.json", "default of llama", "ChatML"
  std::vector<std::string> notes;    // e.g. "no evaluation split: none of test, test_prefs in ..."
};

// Writes output_dir/data_report.json: both reports, the chat template's source and the notes.
absl::Status WriteDataReport(const PreparedData& data, const std::filesystem::path& output_dir);

// Reads, checks and tokenises the job's data with its tokenizer and chat template, in parallel,
// into `cache_dir`, under names that hash the data, tokenizer, template and rules: a second call
// with the same inputs finds the files and does nothing. One process at a time works on a cache
// entry (file lock). Files are read in a child process of bounded memory, so that a hostile one ends in an
// error. `progress` (may be empty) is told there of rows done and rows in all.
// Model and tokenizer are folders here; data sets that are no paths come from the hub.
// Errors: INVALID_ARGUMENT for bad rows and templates (file and line number), NOT_FOUND for files, those of
// hub.h for data sets of the hub.
absl::StatusOr<PreparedData> PrepareData(const JobConfig& config, const std::filesystem::path& cache_dir,
                                         const std::function<void(int64_t, int64_t)>& progress,
                                         HubAccess hub_access = HubAccess::kDownload);

}  // namespace simpo

#endif  // SIMPO_WORKER_DATA_PREPARE_H_
