#ifndef SIMPO_COORDINATOR_ATTEMPT_OUTPUT_H_
#define SIMPO_COORDINATOR_ATTEMPT_OUTPUT_H_

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "simpo/v1/job.pb.h"

namespace simpo {

// What the processes of an attempt have left in files, for when they cannot tell it any more.

// The last error message in the logs of an attempt on so many ranks: of the worker, else of mpirun about a lost rank.
// Empty: none is found.
std::string LastWords(const std::filesystem::path& log_dir, int ranks);

// The points of metrics.jsonl or eval_metrics.jsonl with a greater step than `after_step`, in order.
// Lines that are not whole are left out; a missing file has no points. Read from the end, where steps only fall: what
// is older than the last 50,000 points or 32 MiB is left out, with a warning.
std::vector<v1::MetricPoint> ReadMetricsFile(const std::filesystem::path& path, const std::string& split, int attempt,
                                             int64_t after_step);

}  // namespace simpo

#endif  // SIMPO_COORDINATOR_ATTEMPT_OUTPUT_H_
