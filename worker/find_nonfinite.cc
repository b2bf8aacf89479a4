#include "worker/find_nonfinite.h"

#include <ATen/ATen.h>

#include <array>
#include <cmath>
#include <limits>

#include "absl/strings/str_cat.h"
#include "worker/train_step.h"

namespace simpo {
namespace {

// What one rank has found, as numbers that all can compare: kind, micro-batch, layer (activations) or
// the weight's place in the model.
using Finding = std::array<int64_t, 3>;
constexpr Finding kNothing = {static_cast<int64_t>(NonFinite::Kind::kUnknown), 0, 0};

bool AllFinite(const at::Tensor& tensor) { return at::isfinite(tensor).all().item<bool>(); }

// The first weight whose part of `tensor_of(bucket)`, an owned part, is not finite; weights are counted
// over the buckets. `backwards`: the bucket nearest to the head first.
template <typename TensorOf>
std::optional<int64_t> FirstBadWeight(const ShardedParams& params, bool backwards, TensorOf tensor_of) {
  std::vector<int64_t> bad;
  int64_t first_of_bucket = 0;
  for (const Bucket& bucket : params.buckets()) {
    const at::Tensor& owned = tensor_of(bucket);
    if (!AllFinite(owned)) {
      for (size_t s = 0; s < bucket.slots.size(); ++s) {
        const ParamSlot& slot = bucket.slots[s];
        const int64_t begin = std::max(slot.offset, bucket.owned_begin);
        const int64_t end = std::min(slot.offset + slot.numel, bucket.owned_begin + owned.numel());
        if (begin < end && !AllFinite(owned.narrow(0, begin - bucket.owned_begin, end - begin))) {
          bad.push_back(first_of_bucket + static_cast<int64_t>(s));
          break;
        }
      }
    }
    first_of_bucket += static_cast<int64_t>(bucket.slots.size());
  }
  if (bad.empty()) return std::nullopt;
  return backwards ? bad.back() : bad.front();
}

Finding OfThisRank(const Decoder& decoder, ShardedParams& params, const std::vector<PackedBatch>& micro_batches,
                   const SimpoLoss& loss) {
  Finding finding = kNothing;
  const auto note = [&](NonFinite::Kind kind, int64_t micro_batch, int64_t place) {
    finding = std::min(finding, {static_cast<int64_t>(kind), micro_batch, place});
  };
  if (const auto weight = FirstBadWeight(params, false, [](const Bucket& b) { return b.weight_shard; })) {
    note(NonFinite::Kind::kWeight, 0, *weight);
  }
  // Every rank walks through the collectives, whatever it has found.
  for (size_t i = 0; i < micro_batches.size(); ++i) {
    const auto micro_batch = static_cast<int64_t>(i);
    const SimpoStats stats =
        ForwardOnly(decoder, params, micro_batches[i], loss, [&](int64_t layer, const at::Tensor& hidden_TH) {
          if (!AllFinite(hidden_TH)) note(NonFinite::Kind::kActivation, micro_batch, layer);
        });
    if (!std::isfinite(stats.loss + stats.nll_chosen)) {
      note(NonFinite::Kind::kActivation, micro_batch, decoder.num_layers());
    }
  }
  if (const auto weight = FirstBadWeight(params, true, [](const Bucket& b) { return b.grad_shard; })) {
    // The larger place is the earlier one on the way back.
    note(NonFinite::Kind::kGradient, 0, std::numeric_limits<int64_t>::max() - *weight);
  }
  return finding;
}

}  // namespace

std::string NonFinite::ToString(int64_t num_layers) const {
  const std::string place = absl::StrCat(" on rank ", rank, ", micro-batch ", micro_batch + 1);
  switch (kind) {
    case Kind::kWeight:
      return absl::StrCat("the weight ", weight, ", before the step");
    case Kind::kActivation:
      if (layer < 0) return absl::StrCat("the output of the embeddings", place);
      if (layer == num_layers) return absl::StrCat("the head's log-probabilities", place);
      return absl::StrCat("the output of layer ", layer, place);
    case Kind::kGradient:
      return absl::StrCat("the gradient of ", weight, " (every activation is finite)");
    case Kind::kUnknown:
      break;
  }
  return "a sum over the batch (every weight, activation and gradient is finite)";
}

NonFinite FindNonFinite(const Decoder& decoder, ShardedParams& params, const std::vector<PackedBatch>& micro_batches,
                        const SimpoLoss& loss, Collectives& comm) {
  const Finding mine = OfThisRank(decoder, params, micro_batches, loss);
  at::Tensor all = at::zeros({comm.world_size(), 3}, at::kLong);
  for (int64_t i = 0; i < 3; ++i) all[comm.rank()][i] = mine[i];
  comm.AllReduce(all);
  Finding first = {std::numeric_limits<int64_t>::max(), 0, 0};
  NonFinite result;
  for (int rank = 0; rank < comm.world_size(); ++rank) {
    const auto* row = all[rank].data_ptr<int64_t>();
    if (const Finding finding = {row[0], row[1], row[2]}; finding < first) {
      first = finding;
      result.rank = rank;
    }
  }
  result.kind = static_cast<NonFinite::Kind>(first[0]);
  result.micro_batch = first[1];
  result.layer = first[2];
  if (result.kind == NonFinite::Kind::kWeight || result.kind == NonFinite::Kind::kGradient) {
    const int64_t place =
        result.kind == NonFinite::Kind::kWeight ? first[2] : std::numeric_limits<int64_t>::max() - first[2];
    result.weight = ModelWeights(decoder.config())[place].name;
  }
  return result;
}

}  // namespace simpo
