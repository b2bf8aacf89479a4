#include "worker/model/ops.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "worker/model/kernels_aten.h"

namespace simpo {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

// A weight among what an operation saves for its backward pass.
c10::IValue Save(const WeightRef& weight) { return c10::IValue::make_capsule(weight); }
const Weight& Saved(AutogradContext* ctx, const char* name) {
  return *c10::static_intrusive_pointer_cast<Weight>(ctx->saved_data[name].toCapsule());
}

struct LinearFunction : Function<LinearFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const WeightRef& weight, const WeightRef& bias) {
    ctx->save_for_backward({x});
    ctx->saved_data["weight"] = Save(weight);
    if (bias) ctx->saved_data["bias"] = Save(bias);
    return bias ? at::addmm(bias->value(), x, weight->value().t()) : at::mm(x, weight->value().t());
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const at::Tensor x = ctx->get_saved_variables()[0];
    const at::Tensor gy = gradients[0].contiguous();
    const Weight& weight = Saved(ctx, "weight");
    AccumulateWeightGrad(weight.grad(), gy, x);
    if (ctx->saved_data.count("bias") > 0) {
      at::Tensor bias_grad = Saved(ctx, "bias").grad();
      bias_grad.add_(gy.sum(0, /*keepdim=*/false, bias_grad.scalar_type()));
    }
    return {at::mm(gy, weight.value()), at::Tensor(), at::Tensor()};
  }
};

struct RmsNormFunction : Function<RmsNormFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const WeightRef& weight, NormStyle style,
                            double eps) {
    at::Tensor y = at::empty_like(x);
    at::Tensor rstd_T = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
    SIMPO_KERNEL(x, RmsNorm)(x, weight->value(), style, eps, y, rstd_T);
    ctx->save_for_backward({x, rstd_T});
    ctx->saved_data["weight"] = Save(weight);
    ctx->saved_data["style"] = static_cast<int64_t>(style);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& x = saved[0];
    at::Tensor gx = at::empty_like(x);
    const Weight& weight = Saved(ctx, "weight");
    const auto style = static_cast<NormStyle>(ctx->saved_data["style"].toInt());
    SIMPO_KERNEL(x, RmsNormBackward)(gradients[0].contiguous(), x, weight.value(), style, saved[1], gx, weight.grad());
    return {gx, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

// `count` heads of x [T, A, D] from `first`, as the rows [T, N, H] that a weight of H elements norms.
at::Tensor NormRows(const at::Tensor& x, int64_t first, int64_t count, const Weight& weight) {
  const int64_t size = weight.shape()[0];
  return x.narrow(1, first, count).view({x.size(0), count * x.size(2) / size, size});
}

struct QkNormsFunction : Function<QkNormsFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& qkv, int64_t heads, int64_t kv_heads,
                            const WeightRef& q_weight, const WeightRef& k_weight, NormStyle style, double eps) {
    at::Tensor y = at::empty_like(qkv);
    variable_list saved = {qkv};
    const auto norm = [&](int64_t first, int64_t count, const Weight& weight) {
      const at::Tensor x = NormRows(qkv, first, count, weight);
      saved.push_back(at::empty({x.size(0) * x.size(1)}, x.options().dtype(at::kFloat)));
      SIMPO_KERNEL(x, RmsNorm)(x, weight.value(), style, eps, NormRows(y, first, count, weight), saved.back());
    };
    norm(0, heads, *q_weight);
    norm(heads, kv_heads, *k_weight);
    y.narrow(1, heads + kv_heads, kv_heads).copy_(qkv.narrow(1, heads + kv_heads, kv_heads));
    ctx->save_for_backward(saved);
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["kv_heads"] = kv_heads;
    ctx->saved_data["q_weight"] = Save(q_weight);
    ctx->saved_data["k_weight"] = Save(k_weight);
    ctx->saved_data["style"] = static_cast<int64_t>(style);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const variable_list saved = ctx->get_saved_variables();
    const at::Tensor& qkv = saved[0];
    const at::Tensor gy = gradients[0].contiguous();
    const int64_t heads = ctx->saved_data["heads"].toInt();
    const int64_t kv_heads = ctx->saved_data["kv_heads"].toInt();
    const auto style = static_cast<NormStyle>(ctx->saved_data["style"].toInt());
    at::Tensor gx = at::empty_like(qkv);
    const auto norm = [&](int64_t first, int64_t count, const Weight& weight, const at::Tensor& rstd) {
      const auto rows = [&](const at::Tensor& x) { return NormRows(x, first, count, weight); };
      SIMPO_KERNEL(gy, RmsNormBackward)
      (rows(gy), rows(qkv), weight.value(), style, rstd, rows(gx), weight.grad());
    };
    norm(0, heads, Saved(ctx, "q_weight"), saved[1]);
    norm(heads, kv_heads, Saved(ctx, "k_weight"), saved[2]);
    gx.narrow(1, heads + kv_heads, kv_heads).copy_(gy.narrow(1, heads + kv_heads, kv_heads));
    return {gx, at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

struct GatedActivationFunction : Function<GatedActivationFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate_up, Activation activation) {
    ctx->save_for_backward({gate_up});
    ctx->saved_data["activation"] = static_cast<int64_t>(activation);
    at::Tensor y = at::empty({gate_up.size(0), gate_up.size(1) / 2}, gate_up.options());
    SIMPO_KERNEL(gate_up, GatedActivation)(gate_up, activation, y);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const at::Tensor gate_up = ctx->get_saved_variables()[0];
    const auto activation = static_cast<Activation>(ctx->saved_data["activation"].toInt());
    at::Tensor grad = at::empty_like(gate_up);
    SIMPO_KERNEL(gate_up, GatedActivationBackward)(gradients[0].contiguous(), gate_up, activation, grad);
    return {grad, at::Tensor()};
  }
};

struct RotaryFunction : Function<RotaryFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, int64_t heads, const at::Tensor& cos_TR,
                            const at::Tensor& sin_TR) {
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["cos"] = cos_TR;
    ctx->saved_data["sin"] = sin_TR;
    at::Tensor y = at::empty_like(x, at::MemoryFormat::Contiguous);
    SIMPO_KERNEL(x, Rotary)(x, heads, cos_TR, sin_TR, /*inverse=*/false, y);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    // A rotation's transpose is the rotation by the negative angle.
    const at::Tensor gy = gradients[0].contiguous();
    at::Tensor gx = at::empty_like(gy);
    SIMPO_KERNEL(gy, Rotary)
    (gy, ctx->saved_data["heads"].toInt(), ctx->saved_data["cos"].toTensor(), ctx->saved_data["sin"].toTensor(),
     /*inverse=*/true, gx);
    return {gx, at::Tensor(), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

void AccumulateWeightGrad(const at::Tensor& weight_grad, const at::Tensor& gy, const at::Tensor& x) {
  at::Tensor grad = weight_grad;
  if (x.scalar_type() == grad.scalar_type()) {
    grad.addmm_(gy.t(), x);
  } else {
    grad.add_(at::mm(gy.t(), x));
  }
}

at::Tensor Linear(const at::Tensor& x, const WeightRef& weight, const WeightRef& bias) {
  return LinearFunction::apply(x, weight, bias);
}

at::Tensor RmsNorm(const at::Tensor& x, const WeightRef& weight, NormStyle style, double eps) {
  return RmsNormFunction::apply(x, weight, style, eps);
}

at::Tensor QkNorms(const at::Tensor& qkv, int64_t heads, int64_t kv_heads, const WeightRef& q_weight,
                   const WeightRef& k_weight, NormStyle style, double eps) {
  return QkNormsFunction::apply(qkv, heads, kv_heads, q_weight, k_weight, style, eps);
}

at::Tensor GatedActivation(const at::Tensor& gate_up, Activation activation) {
  return GatedActivationFunction::apply(gate_up, activation);
}

at::Tensor ApplyRotary(const at::Tensor& x, int64_t heads, const at::Tensor& cos_TR, const at::Tensor& sin_TR) {
  return RotaryFunction::apply(x, heads, cos_TR, sin_TR);
}

at::Tensor Embed(const at::Tensor& table, const at::Tensor& ids) { return table.index_select(0, ids); }

void EmbedBackward(const at::Tensor& grad, const at::Tensor& ids, int64_t padding_id, at::Tensor table_grad) {
  at::Tensor rows = grad.to(table_grad.scalar_type());
  if (padding_id >= 0) rows = rows.masked_fill(ids.eq(padding_id).unsqueeze(1), 0);
  table_grad.index_add_(0, ids, rows);
}

}  // namespace simpo
