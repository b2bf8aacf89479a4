// ATen's variable-length FlashAttention exists for GPUs only. This gives it a CPU form, written out from its
// definition, so that what the trainer hands to it and takes from it is tested without a GPU: queries
// [total queries, heads, D], keys and values [total keys, kv heads, D], sequence i between its cumulative
// lengths, causal with the last query at the last key, window_size_left keys before a query's own at most.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

namespace {

struct Sequence {
  int64_t query_begin, queries, key_begin, keys;
};

std::vector<Sequence> SequencesOf(const at::Tensor& cumulative_queries, const at::Tensor& cumulative_keys) {
  TORCH_CHECK(cumulative_queries.scalar_type() == at::kInt && cumulative_keys.scalar_type() == at::kInt, "int32");
  TORCH_CHECK(cumulative_queries.numel() == cumulative_keys.numel());
  std::vector<Sequence> sequences;
  const auto* q = cumulative_queries.data_ptr<int32_t>();
  const auto* k = cumulative_keys.data_ptr<int32_t>();
  for (int64_t i = 0; i + 1 < cumulative_queries.numel(); ++i) {
    TORCH_CHECK(q[i + 1] > q[i] && k[i + 1] - k[i] >= q[i + 1] - q[i], "an empty sequence, or too few keys");
    sequences.push_back({q[i], q[i + 1] - q[i], k[i], k[i + 1] - k[i]});
  }
  return sequences;
}

// Probabilities [heads, queries, keys] in fp64 of one sequence; its log sum exp [heads, queries].
std::pair<at::Tensor, at::Tensor> Probabilities(const at::Tensor& query, const at::Tensor& key, const Sequence& s,
                                                double scale, std::optional<int64_t> window_left) {
  const int64_t group = query.size(1) / key.size(1);
  const at::Tensor q = query.narrow(0, s.query_begin, s.queries).to(at::kDouble).transpose(0, 1);
  const at::Tensor k = key.narrow(0, s.key_begin, s.keys).to(at::kDouble).transpose(0, 1).repeat_interleave(group, 0);
  const int64_t offset = s.keys - s.queries;
  at::Tensor hidden = at::ones({s.queries, s.keys}, at::kBool).triu(offset + 1);
  if (window_left.value_or(-1) >= 0) {
    hidden = hidden.logical_or(at::ones({s.queries, s.keys}, at::kBool).tril(offset - *window_left - 1));
  }
  const at::Tensor scores = (at::matmul(q, k.transpose(1, 2)) * scale).masked_fill(hidden, -INFINITY);
  return {scores.softmax(-1), scores.logsumexp(-1)};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> Forward(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& cum_seq_q,
    const std::optional<at::Tensor>& cum_seq_k, int64_t max_q, int64_t max_k, double dropout_p, bool is_causal,
    bool return_debug_mask, std::optional<double> scale, std::optional<int64_t> window_size_left,
    std::optional<int64_t> window_size_right, const std::optional<at::Tensor>& seqused_k,
    const std::optional<at::Tensor>& alibi_slopes, const std::optional<at::Tensor>& block_table,
    std::optional<int64_t> num_splits) {
  TORCH_CHECK(is_causal && dropout_p == 0 && window_size_right.value_or(0) == 0 && scale.has_value());
  TORCH_CHECK(query.stride(2) == 1 && key.stride(2) == 1 && value.stride(2) == 1, "the last dimension is contiguous");
  at::Tensor out = at::empty(query.sizes(), query.options());
  at::Tensor lse = at::empty({query.size(1), query.size(0)}, at::kFloat);
  const int64_t group = query.size(1) / key.size(1);
  for (const Sequence& s : SequencesOf(*cum_seq_q, *cum_seq_k)) {
    TORCH_CHECK(s.queries <= max_q && s.keys <= max_k);
    const auto [probabilities, logsumexp] = Probabilities(query, key, s, *scale, window_size_left);
    const at::Tensor v =
        value.narrow(0, s.key_begin, s.keys).to(at::kDouble).transpose(0, 1).repeat_interleave(group, 0);
    out.narrow(0, s.query_begin, s.queries).copy_(at::matmul(probabilities, v).transpose(0, 1));
    lse.narrow(1, s.query_begin, s.queries).copy_(logsumexp);
  }
  // The state of a random generator that is not used; the backward pass must bring the same tensors back.
  return {out, lse, at::full({2}, 7, at::kLong), at::full({}, 9, at::kLong), at::Tensor()};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> Backward(
    const at::Tensor& grad_out, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& out, const at::Tensor& logsumexp, const at::Tensor& cum_seq_q, const at::Tensor& cum_seq_k,
    int64_t max_q, int64_t max_k, double dropout_p, bool is_causal, const at::Tensor& rng_state,
    const at::Tensor& unused, std::optional<double> scale, std::optional<int64_t> window_size_left,
    std::optional<int64_t> window_size_right) {
  TORCH_CHECK(rng_state.eq(7).all().item<bool>() && unused.item<int64_t>() == 9, "not what the forward pass gave");
  TORCH_CHECK(grad_out.is_contiguous());
  const int64_t group = query.size(1) / key.size(1);
  at::Tensor gq = at::zeros(query.sizes(), query.options());
  at::Tensor gk = at::zeros(key.sizes(), key.options());
  at::Tensor gv = at::zeros(value.sizes(), value.options());
  const auto over_group = [&](const at::Tensor& x, int64_t keys) {
    return x.view({key.size(1), group, keys, -1}).sum(1).transpose(0, 1);
  };
  for (const Sequence& s : SequencesOf(cum_seq_q, cum_seq_k)) {
    const at::Tensor p = Probabilities(query, key, s, *scale, window_size_left).first;
    const at::Tensor gy = grad_out.narrow(0, s.query_begin, s.queries).to(at::kDouble).transpose(0, 1);
    const at::Tensor q = query.narrow(0, s.query_begin, s.queries).to(at::kDouble).transpose(0, 1);
    const at::Tensor k = key.narrow(0, s.key_begin, s.keys).to(at::kDouble).transpose(0, 1).repeat_interleave(group, 0);
    const at::Tensor v =
        value.narrow(0, s.key_begin, s.keys).to(at::kDouble).transpose(0, 1).repeat_interleave(group, 0);
    const at::Tensor gp = at::matmul(gy, v.transpose(1, 2));
    const at::Tensor gs = p * (gp - (gp * p).sum(-1, /*keepdim=*/true)) * *scale;
    gq.narrow(0, s.query_begin, s.queries).copy_(at::matmul(gs, k).transpose(0, 1));
    gk.narrow(0, s.key_begin, s.keys).copy_(over_group(at::matmul(gs.transpose(1, 2), q), s.keys));
    gv.narrow(0, s.key_begin, s.keys).copy_(over_group(at::matmul(p.transpose(1, 2), gy), s.keys));
  }
  return {gq, gk, gv};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, CPU, library) {
  library.impl("_flash_attention_forward", Forward);
  library.impl("_flash_attention_backward", Backward);
}
