#ifndef SIMPO_WORKER_EVALUATE_H_
#define SIMPO_WORKER_EVALUATE_H_

#include <map>
#include <string>
#include <string_view>

#include "worker/comm/collectives.h"
#include "worker/data/tokenized_dataset.h"
#include "worker/model/decoder.h"
#include "worker/shard/sharded_params.h"
#include "worker/simpo_loss.h"

namespace simpo {

// Sums over the ranks. Collective.
SimpoStats AllReduceStats(const SimpoStats& stats, Collectives& comm);

// The metrics that follow from the sums, under the names of docs/simpo.md, each with `prefix`.
std::map<std::string, double> StatsToMetrics(const SimpoStats& stats, const SimpoLoss& loss, std::string_view prefix);

// The loss and metrics (prefix "eval_") over all pairs of a data set, dealt out over the ranks.
// Collective. `max_tokens` and `max_pairs` bound a micro-batch as in sampler.h.
std::map<std::string, double> Evaluate(const Decoder& decoder, ShardedParams& params, const TokenizedDataset& data,
                                       const SimpoLoss& loss, int64_t max_tokens, int64_t max_pairs, Collectives& comm);

}  // namespace simpo

#endif  // SIMPO_WORKER_EVALUATE_H_
