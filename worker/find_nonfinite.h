#ifndef SIMPO_WORKER_FIND_NONFINITE_H_
#define SIMPO_WORKER_FIND_NONFINITE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "worker/comm/collectives.h"
#include "worker/model/decoder.h"
#include "worker/pack.h"
#include "worker/shard/sharded_params.h"
#include "worker/simpo_loss.h"

namespace simpo {

// Where the NaN or infinity of a step's loss or gradients began.
struct NonFinite {
  enum class Kind { kWeight, kActivation, kGradient, kUnknown };
  Kind kind = Kind::kUnknown;
  int rank = 0;
  int64_t micro_batch = 0;  // kActivation: of that rank, from 0
  int64_t layer = 0;        // kActivation: -1 the embeddings, 0.. the layers' outputs, num_layers the loss
  std::string weight;       // kWeight, kGradient: its name
  // "the output of layer 3 on rank 1, micro-batch 2", "the weight model.layers.3.mlp.down_proj.weight"
  std::string ToString(int64_t num_layers) const;
};

// Walks the step's micro-batches again, forward, after its backward passes and before its update:
// weights, then each layer's output, then the summed gradients from the head down. Collective; the same
// answer on every rank: the earliest kind, micro-batch and layer, then the lowest rank.
NonFinite FindNonFinite(const Decoder& decoder, ShardedParams& params, const std::vector<PackedBatch>& micro_batches,
                        const SimpoLoss& loss, Collectives& comm);

}  // namespace simpo

#endif  // SIMPO_WORKER_FIND_NONFINITE_H_
