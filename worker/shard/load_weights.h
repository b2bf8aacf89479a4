#ifndef SIMPO_WORKER_SHARD_LOAD_WEIGHTS_H_
#define SIMPO_WORKER_SHARD_LOAD_WEIGHTS_H_

#include "absl/status/status.h"
#include "worker/model/safetensors.h"
#include "worker/shard/sharded_params.h"

namespace simpo {

// Fills weights and masters from an HF model folder. Every rank reads what it holds, tensor by tensor.
// Errors are those of ModelWeightsReader::Get.
absl::Status LoadWeights(const ModelWeightsReader& reader, ShardedParams& params);

}  // namespace simpo

#endif  // SIMPO_WORKER_SHARD_LOAD_WEIGHTS_H_
