#include "worker/model/ops.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "worker/model/kernels_cpu.h"

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
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, const WeightRef& weight, double eps) {
    at::Tensor y = at::empty_like(x);
    at::Tensor rstd_T = at::empty({x.size(0)}, x.options().dtype(at::kFloat));
    kernels::RmsNorm(x, weight->value(), eps, y, rstd_T);
    ctx->save_for_backward({x, rstd_T});
    ctx->saved_data["weight"] = Save(weight);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const variable_list saved = ctx->get_saved_variables();
    at::Tensor gx = at::empty_like(saved[0]);
    const Weight& weight = Saved(ctx, "weight");
    kernels::RmsNormBackward(gradients[0].contiguous(), saved[0], weight.value(), saved[1], gx, weight.grad());
    return {gx, at::Tensor(), at::Tensor()};
  }
};

struct SwiGluFunction : Function<SwiGluFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& gate_up) {
    ctx->save_for_backward({gate_up});
    at::Tensor y = at::empty({gate_up.size(0), gate_up.size(1) / 2}, gate_up.options());
    kernels::SwiGlu(gate_up, y);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    const at::Tensor gate_up = ctx->get_saved_variables()[0];
    at::Tensor grad = at::empty_like(gate_up);
    kernels::SwiGluBackward(gradients[0].contiguous(), gate_up, grad);
    return {grad};
  }
};

struct RotaryFunction : Function<RotaryFunction> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x, int64_t heads, const at::Tensor& cos_TD,
                            const at::Tensor& sin_TD) {
    ctx->saved_data["heads"] = heads;
    ctx->saved_data["cos"] = cos_TD;
    ctx->saved_data["sin"] = sin_TD;
    at::Tensor y = at::empty_like(x, at::MemoryFormat::Contiguous);
    kernels::Rotary(x, heads, cos_TD, sin_TD, /*inverse=*/false, y);
    return y;
  }
  static variable_list backward(AutogradContext* ctx, variable_list gradients) {
    // A rotation's transpose is the rotation by the negative angle.
    const at::Tensor gy = gradients[0].contiguous();
    at::Tensor gx = at::empty_like(gy);
    kernels::Rotary(gy, ctx->saved_data["heads"].toInt(), ctx->saved_data["cos"].toTensor(),
                    ctx->saved_data["sin"].toTensor(), /*inverse=*/true, gx);
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

at::Tensor RmsNorm(const at::Tensor& x, const WeightRef& weight, double eps) {
  return RmsNormFunction::apply(x, weight, eps);
}

at::Tensor SwiGlu(const at::Tensor& gate_up) { return SwiGluFunction::apply(gate_up); }

at::Tensor ApplyRotary(const at::Tensor& x, int64_t heads, const at::Tensor& cos_TD, const at::Tensor& sin_TD) {
  return RotaryFunction::apply(x, heads, cos_TD, sin_TD);
}

at::Tensor Embed(const at::Tensor& table, const at::Tensor& ids) { return table.index_select(0, ids); }

void EmbedBackward(const at::Tensor& grad, const at::Tensor& ids, int64_t padding_id, at::Tensor table_grad) {
  at::Tensor rows = grad.to(table_grad.scalar_type());
  if (padding_id >= 0) rows = rows.masked_fill(ids.eq(padding_id).unsqueeze(1), 0);
  table_grad.index_add_(0, ids, rows);
}

}  // namespace simpo
