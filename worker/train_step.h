#ifndef SIMPO_WORKER_TRAIN_STEP_H_
#define SIMPO_WORKER_TRAIN_STEP_H_

#include <cstdint>
#include <functional>

#include "worker/model/decoder.h"
#include "worker/pack.h"
#include "worker/score_responses.h"
#include "worker/shard/sharded_params.h"
#include "worker/simpo_loss.h"

namespace simpo {

// Forward and backward over one micro-batch: adds the gradients of
//   sum over its pairs of loss / global.pairs + sft_weight * nll(chosen) / global.chosen_tokens
// to the buckets, and returns the pairs' sums. With `gradient_checkpointing` only each layer's input
// is kept and the layer is run again on the way back: same result, less memory. Collective: every rank
// walks as many micro-batches, empty ones if need be; `last` says that it is the step's last. The
// gradients are whole after ShardedParams::FinishReduce.
SimpoStats ForwardBackward(const Decoder& decoder, ShardedParams& params, const PackedBatch& batch,
                           const SimpoLoss& loss, const GlobalBatchSize& global, bool gradient_checkpointing,
                           bool last);

// Forward only. Collective in the same way. `observe` (may be empty) is shown the hidden states of the
// embeddings (layer -1) and of each layer.
SimpoStats ForwardOnly(const Decoder& decoder, ShardedParams& params, const PackedBatch& batch, const SimpoLoss& loss,
                       const std::function<void(int64_t layer, const at::Tensor& hidden_TH)>& observe = {});

}  // namespace simpo

#endif  // SIMPO_WORKER_TRAIN_STEP_H_
