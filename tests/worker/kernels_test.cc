// Each one-pass kernel against plain ATen in fp64, in fp32 and bf16, on row sizes that no vector width
// divides, with one thread and with several; and each instruction set against the others.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "worker/model/kernels_aten.h"
#include "worker/model/kernels_cpu.h"
#include "worker/model/row_kernels.h"

namespace simpo {
#define SIMPO_DECLARE(ns)                         \
  namespace ns {                                  \
  extern const RowKernels<float> kFloatKernels;   \
  extern const RowKernels<Bf16Bits> kBf16Kernels; \
  }
SIMPO_DECLARE(baseline)
#if defined(__x86_64__)
SIMPO_DECLARE(v3)
SIMPO_DECLARE(v4)
#endif
#undef SIMPO_DECLARE

namespace {

struct Param {
  at::ScalarType dtype;
  int threads;
};

class Kernels : public testing::TestWithParam<Param> {
 protected:
  void SetUp() override { at::set_num_threads(GetParam().threads); }
  void TearDown() override { at::set_num_threads(1); }

  static void ForEachShape(const std::function<void(int64_t rows, int64_t size)>& check) {
    for (const int64_t size : {2, 6, 34, 130, 576}) {
      for (const int64_t rows : {1, 5, 300}) {
        SCOPED_TRACE(testing::Message() << rows << " x " << size);
        check(rows, size);
      }
    }
  }

  at::Tensor Random(at::IntArrayRef shape, double scale = 1) {
    return (at::randn(shape, generator_, at::kDouble) * scale).to(GetParam().dtype);
  }
  at::Tensor Empty(at::IntArrayRef shape) { return at::full(shape, NAN, at::TensorOptions(GetParam().dtype)); }
  // Within rounding of the row type. `terms`: how many products an element sums up; `roundings`: of bf16, that may
  // differ.
  void ExpectClose(const at::Tensor& got, const at::Tensor& want_fp64, int64_t terms = 1, int roundings = 1) const {
    const bool bf16 = got.scalar_type() == at::kBFloat16;
    const double unit = bf16 ? 0.0079 * roundings : 2e-6 * std::sqrt(static_cast<double>(terms));
    const double scale = want_fp64.abs().max().item<double>();
    const double smallest = unit * scale * (bf16 ? 0.02 : 1);
    const at::Tensor difference = (got.to(at::kDouble) - want_fp64).abs();
    if (at::allclose(got.to(at::kDouble), want_fp64, /*rtol=*/unit, /*atol=*/smallest)) return;
    const auto worst = (difference / (smallest + unit * want_fp64.abs())).argmax().item<int64_t>();
    ADD_FAILURE() << "element " << worst << " of " << got.sizes() << " is " << got.flatten()[worst].item<double>()
                  << ", not " << want_fp64.flatten()[worst].item<double>() << "; the largest has " << scale;
  }

  std::optional<at::Generator> generator_ = at::detail::createCPUGenerator(7);
};

INSTANTIATE_TEST_SUITE_P(, Kernels,
                         testing::Values(Param{at::kFloat, 1}, Param{at::kFloat, 3}, Param{at::kBFloat16, 1},
                                         Param{at::kBFloat16, 3}),
                         [](const auto& info) {
                           return std::string(info.param.dtype == at::kFloat ? "fp32" : "bf16") + "_" +
                                  std::to_string(info.param.threads) + "threads";
                         });

// fp64 form of a norm; where T rounds before it scales is rounding, which ExpectClose allows for.
at::Tensor PlainNorm(const at::Tensor& x, const at::Tensor& weight, NormStyle style, double eps) {
  const at::Tensor normed = x * (x.pow(2).mean(-1, true) + eps).rsqrt();
  return normed * (style == NormStyle::kOnePlusWeight ? weight + 1 : weight);
}

constexpr NormStyle kStyles[] = {NormStyle::kRoundThenScale, NormStyle::kScaleThenRound, NormStyle::kOnePlusWeight};

TEST_P(Kernels, RmsNorm) {
  ForEachShape([&](int64_t rows, int64_t size) {
    for (const NormStyle style : kStyles) {
      const double eps = 1e-5;
      const at::Tensor x = Random({rows, size}, 3);
      const at::Tensor weight = Random({size});
      at::Tensor y = Empty({rows, size});
      at::Tensor rstd_T = at::full({rows}, NAN, at::kFloat);
      kernels::RmsNorm(x, weight, style, eps, y, rstd_T);

      at::Tensor x64 = x.to(at::kDouble).requires_grad_(true);
      at::Tensor weight64 = weight.to(at::kDouble).requires_grad_(true);
      const at::Tensor y64 = PlainNorm(x64, weight64, style, eps);
      ExpectClose(y, y64.detach());
      const at::Tensor rstd64 = (x64.detach().pow(2).mean(-1) + eps).rsqrt();
      EXPECT_TRUE(at::allclose(rstd_T.to(at::kDouble), rstd64, 1e-5));

      const at::Tensor gy = Random({rows, size});
      at::Tensor gx = Empty({rows, size});
      at::Tensor weight_grad = at::ones({size}, at::kFloat);
      kernels::RmsNormBackward(gy, x, weight, style, rstd_T, gx, weight_grad);
      y64.backward(gy.to(at::kDouble));
      ExpectClose(gx, x64.grad(), size);
      ExpectClose(weight_grad - 1, weight64.grad(), rows);
    }
  });
}

// Norms of some of the heads that stand side by side in a row, in place between the others.
TEST_P(Kernels, RmsNormOfHeads) {
  constexpr int64_t kTokens = 37, kAll = 6, kFirst = 1, kHeads = 3, kSize = 10;
  const at::Tensor x = Random({kTokens, kAll, kSize});
  const at::Tensor weight = Random({kSize});
  at::Tensor y = x.clone();
  const auto heads = [](const at::Tensor& t) { return t.narrow(1, kFirst, kHeads); };
  at::Tensor rstd = at::full({kTokens * kHeads}, NAN, at::kFloat);
  kernels::RmsNorm(heads(x), weight, NormStyle::kScaleThenRound, 1e-5, heads(y), rstd);
  at::Tensor x64 = x.to(at::kDouble).requires_grad_(true);
  at::Tensor weight64 = weight.to(at::kDouble).requires_grad_(true);
  const at::Tensor y64 = PlainNorm(heads(x64), weight64, NormStyle::kScaleThenRound, 1e-5);
  ExpectClose(heads(y), y64.detach());
  EXPECT_TRUE(at::equal(y.narrow(1, 0, kFirst), x.narrow(1, 0, kFirst)));
  EXPECT_TRUE(at::equal(y.narrow(1, kFirst + kHeads, 2), x.narrow(1, kFirst + kHeads, 2)));

  const at::Tensor gy = Random({kTokens, kAll, kSize});
  at::Tensor gx = Empty({kTokens, kAll, kSize});
  at::Tensor weight_grad = at::zeros({kSize}, at::kFloat);
  kernels::RmsNormBackward(heads(gy), heads(x), weight, NormStyle::kScaleThenRound, rstd, heads(gx), weight_grad);
  y64.backward(heads(gy).to(at::kDouble));
  ExpectClose(heads(gx), heads(x64.grad()), kSize);
  ExpectClose(weight_grad, weight64.grad(), kTokens * kHeads);
}

// In bf16 the order of rounding and scaling shows in the last bit, and must be the family's own.
TEST(RmsNorm, RoundsWhereTheFamilyDoes) {
  const auto generator = at::detail::createCPUGenerator(11);
  const at::Tensor x = at::randn({64, 96}, generator, at::kDouble).to(at::kBFloat16);
  const at::Tensor weight = at::randn({96}, generator, at::kDouble).to(at::kBFloat16);
  const at::Tensor x32 = x.to(at::kFloat);
  const at::Tensor normed = x32 * (x32.pow(2).mean(-1, true) + 1e-6).rsqrt();
  const at::Tensor want[] = {weight * normed.to(at::kBFloat16), (weight.to(at::kFloat) * normed).to(at::kBFloat16),
                             ((weight.to(at::kFloat) + 1) * normed).to(at::kBFloat16)};
  for (int style = 0; style < 3; ++style) {
    at::Tensor y = at::empty_like(x);
    at::Tensor rstd = at::empty({64}, at::kFloat);
    kernels::RmsNorm(x, weight, kStyles[style], 1e-6, y, rstd);
    for (int other = 0; other < 3; ++other) {
      const int64_t different = y.ne(want[other]).sum().item<int64_t>();
      if (other == style) {
        EXPECT_LE(different, 6) << style;  // of 6144: sums in another order
      } else {
        EXPECT_GT(different, 200) << style << " is not " << other;
      }
    }
  }
}

TEST_P(Kernels, GatedActivation) {
  ForEachShape([&](int64_t rows, int64_t size) {
    for (const Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
      const at::Tensor gate_up = Random({rows, 2 * size}, 4);
      at::Tensor y = Empty({rows, size});
      kernels::GatedActivation(gate_up, activation, y);
      at::Tensor gate_up64 = gate_up.to(at::kDouble).requires_grad_(true);
      const at::Tensor gate64 = gate_up64.narrow(1, 0, size);
      const at::Tensor activated64 = activation == Activation::kSilu ? at::silu(gate64) : at::gelu(gate64, "tanh");
      const at::Tensor y64 = activated64 * gate_up64.narrow(1, size, size);
      ExpectClose(y, y64.detach());

      const at::Tensor gy = Random({rows, size});
      at::Tensor grad = Empty({rows, 2 * size});
      kernels::GatedActivationBackward(gy, gate_up, activation, grad);
      y64.backward(gy.to(at::kDouble));
      ExpectClose(grad, gate_up64.grad());
    }
  });
}

TEST_P(Kernels, Rotary) {
  ForEachShape([&](int64_t rows, int64_t size) {
    const int64_t heads = 5;
    const int64_t rotated = 3;
    const int64_t half = size > 2 && rows == 5 ? size / 4 : size / 2;  // a part of the head, or all of it
    // Rows further apart than their size, as views of a wider tensor are.
    const at::Tensor x = Random({rows, heads + 2, size}).narrow(1, 0, heads);
    const at::Tensor angles = Random({rows, half}).to(at::kFloat) * 3;
    for (const bool inverse : {false, true}) {
      at::Tensor y = Empty({rows, heads, size});
      kernels::Rotary(x, rotated, angles.cos(), angles.sin(), inverse, y);
      const at::Tensor x64 = x.to(at::kDouble);
      const at::Tensor cos = angles.to(at::kDouble).cos().unsqueeze(1);
      const at::Tensor sin = angles.to(at::kDouble).sin().unsqueeze(1) * (inverse ? -1 : 1);
      const at::Tensor a = x64.narrow(1, 0, rotated).narrow(2, 0, half);
      const at::Tensor b = x64.narrow(1, 0, rotated).narrow(2, half, half);
      ExpectClose(y.narrow(1, 0, rotated).narrow(2, 0, 2 * half), at::cat({a * cos - b * sin, b * cos + a * sin}, 2));
      EXPECT_TRUE(at::equal(y.narrow(2, 2 * half, size - 2 * half), x.narrow(2, 2 * half, size - 2 * half)));
      EXPECT_TRUE(at::equal(y.narrow(1, rotated, heads - rotated), x.narrow(1, rotated, heads - rotated)));
    }
  });
}

TEST_P(Kernels, LogitsToLossAndGradient) {
  ForEachShape([&](int64_t rows, int64_t size) {
    const int64_t vocab = 16 * size + 3;  // more than one block for the largest
    const at::Tensor logits = Random({rows, vocab}, 5);
    at::Tensor lse_N = at::full({rows}, NAN, at::kFloat);
    at::Tensor mean_N = at::full({rows}, NAN, at::kFloat);
    kernels::LogitStats(logits, lse_N, mean_N);
    const at::Tensor logits64 = logits.to(at::kDouble);
    EXPECT_TRUE(at::allclose(lse_N.to(at::kDouble), logits64.logsumexp(1), 2e-6, 2e-6));
    EXPECT_TRUE(at::allclose(mean_N.to(at::kDouble), logits64.mean(1), 1e-5, 1e-5));

    const at::Tensor scale_N = at::randn({rows}, generator_, at::kFloat);
    at::Tensor scaled = logits.clone();
    kernels::ScaledSoftmaxInPlace(scaled, lse_N, scale_N, /*softcap=*/0);
    ExpectClose(scaled, logits64.softmax(1) * scale_N.to(at::kDouble).unsqueeze(1), vocab);
  });
}

// The gradient of log sum exp through the softcap is what ScaledSoftmaxInPlace makes of the capped logits.
TEST_P(Kernels, Softcap) {
  ForEachShape([&](int64_t rows, int64_t size) {
    const double cap = 3;
    const at::Tensor logits = Random({rows, size}, 4);
    at::Tensor capped = logits.clone();
    kernels::SoftcapInPlace(capped, cap);
    at::Tensor logits64 = logits.to(at::kDouble).requires_grad_(true);
    const at::Tensor capped64 = (logits64 / cap).tanh() * cap;
    ExpectClose(capped, capped64.detach());

    at::Tensor lse_N = at::zeros({rows}, at::kFloat);
    at::Tensor mean_N = at::zeros({rows}, at::kFloat);
    kernels::LogitStats(capped, lse_N, mean_N);
    const at::Tensor scale_N = at::randn({rows}, generator_, at::kFloat);
    kernels::ScaledSoftmaxInPlace(capped, lse_N, scale_N, cap);
    capped64.logsumexp(1).backward(scale_N.to(at::kDouble));
    // 1 - (capped / cap)^2 near the cap is the difference of two rounded numbers.
    const double unit = GetParam().dtype == at::kBFloat16 ? 0.02 : 2e-5;
    EXPECT_TRUE(at::allclose(capped.to(at::kDouble), logits64.grad(), unit, unit));
  });
}

// Small logits keep their digits.
TEST(Softcap, NearZero) {
  at::Tensor logits = at::tensor({1e-6, -1e-4, 1e-2, 0.3, -0.5, 0.62, -0.63, 2.0, 0.0}, at::kFloat).unsqueeze(0);
  const at::Tensor want = logits.to(at::kDouble).tanh();
  kernels::SoftcapInPlace(logits, 1);
  EXPECT_TRUE(at::allclose(logits.to(at::kDouble), want, /*rtol=*/3e-7, /*atol=*/0)) << logits << want;
}

// Logits far from zero neither overflow nor vanish; a row of equal logits has a plain answer.
TEST(LogitStats, FarFromZero) {
  for (const double shift : {-3e4, -100.0, 0.0, 100.0, 3e4}) {
    at::Tensor logits = at::full({1, 64}, shift, at::kFloat);
    at::Tensor lse = at::zeros({1}, at::kFloat);
    at::Tensor mean = at::zeros({1}, at::kFloat);
    kernels::LogitStats(logits, lse, mean);
    EXPECT_NEAR(lse.item<double>() - shift, std::log(64.0), 4e-3);  // fp32 at 3e4
    EXPECT_FLOAT_EQ(mean.item<float>(), static_cast<float>(shift));
    const at::Tensor one = at::ones({1}, at::kFloat);
    kernels::ScaledSoftmaxInPlace(logits, lse, one, /*softcap=*/0);
    EXPECT_NEAR(logits.sum().item<double>(), 1, 4e-3);
  }
  // A NaN is not hidden: the run must stop on it.
  at::Tensor logits = at::zeros({1, 64}, at::kFloat);
  logits[0][40] = NAN;
  at::Tensor lse = at::zeros({1}, at::kFloat);
  at::Tensor mean = at::zeros({1}, at::kFloat);
  kernels::LogitStats(logits, lse, mean);
  EXPECT_TRUE(std::isnan(mean.item<float>()));
  EXPECT_TRUE(std::isnan(lse.item<float>()));
}

// The forms for other devices compute what the CPU's do, in fp32 to its rounding and in bf16 to a unit; norms to two,
// since some round before they scale too.
TEST_P(Kernels, AtenFormsAgree) {
  ForEachShape([&](int64_t rows, int64_t size) {
    const auto expect_same = [&](const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b,
                                 int roundings = 1) {
      for (size_t i = 0; i < a.size(); ++i) ExpectClose(a[i], b[i].to(at::kDouble), rows + size, roundings);
    };
    const at::Tensor x = Random({rows, 3, size}, 3);
    const at::Tensor gy = Random({rows, 3, size});
    const at::Tensor weight = Random({size});
    for (const NormStyle style : kStyles) {
      const auto run = [&](auto norm, auto backward) {
        std::vector<at::Tensor> out = {Empty({rows, 3, size}), at::zeros({3 * rows}, at::kFloat),
                                       Empty({rows, 3, size}), at::ones({size}, at::kFloat)};
        norm(x, weight, style, 1e-5, out[0], out[1]);
        backward(gy, x, weight, style, out[1], out[2], out[3]);
        return out;
      };
      expect_same(run(kernels_aten::RmsNorm, kernels_aten::RmsNormBackward),
                  run(kernels::RmsNorm, kernels::RmsNormBackward), /*roundings=*/2);
    }
    for (const Activation activation : {Activation::kSilu, Activation::kGeluTanh}) {
      const at::Tensor gate_up = Random({rows, 2 * size}, 4);
      const at::Tensor gy2 = Random({rows, size});
      const auto run = [&](auto gated, auto backward) {
        std::vector<at::Tensor> out = {Empty({rows, size}), Empty({rows, 2 * size})};
        gated(gate_up, activation, out[0]);
        backward(gy2, gate_up, activation, out[1]);
        return out;
      };
      expect_same(run(kernels_aten::GatedActivation, kernels_aten::GatedActivationBackward),
                  run(kernels::GatedActivation, kernels::GatedActivationBackward));
    }
    const at::Tensor angles = Random({rows, (size + 2) / 4}).to(at::kFloat);
    for (const bool inverse : {false, true}) {
      const auto run = [&](auto rotary) {
        std::vector<at::Tensor> out = {Empty({rows, 3, size})};
        rotary(x, 2, angles.cos(), angles.sin(), inverse, out[0]);
        return out;
      };
      expect_same(run(kernels_aten::Rotary), run(kernels::Rotary));
    }
    const at::Tensor scale = at::randn({rows}, generator_, at::kFloat);
    const auto score = [&](auto softcap, auto stats, auto softmax) {
      std::vector<at::Tensor> out = {gy.flatten(1).clone(), at::zeros({rows}, at::kFloat),
                                     at::zeros({rows}, at::kFloat), at::Tensor()};
      softcap(out[0], 2.0);
      stats(out[0], out[1], out[2]);
      out[3] = out[0].clone();
      softmax(out[3], out[1], scale, 2.0);
      return out;
    };
    expect_same(score(kernels_aten::SoftcapInPlace, kernels_aten::LogitStats, kernels_aten::ScaledSoftmaxInPlace),
                score(kernels::SoftcapInPlace, kernels::LogitStats, kernels::ScaledSoftmaxInPlace));
  });
}

#if defined(__x86_64__)
// Every instruction set of this processor computes what the baseline does.
TEST(RowKernels, AllInstructionSetsAgree) {
  const int64_t size = 131;
  const at::Tensor x = at::randn({size}, at::detail::createCPUGenerator(3), at::kFloat).mul_(3);
  const at::Tensor weight = at::randn({size}, at::detail::createCPUGenerator(4), at::kFloat);
  auto run = [&](const RowKernels<float>& table) {
    const auto* in = x.data_ptr<float>();
    const auto* w = weight.data_ptr<float>();
    at::Tensor out = at::zeros({14, size}, at::kFloat);
    auto row = [&](int64_t i) { return out.data_ptr<float>() + i * size; };
    const float rstd = table.rms_norm(in, w, 0.0f, true, 1e-5f, size, row(0));
    table.rms_norm_backward(w, in, w, 0.0f, rstd, size, row(1), row(2));
    table.rms_norm(in, w, 1.0f, false, 1e-5f, size, row(7));
    table.rms_norm_backward(w, in, w, 1.0f, rstd, size, row(8), row(9));
    table.swiglu(in, w, size, row(3));
    table.swiglu_backward(w, in, w, size, row(4), row(5));
    table.geglu(in, w, size, row(10));
    table.geglu_backward(w, in, w, size, row(11), row(12));
    out[13].copy_(x);
    table.softcap(row(13), size, 4.0f);
    out[6].copy_(x);
    float lse = 0;
    float mean = 0;
    table.logit_stats(in, size, &lse, &mean);
    table.scaled_softmax(row(6), size, lse, 2.0f, 0.1f);
    return at::cat({out.flatten(), at::tensor({rstd, lse, mean}, at::kFloat)});
  };
  const at::Tensor want = run(baseline::kFloatKernels);
  int compared = 0;
  if (__builtin_cpu_supports("x86-64-v3")) {
    EXPECT_TRUE(at::allclose(run(v3::kFloatKernels), want, 1e-5, 1e-5));
    ++compared;
  }
  if (__builtin_cpu_supports("x86-64-v4")) {
    EXPECT_TRUE(at::allclose(run(v4::kFloatKernels), want, 1e-5, 1e-5));
    ++compared;
  }
  if (compared == 0) GTEST_SKIP() << "this processor has only the baseline";
}
#endif

}  // namespace
}  // namespace simpo
