#include "worker/model/kernels_aten.h"

#include <ATen/ATen.h>

#include <numbers>

namespace simpo::kernels_aten {
namespace {

// rstd as [T, N, 1] or [T, 1], beside x.
at::Tensor Beside(const at::Tensor& rstd, const at::Tensor& x) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = 1;
  return rstd.view(shape);
}

// What x / rms is multiplied by.
at::Tensor Scale(const at::Tensor& weight, NormStyle style) {
  const at::Tensor scale = weight.to(at::kFloat);
  return style == NormStyle::kOnePlusWeight ? scale + 1 : scale;
}

// The sigmoid whose product with the gate is the activation: of the gate itself, or gelu's in its tanh form.
constexpr double kCubic = 0.044715;
const double kTwiceRoot = 2 * std::sqrt(2 / std::numbers::pi);
at::Tensor Gate(const at::Tensor& gate, Activation activation) {
  if (activation == Activation::kSilu) return gate.sigmoid();
  return ((gate + kCubic * gate.pow(3)) * kTwiceRoot).sigmoid();
}

}  // namespace

void RmsNorm(const at::Tensor& x, const at::Tensor& weight, NormStyle style, double eps, at::Tensor y,
             at::Tensor rstd) {
  const at::Tensor x32 = x.to(at::kFloat);
  const at::Tensor root = (x32.pow(2).mean(-1, /*keepdim=*/true) + eps).rsqrt();
  Beside(rstd, x).copy_(root);
  at::Tensor normed = x32 * root;
  if (style == NormStyle::kRoundThenScale) normed = normed.to(x.scalar_type()).to(at::kFloat);
  y.copy_(normed * Scale(weight, style));
}

void RmsNormBackward(const at::Tensor& gy, const at::Tensor& x, const at::Tensor& weight, NormStyle style,
                     const at::Tensor& rstd, at::Tensor gx, at::Tensor weight_grad) {
  const at::Tensor root = Beside(rstd, x);
  const at::Tensor normed = x.to(at::kFloat) * root;
  const at::Tensor gy32 = gy.to(at::kFloat);
  const at::Tensor scaled = gy32 * Scale(weight, style);
  gx.copy_(root * (scaled - normed * (scaled * normed).mean(-1, /*keepdim=*/true)));
  weight_grad.add_((gy32 * normed).flatten(0, -2).sum(0));
}

void GatedActivation(const at::Tensor& gate_up, Activation activation, at::Tensor y) {
  const std::vector<at::Tensor> halves = gate_up.to(at::kFloat).chunk(2, 1);
  y.copy_(halves[0] * Gate(halves[0], activation) * halves[1]);
}

void GatedActivationBackward(const at::Tensor& gy, const at::Tensor& gate_up, Activation activation,
                             at::Tensor grad_gate_up) {
  const std::vector<at::Tensor> halves = gate_up.to(at::kFloat).chunk(2, 1);
  const at::Tensor& gate = halves[0];
  const at::Tensor sigmoid = Gate(gate, activation);
  const at::Tensor gy32 = gy.to(at::kFloat);
  at::Tensor slope = gate * (1 - sigmoid);
  if (activation == Activation::kGeluTanh) slope = slope * (kTwiceRoot * (1 + 3 * kCubic * gate.pow(2)));
  const std::vector<at::Tensor> grads = grad_gate_up.chunk(2, 1);
  grads[0].copy_(gy32 * halves[1] * sigmoid * (1 + slope));
  grads[1].copy_(gy32 * gate * sigmoid);
}

void Rotary(const at::Tensor& x, int64_t heads, const at::Tensor& cos_TR, const at::Tensor& sin_TR, bool inverse,
            at::Tensor y) {
  const int64_t pairs = cos_TR.size(1);
  const at::Tensor cos = cos_TR.unsqueeze(1);
  const at::Tensor sin = inverse ? -sin_TR.unsqueeze(1) : sin_TR.unsqueeze(1);
  const at::Tensor turned = x.narrow(1, 0, heads).narrow(2, 0, 2 * pairs).to(at::kFloat);
  const at::Tensor a = turned.narrow(2, 0, pairs);
  const at::Tensor b = turned.narrow(2, pairs, pairs);
  y.copy_(x);
  y.narrow(1, 0, heads).narrow(2, 0, pairs).copy_(a * cos - b * sin);
  y.narrow(1, 0, heads).narrow(2, pairs, pairs).copy_(b * cos + a * sin);
}

void SoftcapInPlace(at::Tensor logits, double cap) { logits.copy_((logits.to(at::kFloat) / cap).tanh() * cap); }

void LogitStats(const at::Tensor& logits, at::Tensor lse_N, at::Tensor mean_N) {
  const at::Tensor values = logits.to(at::kFloat);
  lse_N.copy_(values.logsumexp(1));
  mean_N.copy_(values.mean(1));
}

void ScaledSoftmaxInPlace(at::Tensor logits, const at::Tensor& lse_N, const at::Tensor& scale_N, double softcap) {
  const at::Tensor values = logits.to(at::kFloat);
  at::Tensor result = (values - lse_N.unsqueeze(1)).exp() * scale_N.unsqueeze(1);
  if (softcap > 0) result = result * (1 - (values / softcap).pow(2));
  logits.copy_(result);
}

}  // namespace simpo::kernels_aten
