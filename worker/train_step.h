#ifndef SIMPO_WORKER_TRAIN_STEP_H_
#define SIMPO_WORKER_TRAIN_STEP_H_

#include "worker/model/decoder.h"
#include "worker/pack.h"
#include "worker/score_responses.h"
#include "worker/shard/sharded_params.h"
#include "worker/simpo_loss.h"

namespace simpo {

// Forward and backward over one micro-batch: adds the gradients of
//   sum over its pairs of loss / global.pairs + sft_weight * nll(chosen) / global.chosen_tokens
// to the buckets, and returns the pairs' sums. With `gradient_checkpointing` only each layer's input
// is kept and the layer is run again on the way back: same result, less memory.
SimpoStats ForwardBackward(const Decoder& decoder, const ShardedParams& params, const PackedBatch& batch,
                           const SimpoLoss& loss, const GlobalBatchSize& global, bool gradient_checkpointing);

// Forward only.
SimpoStats ForwardOnly(const Decoder& decoder, const ShardedParams& params, const PackedBatch& batch,
                       const SimpoLoss& loss);

}  // namespace simpo

#endif  // SIMPO_WORKER_TRAIN_STEP_H_
