// Shape letters: T rows of the batch, Q query rows and S key rows of one segment, K key-value heads,
// G query heads per key-value head, D head size.
#include "worker/model/attention.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include <cmath>
#include <limits>
#include <optional>

namespace simpo {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

struct Heads {
  int64_t query, kv;
  int64_t group() const { return query / kv; }
  int64_t all() const { return query + 2 * kv; }
};

// Rows of q as [K, G, Q, D]: a view, no copy.
at::Tensor Queries(const at::Tensor& rows_TAD, Heads heads) {
  return rows_TAD.narrow(1, 0, heads.query).unflatten(1, {heads.kv, heads.group()}).permute({1, 2, 0, 3});
}
// Rows of k (which = 0) or v (which = 1) as [K, G, S, D], the same memory for all G.
at::Tensor KeysOrValues(const at::Tensor& rows_TAD, Heads heads, int64_t which) {
  return rows_TAD.narrow(1, heads.query + which * heads.kv, heads.kv)
      .permute({1, 0, 2})
      .unsqueeze(1)
      .expand({heads.kv, heads.group(), rows_TAD.size(0), rows_TAD.size(2)});
}

// One call of the attention kernel: queries at rows [begin, begin + count), keys at those rows and,
// before them, the `prefix` rows at prefix_begin.
struct Segment {
  int64_t begin, count, prefix_begin, prefix;
  std::optional<at::Tensor> mask;  // none: causal, and there is no prefix
};

std::vector<Segment> Segments(const AttentionPlan& plan) {
  std::vector<Segment> segments;
  for (size_t i = 0; i < plan.pairs.size(); ++i) {
    const PackedPair& pair = plan.pairs[i];
    const int64_t first = pair.prefix + pair.chosen_rest;
    if (first > 0) segments.push_back({pair.begin, first, 0, 0, std::nullopt});
    if (pair.rejected_rest > 0) {
      Segment& segment = segments.emplace_back(pair.begin + first, pair.rejected_rest, pair.begin, pair.prefix);
      if (pair.prefix > 0) segment.mask = plan.rejected_masks[i];
    }
  }
  return segments;
}

// The rows that a segment's keys and values come from.
at::Tensor KeyRows(const at::Tensor& qkv_TAD, const Segment& segment) {
  const at::Tensor own = qkv_TAD.narrow(0, segment.begin, segment.count);
  if (segment.prefix == 0) return own;
  return at::cat({qkv_TAD.narrow(0, segment.prefix_begin, segment.prefix), own});
}

struct AttentionFunction : Function<AttentionFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& qkv_TAD, int64_t query_heads, int64_t kv_heads,
                            const std::shared_ptr<const AttentionPlan>& plan) {
    const Heads heads{query_heads, kv_heads};
    at::Tensor out_TAD = at::empty({qkv_TAD.size(0), heads.query, qkv_TAD.size(2)}, qkv_TAD.options());
    variable_list saved = {qkv_TAD, out_TAD};
    for (const Segment& segment : Segments(*plan)) {
      const at::Tensor keys = KeyRows(qkv_TAD, segment);
      auto [out, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
          Queries(qkv_TAD.narrow(0, segment.begin, segment.count), heads), KeysOrValues(keys, heads, 0),
          KeysOrValues(keys, heads, 1), /*dropout_p=*/0.0, /*is_causal=*/!segment.mask.has_value(), segment.mask);
      Queries(out_TAD.narrow(0, segment.begin, segment.count), heads).copy_(out);
      saved.push_back(lse);
    }
    ctx->save_for_backward(saved);
    ctx->saved_data["query_heads"] = query_heads;
    ctx->saved_data["kv_heads"] = kv_heads;
    ctx->saved_data["plan"] = c10::IValue::make_capsule(c10::make_intrusive<PlanHolder>(plan));
    return out_TAD.flatten(1);
  }

  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const Heads heads{ctx->saved_data["query_heads"].toInt(), ctx->saved_data["kv_heads"].toInt()};
    const at::Tensor& qkv_TAD = saved[0];
    const at::Tensor& out_TAD = saved[1];
    const at::Tensor gy_TAD = gradients[0].reshape(out_TAD.sizes());
    const auto plan = c10::static_intrusive_pointer_cast<PlanHolder>(ctx->saved_data["plan"].toCapsule())->plan;
    at::Tensor grad_TAD = at::zeros_like(qkv_TAD);
    size_t next = 2;
    for (const Segment& segment : Segments(*plan)) {
      const at::Tensor keys = KeyRows(qkv_TAD, segment);
      auto rows = [&](const at::Tensor& x) { return Queries(x.narrow(0, segment.begin, segment.count), heads); };
      auto [gq, gk, gv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
          rows(gy_TAD), rows(qkv_TAD), KeysOrValues(keys, heads, 0), KeysOrValues(keys, heads, 1), rows(out_TAD),
          saved[next++], /*dropout_p=*/0.0, /*is_causal=*/!segment.mask.has_value(), segment.mask);
      rows(grad_TAD).copy_(gq);
      for (const auto& [which, grad] : {std::pair(0, gk), std::pair(1, gv)}) {
        const at::Tensor sum_SKD = grad.sum(1).permute({1, 0, 2});
        const at::Tensor place = grad_TAD.narrow(1, heads.query + which * heads.kv, heads.kv);
        place.narrow(0, segment.begin, segment.count).add_(sum_SKD.narrow(0, segment.prefix, segment.count));
        if (segment.prefix > 0) {
          place.narrow(0, segment.prefix_begin, segment.prefix).add_(sum_SKD.narrow(0, 0, segment.prefix));
        }
      }
    }
    return {grad_TAD, at::Tensor(), at::Tensor(), at::Tensor()};
  }

 private:
  struct PlanHolder : torch::CustomClassHolder {
    explicit PlanHolder(std::shared_ptr<const AttentionPlan> p) : plan(std::move(p)) {}
    std::shared_ptr<const AttentionPlan> plan;
  };
};

}  // namespace

AttentionPlan::AttentionPlan(const std::vector<PackedPair>& pairs, at::ScalarType compute_dtype) : pairs(pairs) {
  const double minus_infinity = -std::numeric_limits<double>::infinity();
  for (const PackedPair& pair : pairs) {
    at::Tensor& mask = rejected_masks.emplace_back();
    if (pair.rejected_rest == 0) continue;
    mask = at::full({pair.rejected_rest, pair.prefix + pair.rejected_rest}, minus_infinity,
                    at::TensorOptions().dtype(compute_dtype))
               .triu(pair.prefix + 1);
  }
}

at::Tensor PairAttention(const at::Tensor& qkv, int64_t heads, int64_t kv_heads,
                         const std::shared_ptr<const AttentionPlan>& plan) {
  return AttentionFunction::apply(qkv, heads, kv_heads, plan);
}

}  // namespace simpo
