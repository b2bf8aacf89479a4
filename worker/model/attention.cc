// Shape letters: T rows of the batch, A all heads of q, k and v, Q query rows and S key rows of one call, K key-value
// heads, G query heads per key-value head, D head size.
#include "worker/model/attention.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <limits>
#include <optional>

namespace simpo {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

int64_t Group(const AttentionConfig& config) { return config.heads / config.kv_heads; }

// Rows of q as [K, G, Q, D]: a view, no copy.
at::Tensor Queries(const at::Tensor& rows_TAD, const AttentionConfig& config) {
  return rows_TAD.narrow(1, 0, config.heads).unflatten(1, {config.kv_heads, Group(config)}).permute({1, 2, 0, 3});
}
// Rows of k (which = 0) or v (which = 1) as [K, G, S, D], the same memory for all G.
at::Tensor KeysOrValues(const at::Tensor& rows_TAD, const AttentionConfig& config, int64_t which) {
  return rows_TAD.narrow(1, config.heads + which * config.kv_heads, config.kv_heads)
      .permute({1, 0, 2})
      .unsqueeze(1)
      .expand({config.kv_heads, Group(config), rows_TAD.size(0), rows_TAD.size(2)});
}

// One stretch of a packed row: its own rows and, before them in the sequence, the `prefix` rows at
// prefix_begin. Its positions count from the start of the sequence, so its own begin at `prefix`.
struct Segment {
  int64_t begin, count, prefix_begin, prefix;
  int64_t length() const { return prefix + count; }
};

std::vector<Segment> Segments(const AttentionPlan& plan) {
  std::vector<Segment> segments;
  for (const PackedPair& pair : plan.pairs()) {
    const int64_t first = pair.prefix + pair.chosen_rest;
    if (first > 0) segments.push_back({pair.begin, first, 0, 0});
    if (pair.rejected_rest > 0) {
      segments.push_back({pair.begin + first, pair.rejected_rest, pair.begin, pair.prefix});
    }
  }
  return segments;
}

// The rows of positions [first, segment.length()) of a segment's sequence.
at::Tensor RowsFrom(const at::Tensor& qkv_TAD, const Segment& segment, int64_t first) {
  const int64_t shared = segment.prefix - first;  // rows of the prefix among them
  if (shared <= 0) return qkv_TAD.narrow(0, segment.begin - shared, segment.count + shared);
  const at::Tensor own = qkv_TAD.narrow(0, segment.begin, segment.count);
  return at::cat({qkv_TAD.narrow(0, segment.prefix_begin + first, shared), own});
}

// Some queries of a segment, at positions [first, first + count), with the keys that they see, from
// position first_key to the last query's. Without a mask it is plainly causal, of all the segment.
struct Chunk {
  int64_t first, count, first_key;
  std::optional<at::Tensor> mask;
};

// ATen's fused kernel is for the CPU and knows no softcap. Elsewhere scores are written out.
bool IsFused(const at::Tensor& x, const AttentionConfig& config) { return x.is_cpu() && config.softcap == 0; }

std::vector<Chunk> Chunks(const Segment& segment, const AttentionConfig& config, const AttentionPlan& plan,
                          bool fused) {
  const bool hides = AttentionPlan::Hides(config.window, segment.length());
  if (fused && segment.prefix == 0 && !hides) return {{0, segment.count, 0, std::nullopt}};
  std::vector<Chunk> chunks;
  for (int64_t first = segment.prefix; first < segment.length(); first += AttentionPlan::kMaxQueries) {
    const int64_t count = std::min(AttentionPlan::kMaxQueries, segment.length() - first);
    const int64_t first_key = hides ? std::max<int64_t>(0, first - config.window + 1) : 0;
    chunks.push_back({first, count, first_key, plan.Mask(config.window, first, count, first_key)});
  }
  return chunks;
}

// Scores [K, G, Q, S] in fp32, capped; -inf where the mask is.
at::Tensor Scores(const at::Tensor& q, const at::Tensor& k, const at::Tensor& mask, const AttentionConfig& config) {
  at::Tensor scores = at::matmul(q, k.transpose(2, 3)).to(at::kFloat).mul_(config.scale);
  if (config.softcap > 0) scores.div_(config.softcap).tanh_().mul_(config.softcap);
  return scores.add_(mask);
}

// The attention of one chunk, q [K, G, Q, D], k and v [K, G, S, D]: the output and log sum exp of each
// query.
std::pair<at::Tensor, at::Tensor> Attend(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                         const Chunk& chunk, const AttentionConfig& config) {
  if (IsFused(q, config)) {
    auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
        q, k, v, /*dropout_p=*/0.0, /*is_causal=*/!chunk.mask.has_value(), chunk.mask, config.scale);
    return {out, lse};
  }
  const at::Tensor scores = Scores(q, k, *chunk.mask, config);
  const at::Tensor lse = scores.logsumexp(-1);
  const at::Tensor probabilities = (scores - lse.unsqueeze(-1)).exp_().to(v.scalar_type());
  return {at::matmul(probabilities, v), lse};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> AttendBackward(const at::Tensor& gy, const at::Tensor& q,
                                                              const at::Tensor& k, const at::Tensor& v,
                                                              const at::Tensor& out, const at::Tensor& lse,
                                                              const Chunk& chunk, const AttentionConfig& config) {
  if (IsFused(q, config)) {
    return at::_scaled_dot_product_flash_attention_for_cpu_backward(gy, q, k, v, out, lse, /*dropout_p=*/0.0,
                                                                    /*is_causal=*/!chunk.mask.has_value(), chunk.mask,
                                                                    config.scale);
  }
  const at::Tensor scores = Scores(q, k, *chunk.mask, config);
  const at::Tensor probabilities = (scores - lse.unsqueeze(-1)).exp();
  const at::Tensor gv = at::matmul(probabilities.to(v.scalar_type()).transpose(2, 3), gy);
  const at::Tensor dot = (gy.to(at::kFloat) * out.to(at::kFloat)).sum(-1, /*keepdim=*/true);
  at::Tensor gscores = at::matmul(gy, v.transpose(2, 3)).to(at::kFloat).sub_(dot).mul_(probabilities);
  if (config.softcap > 0) {
    // d cap * tanh(x / cap) / dx = 1 - (score / cap)^2; where the mask is, the probability was 0.
    gscores.mul_(1 - scores.clamp_min(-config.softcap).div_(config.softcap).pow_(2));
  }
  const at::Tensor rounded = gscores.mul_(config.scale).to(q.scalar_type());
  return {at::matmul(rounded, k), at::matmul(rounded.transpose(2, 3), q), gv};
}

// What an attention saves of its call beside tensors.
struct Call : torch::CustomClassHolder {
  Call(const AttentionConfig& c, std::shared_ptr<const AttentionPlan> p) : config(c), plan(std::move(p)) {}
  AttentionConfig config;
  std::shared_ptr<const AttentionPlan> plan;
};

struct AttentionFunction : Function<AttentionFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& qkv_TAD, const AttentionConfig& config,
                            const std::shared_ptr<const AttentionPlan>& plan) {
    at::Tensor out_TAD = at::empty({qkv_TAD.size(0), config.heads, qkv_TAD.size(2)}, qkv_TAD.options());
    variable_list saved = {qkv_TAD, out_TAD};
    for (const Segment& segment : Segments(*plan)) {
      const std::vector<Chunk> chunks = Chunks(segment, config, *plan, IsFused(qkv_TAD, config));
      const int64_t first_key = chunks.front().first_key;
      const at::Tensor rows = RowsFrom(qkv_TAD, segment, first_key);
      for (const Chunk& chunk : chunks) {
        const int64_t begin = segment.begin + chunk.first - segment.prefix;
        const at::Tensor keys =
            rows.narrow(0, chunk.first_key - first_key, chunk.first + chunk.count - chunk.first_key);
        const auto [out, lse] = Attend(Queries(qkv_TAD.narrow(0, begin, chunk.count), config),
                                       KeysOrValues(keys, config, 0), KeysOrValues(keys, config, 1), chunk, config);
        Queries(out_TAD.narrow(0, begin, chunk.count), config).copy_(out);
        saved.push_back(lse);
      }
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["call"] = c10::IValue::make_capsule(c10::make_intrusive<Call>(config, plan));
    return out_TAD.flatten(1);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    const AttentionConfig& config = call->config;
    const at::Tensor& qkv_TAD = saved[0];
    const at::Tensor& out_TAD = saved[1];
    const at::Tensor gy_TAD = gradients[0].reshape(out_TAD.sizes());
    at::Tensor grad_TAD = at::zeros_like(qkv_TAD);
    size_t next = 2;
    for (const Segment& segment : Segments(*call->plan)) {
      const std::vector<Chunk> chunks = Chunks(segment, config, *call->plan, IsFused(qkv_TAD, config));
      const int64_t first_key = chunks.front().first_key;
      const at::Tensor rows_SAD = RowsFrom(qkv_TAD, segment, first_key);
      for (const Chunk& chunk : chunks) {
        const int64_t begin = segment.begin + chunk.first - segment.prefix;
        const auto queries = [&](const at::Tensor& x) { return Queries(x.narrow(0, begin, chunk.count), config); };
        const at::Tensor keys =
            rows_SAD.narrow(0, chunk.first_key - first_key, chunk.first + chunk.count - chunk.first_key);
        const auto [gq, gk, gv] =
            AttendBackward(queries(gy_TAD), queries(qkv_TAD), KeysOrValues(keys, config, 0),
                           KeysOrValues(keys, config, 1), queries(out_TAD), saved[next++], chunk, config);
        queries(grad_TAD).copy_(gq);
        AddToKeys(grad_TAD, segment, chunk, config, 0, gk);
        AddToKeys(grad_TAD, segment, chunk, config, 1, gv);
      }
    }
    return {grad_TAD, at::Tensor(), at::Tensor()};
  }

 private:
  // Adds grad [K, G, S, D] of a chunk's keys or values to their rows, those in the prefix and the own.
  static void AddToKeys(const at::Tensor& grad_TAD, const Segment& segment, const Chunk& chunk,
                        const AttentionConfig& config, int64_t which, const at::Tensor& grad) {
    const at::Tensor sum_SKD = grad.sum(1).permute({1, 0, 2});
    const at::Tensor place = grad_TAD.narrow(1, config.heads + which * config.kv_heads, config.kv_heads);
    const int64_t shared = std::max<int64_t>(0, segment.prefix - chunk.first_key);
    const int64_t own = sum_SKD.size(0) - shared;
    const int64_t own_begin = segment.begin + std::max<int64_t>(0, chunk.first_key - segment.prefix);
    place.narrow(0, own_begin, own).add_(sum_SKD.narrow(0, shared, own));
    if (shared > 0) {
      place.narrow(0, segment.prefix_begin + chunk.first_key, shared).add_(sum_SKD.narrow(0, 0, shared));
    }
  }
};

// One call of the kernel for all sequences; causal, aligned at each sequence's last query and key.
struct VariableLengthFunction : Function<VariableLengthFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& qkv_TAD, const AttentionConfig& config,
                            const std::shared_ptr<const AttentionPlan>& plan) {
    const AttentionPlan::Sequences& sequences = plan->sequences();
    const at::Tensor kv_SAD = qkv_TAD.narrow(1, config.heads, 2 * config.kv_heads).index_select(0, sequences.key_rows);
    const auto [out, lse, rng_state, unused, debug_mask] = at::_flash_attention_forward(
        qkv_TAD.narrow(1, 0, config.heads), kv_SAD.narrow(1, 0, config.kv_heads),
        kv_SAD.narrow(1, config.kv_heads, config.kv_heads), sequences.cumulative_queries, sequences.cumulative_keys,
        sequences.longest_queries, sequences.longest_keys, /*dropout_p=*/0.0, /*is_causal=*/true,
        /*return_debug_mask=*/false, config.scale, WindowLeft(config), WindowRight(config));
    ctx->save_for_backward({qkv_TAD, kv_SAD, out, lse, rng_state, unused});
    ctx->saved_data["call"] = c10::IValue::make_capsule(c10::make_intrusive<Call>(config, plan));
    return out.flatten(1);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const auto call = c10::static_intrusive_pointer_cast<Call>(ctx->saved_data["call"].toCapsule());
    const AttentionConfig& config = call->config;
    const AttentionPlan::Sequences& sequences = call->plan->sequences();
    const at::Tensor& qkv_TAD = saved[0];
    const at::Tensor& kv_SAD = saved[1];
    const auto [gq, gk, gv] = at::_flash_attention_backward(
        gradients[0].reshape(saved[2].sizes()).contiguous(), qkv_TAD.narrow(1, 0, config.heads),
        kv_SAD.narrow(1, 0, config.kv_heads), kv_SAD.narrow(1, config.kv_heads, config.kv_heads), saved[2], saved[3],
        sequences.cumulative_queries, sequences.cumulative_keys, sequences.longest_queries, sequences.longest_keys,
        /*dropout_p=*/0.0, /*is_causal=*/true, saved[4], saved[5], config.scale, WindowLeft(config),
        WindowRight(config));
    at::Tensor grad_TAD = at::zeros_like(qkv_TAD);
    grad_TAD.narrow(1, 0, config.heads).copy_(gq);
    // A row of a shared prefix is a key of two sequences.
    grad_TAD.narrow(1, config.heads, 2 * config.kv_heads).index_add_(0, sequences.key_rows, at::cat({gk, gv}, 1));
    return {grad_TAD, at::Tensor(), at::Tensor()};
  }

 private:
  static std::optional<int64_t> WindowLeft(const AttentionConfig& config) {
    return config.window > 0 ? std::optional<int64_t>(config.window - 1) : std::nullopt;
  }
  static std::optional<int64_t> WindowRight(const AttentionConfig& config) {
    return config.window > 0 ? std::optional<int64_t>(0) : std::nullopt;
  }
};

AttentionPlan::Sequences SequencesOf(const std::vector<Segment>& segments, at::Device device) {
  AttentionPlan::Sequences sequences;
  std::vector<at::Tensor> rows;
  std::vector<int32_t> queries = {0}, keys = {0};
  for (const Segment& segment : segments) {
    if (segment.prefix > 0) rows.push_back(at::arange(segment.prefix_begin, segment.prefix_begin + segment.prefix));
    rows.push_back(at::arange(segment.begin, segment.begin + segment.count));
    queries.push_back(queries.back() + static_cast<int32_t>(segment.count));
    keys.push_back(keys.back() + static_cast<int32_t>(segment.length()));
    sequences.longest_queries = std::max(sequences.longest_queries, segment.count);
    sequences.longest_keys = std::max(sequences.longest_keys, segment.length());
  }
  sequences.key_rows = (rows.empty() ? at::empty({0}, at::kLong) : at::cat(rows).to(at::kLong)).to(device);
  sequences.cumulative_queries = at::tensor(queries, at::kInt).to(device);
  sequences.cumulative_keys = at::tensor(keys, at::kInt).to(device);
  return sequences;
}

}  // namespace

AttentionPlan::AttentionPlan(const std::vector<PackedPair>& pairs, const std::vector<int64_t>& windows,
                             at::ScalarType compute_dtype, at::Device device)
    : pairs_(pairs) {
  sequences_ = SequencesOf(Segments(*this), device);
  for (const PackedPair& pair : pairs) {
    longest_ = std::max(longest_, pair.prefix + std::max(pair.chosen_rest, pair.rejected_rest));
  }
  if (longest_ == 0) return;
  const int64_t queries = std::min(kMaxQueries, longest_);
  for (const int64_t window : windows) {
    const int64_t reach = (Hides(window, longest_) ? window : longest_) - 1;
    at::Tensor& band = bands_[window];
    if (band.defined()) continue;
    // Query i stands at column reach + i: hidden are the columns after it and those more than `reach` before.
    band = at::full({queries, reach + queries}, -std::numeric_limits<double>::infinity(),
                    at::TensorOptions().dtype(compute_dtype).device(device));
    band = band.triu(reach + 1) + band.tril(-1);
  }
}

at::Tensor AttentionPlan::Mask(int64_t window, int64_t first, int64_t queries, int64_t first_key) const {
  const at::Tensor& band = bands_.at(window);
  const int64_t reach = (Hides(window, longest_) ? window : longest_) - 1;
  return band.narrow(0, 0, queries).narrow(1, reach - (first - first_key), first + queries - first_key);
}

at::Tensor PairAttention(const at::Tensor& qkv, const AttentionConfig& config,
                         const std::shared_ptr<const AttentionPlan>& plan) {
  const bool half = qkv.scalar_type() == at::kBFloat16 || qkv.scalar_type() == at::kHalf;
  if (qkv.is_cuda() && half && config.softcap == 0 && qkv.size(0) > 0) {
    return VariableLengthFunction::apply(qkv, config, plan);
  }
  return AttentionFunction::apply(qkv, config, plan);
}

at::Tensor VariableLengthAttention(const at::Tensor& qkv, const AttentionConfig& config,
                                   const std::shared_ptr<const AttentionPlan>& plan) {
  return VariableLengthFunction::apply(qkv, config, plan);
}

}  // namespace simpo
