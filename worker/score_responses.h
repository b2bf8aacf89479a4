#ifndef SIMPO_WORKER_SCORE_RESPONSES_H_
#define SIMPO_WORKER_SCORE_RESPONSES_H_

#include <ATen/core/Tensor.h>

#include <cstdint>

#include "worker/model/decoder.h"
#include "worker/pack.h"
#include "worker/simpo_loss.h"

namespace simpo {

// What a micro-batch's loss is divided by, so that how pairs are split over ranks and micro-batches
// never changes the result.
struct GlobalBatchSize {
  double pairs = 1;
  double chosen_tokens = 1;  // scored tokens of the chosen responses: the SFT term's denominator
};

// From the decoder's last hidden state to the loss: final norm and head on scored rows only, a
// bounded number of logits at a time, log-softmax in fp32.
struct ScoredBatch {
  SimpoStats stats;
  at::Tensor grad_TH;  // d loss / d hidden; undefined without gradients
};

// hidden_TH: the last layer's output. With gradients, those of the final norm and the head are added
// to their slots. `max_logits` bounds the elements of logits held at once: pairs are scored in
// groups that fit; one pair that does not fit alone is passed over twice instead.
ScoredBatch ScoreResponses(const Decoder& decoder, const at::Tensor& hidden_TH, const PackedBatch& batch,
                           const SimpoLoss& loss, const GlobalBatchSize& global, bool with_gradients,
                           int64_t max_logits = int64_t{1} << 25);

}  // namespace simpo

#endif  // SIMPO_WORKER_SCORE_RESPONSES_H_
