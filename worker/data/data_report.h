#ifndef SIMPO_WORKER_DATA_DATA_REPORT_H_
#define SIMPO_WORKER_DATA_DATA_REPORT_H_

#include <cstdint>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>

#include "worker/data/tokenized_dataset.h"

namespace simpo {

// Lengths in tokens over the pairs of a split.
struct LengthSummary {
  double mean = 0;
  int64_t p50 = 0, p90 = 0, p99 = 0, longest = 0;
};

// What happened to the rows of one split.
struct DataReport {
  int64_t rows = 0;
  int64_t pairs = 0;                       // kept
  std::map<std::string, int64_t> dropped;  // reason -> rows
  int64_t truncated = 0;
  int64_t ties = 0;                                         // pairs whose two scores are equal, dropped or not
  LengthSummary prompt, chosen, rejected, longer_sequence;  // the longer of a pair's two sequences
  double shared_prefix_share = 0;                           // common prefix tokens / all tokens of both sequences
  void Measure(std::span<const OwnedPair> kept);            // fills in what is counted over the pairs that were kept
  std::string ToString() const;                             // a few lines for a log
};

nlohmann::ordered_json ToJson(const DataReport& report);
DataReport ReportFromJson(const nlohmann::ordered_json& json);

}  // namespace simpo

#endif  // SIMPO_WORKER_DATA_DATA_REPORT_H_
