#include "worker/evaluate.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "worker/sampler.h"
#include "worker/train_step.h"

namespace simpo {

SimpoStats AllReduceStats(const SimpoStats& stats, Collectives& comm) {
  auto values = stats.ToArray();
  at::Tensor tensor = at::from_blob(values.data(), {static_cast<int64_t>(values.size())}, at::kDouble);
  comm.AllReduce(tensor);
  return SimpoStats::FromArray(values);
}

std::map<std::string, double> StatsToMetrics(const SimpoStats& stats, const SimpoLoss& loss, std::string_view prefix) {
  const double pairs = std::max(1.0, stats.pairs);
  const double chosen_tokens = std::max(1.0, stats.tokens_chosen);
  const double rejected_tokens = std::max(1.0, stats.tokens_rejected);
  const double sft_loss = stats.nll_chosen / chosen_tokens;
  const double chosen = stats.logps_chosen / pairs;
  const double rejected = stats.logps_rejected / pairs;
  const std::map<std::string, double> values = {
      {"loss", stats.loss / pairs + loss.sft_weight * sft_loss},
      {"rewards/chosen", loss.beta * chosen},
      {"rewards/rejected", loss.beta * rejected},
      {"rewards/margins", loss.beta * (chosen - rejected)},
      {"rewards/accuracies", stats.accuracy / pairs},
      {"logps/chosen", chosen},
      {"logps/rejected", rejected},
      {"logits/chosen", stats.logits_chosen / chosen_tokens},
      {"logits/rejected", stats.logits_rejected / rejected_tokens},
      {"sft_loss", sft_loss},
      {"nll_loss", sft_loss},
      {"lengths/chosen", stats.tokens_chosen / pairs},
      {"lengths/rejected", stats.tokens_rejected / pairs},
  };
  std::map<std::string, double> named;
  for (const auto& [name, value] : values) named[std::string(prefix) + name] = value;
  return named;
}

std::map<std::string, double> Evaluate(const Decoder& decoder, ShardedParams& params, const TokenizedDataset& data,
                                       const SimpoLoss& loss, int64_t max_tokens, int64_t max_pairs,
                                       Collectives& comm) {
  std::vector<int64_t> all(data.size());
  std::iota(all.begin(), all.end(), 0);
  std::vector<int64_t> tokens(data.size());
  const int64_t share_up_to = decoder.config().rope.SharedAnglesUpTo();
  for (int64_t i : all) tokens[i] = PackedSize(data[i], share_up_to);
  SimpoStats stats;
  for (const std::vector<int64_t>& indices :
       MicroBatchesOfRank(all, tokens, max_tokens, max_pairs, comm.rank(), comm.world_size())) {
    std::vector<TokenizedPair> pairs;
    pairs.reserve(indices.size());
    for (int64_t i : indices) pairs.push_back(data[i]);
    stats += ForwardOnly(decoder, params, Pack(pairs, share_up_to), loss);
    comm.activity().Moved();
  }
  return StatsToMetrics(AllReduceStats(stats, comm), loss, "eval_");
}

}  // namespace simpo
