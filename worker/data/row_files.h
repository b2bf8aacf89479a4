#ifndef SIMPO_WORKER_DATA_ROW_FILES_H_
#define SIMPO_WORKER_DATA_ROW_FILES_H_

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace simpo {

// Takes one row as JSON text, with its place ("file:line") for messages; false ends the reading.
using RowSink = std::function<bool(std::string_view json, const std::string& where)>;

// The rows of a data file, one after the other, by its extension: .jsonl, .json (an array, an object
// with the array under a key such as "data", or lines), .csv (RFC 4180 with a header; a cell that holds
// a list of messages as JSON becomes one), .parquet. All but Parquet may be gzipped (.jsonl.gz). A row
// is only cut out here: whether it is valid JSON is for its reader to say. Memory: one row of at most
// 64 MiB, in Parquet one page and 32 rows. NOT_FOUND, or INVALID_ARGUMENT with file and line.
absl::Status ReadRows(const std::filesystem::path& path, const RowSink& sink);

// Whether the name is of a kind that ReadRows knows.
bool IsRowFile(const std::filesystem::path& path);

// How many rows ReadRows gives.
absl::StatusOr<int64_t> CountRows(const std::filesystem::path& path);

// Which files of a data source hold a split.
struct SplitQuery {
  std::string split;     // "train", "test_prefs"
  std::string config;    // a folder below the source; empty: none
  bool unnamed = false;  // whether files that carry no split's name (one file, a glob) belong to it
};
// The source is a file, a glob, or a folder in which files or their folders carry the split's name:
// train.jsonl, data/train-00000-of-00002.parquet, CONFIG/test.csv, default/train/0000.parquet. In order
// of their paths; empty when there are none. Errors: NOT_FOUND when the source itself is not there,
// INVALID_ARGUMENT when several forms or configurations would be mixed.
absl::StatusOr<std::vector<std::filesystem::path>> FindSplitFiles(const std::filesystem::path& source,
                                                                  const SplitQuery& query);

}  // namespace simpo

#endif  // SIMPO_WORKER_DATA_ROW_FILES_H_
