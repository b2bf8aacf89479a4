#include "worker/pack.h"

#include <ATen/ATen.h>

#include <algorithm>

namespace simpo {
namespace {

at::Tensor ToTensor(const std::vector<int64_t>& values) {
  at::Tensor tensor = at::empty({static_cast<int64_t>(values.size())}, at::kLong);
  std::copy(values.begin(), values.end(), tensor.data_ptr<int64_t>());
  return tensor;
}

// The hidden row that predicts token `t` of a sequence whose first `prefix` tokens are shared and
// whose rest begins at `rest_begin` of the packed row.
int64_t PredictingRow(int64_t t, int64_t begin, int64_t prefix, int64_t rest_begin) {
  return t - 1 < prefix ? begin + t - 1 : rest_begin + (t - 1 - prefix);
}

int64_t SharedPrefix(const TokenizedPair& pair, int64_t share_up_to) {
  const bool shares = static_cast<int64_t>(std::max(pair.chosen.size(), pair.rejected.size())) <= share_up_to;
  return shares ? pair.SharedPrefixLength() : 0;
}

}  // namespace

int64_t PackedSize(const TokenizedPair& pair, int64_t share_up_to) {
  return static_cast<int64_t>(pair.chosen.size() + pair.rejected.size()) - SharedPrefix(pair, share_up_to) - 2;
}

PackedBatch Pack(std::span<const TokenizedPair> pairs, int64_t share_up_to) {
  PackedBatch batch;
  std::vector<int64_t> ids, positions, head_rows;
  batch.pair_head_begin.push_back(0);
  batch.pair_scored_begin.push_back(0);
  for (const TokenizedPair& pair : pairs) {
    const int64_t shared = SharedPrefix(pair, share_up_to);
    const auto begin = static_cast<int64_t>(ids.size());
    const auto chosen_size = static_cast<int64_t>(pair.chosen.size());
    const auto rejected_size = static_cast<int64_t>(pair.rejected.size());
    const PackedPair place{.begin = begin,
                           .prefix = shared,
                           .chosen_rest = chosen_size - 1 - shared,
                           .rejected_rest = rejected_size - 1 - shared};
    for (int64_t t = 0; t < chosen_size - 1; ++t) {
      ids.push_back(pair.chosen[t]);
      positions.push_back(t);
    }
    for (int64_t t = shared; t < rejected_size - 1; ++t) {
      ids.push_back(pair.rejected[t]);
      positions.push_back(t);
    }

    // Rows whose logits are needed, once each, in packed order.
    const int64_t first_head_row = batch.pair_head_begin.back();
    std::vector<int32_t> head_row_of(place.size(), -1);
    const int64_t chosen_begin = begin + shared;
    const int64_t rejected_begin = chosen_begin + place.chosen_rest;
    auto mark = [&](int64_t prompt, int64_t size, int64_t rest_begin) {
      for (int64_t t = prompt; t < size; ++t) head_row_of[PredictingRow(t, begin, shared, rest_begin) - begin] = 0;
    };
    mark(pair.chosen_prompt_length, chosen_size, chosen_begin);
    mark(pair.rejected_prompt_length, rejected_size, rejected_begin);
    for (int64_t i = 0; i < place.size(); ++i) {
      if (head_row_of[i] < 0) continue;
      head_row_of[i] = static_cast<int32_t>(head_rows.size());
      head_rows.push_back(begin + i);
    }
    const auto response = static_cast<int32_t>(2 * batch.pairs.size());
    auto score = [&](std::span<const int32_t> tokens, int64_t prompt, int64_t rest_begin, int32_t which) {
      for (int64_t t = prompt; t < static_cast<int64_t>(tokens.size()); ++t) {
        const int64_t row = PredictingRow(t, begin, shared, rest_begin);
        batch.scored.push_back({head_row_of[row - begin], tokens[t], which});
      }
      batch.scored_tokens.push_back(static_cast<int32_t>(tokens.size()) - static_cast<int32_t>(prompt));
    };
    score(pair.chosen, pair.chosen_prompt_length, chosen_begin, response);
    score(pair.rejected, pair.rejected_prompt_length, rejected_begin, response + 1);

    TORCH_CHECK(static_cast<int64_t>(head_rows.size()) > first_head_row, "a pair without scored tokens");
    batch.pairs.push_back(place);
    batch.pair_head_begin.push_back(static_cast<int64_t>(head_rows.size()));
    batch.pair_scored_begin.push_back(static_cast<int64_t>(batch.scored.size()));
    batch.source_tokens += chosen_size + rejected_size;
  }
  batch.input_ids_T = ToTensor(ids);
  batch.positions_T = ToTensor(positions);
  batch.head_rows_N = ToTensor(head_rows);
  return batch;
}

}  // namespace simpo
