#ifndef SIMPO_WORKER_RUN_MANIFEST_H_
#define SIMPO_WORKER_RUN_MANIFEST_H_

#include <cstdint>
#include <filesystem>

#include "absl/status/status.h"
#include "worker/comm/collectives.h"
#include "worker/shard/sharded_params.h"
#include "worker/train.h"

namespace simpo {

// What a run found out when it began, beside what TrainOptions says.
struct RunFacts {
  int64_t pairs = 0, dropped_pairs = 0;  // of the train data
  int64_t global_batch_size = 0;
  int64_t steps_planned = 0;
  int64_t resumed_after_step = 0;
};

// Writes run_manifest.json: the whole job, what exactly was read (model, tokenizer, template and data, each
// with a SHA-256: small files whole, weights by their headers, data by the content hash in its cache's name),
// what runs it, and the bytes that each rank holds. Enough to tell whether two runs were of the same things.
// Collective; rank 0 writes. An error is rank 0's own.
absl::Status WriteRunManifest(const std::filesystem::path& path, const TrainOptions& options,
                              const ShardedParams& params, const RunFacts& facts, Collectives& comm);

}  // namespace simpo

#endif  // SIMPO_WORKER_RUN_MANIFEST_H_
