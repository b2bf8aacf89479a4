// Each one-pass kernel against plain ATen in fp64, in fp32 and bf16, on row sizes that no vector width
// divides, with one thread and with several; and each instruction set against the others.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <optional>
#include <string>

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
  // Within rounding of the row type. `terms`: how many products an element sums up.
  void ExpectClose(const at::Tensor& got, const at::Tensor& want_fp64, int64_t terms = 1) const {
    const bool bf16 = got.scalar_type() == at::kBFloat16;
    const double unit = bf16 ? 0.0079 : 2e-6 * std::sqrt(static_cast<double>(terms));
    const double scale = want_fp64.abs().max().item<double>();
    EXPECT_TRUE(at::allclose(got.to(at::kDouble), want_fp64, /*rtol=*/unit, /*atol=*/unit * scale * (bf16 ? 0.02 : 1)))
        << "largest difference " << (got.to(at::kDouble) - want_fp64).abs().max().item<double>() << " of " << scale;
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

TEST_P(Kernels, RmsNorm) {
  ForEachShape([&](int64_t rows, int64_t size) {
    const double eps = 1e-5;
    const at::Tensor x = Random({rows, size}, 3);
    const at::Tensor weight = Random({size});
    at::Tensor y = Empty({rows, size});
    at::Tensor rstd_T = at::full({rows}, NAN, at::kFloat);
    kernels::RmsNorm(x, weight, eps, y, rstd_T);

    at::Tensor x64 = x.to(at::kDouble).requires_grad_(true);
    at::Tensor weight64 = weight.to(at::kDouble).requires_grad_(true);
    const at::Tensor rstd64 = (x64.pow(2).mean(-1, true) + eps).rsqrt();
    const at::Tensor y64 = x64 * rstd64 * weight64;
    ExpectClose(y, y64.detach());
    EXPECT_TRUE(at::allclose(rstd_T.to(at::kDouble), rstd64.detach().squeeze(1), 1e-5));

    const at::Tensor gy = Random({rows, size});
    at::Tensor gx = Empty({rows, size});
    at::Tensor weight_grad = at::ones({size}, at::kFloat);
    kernels::RmsNormBackward(gy, x, weight, rstd_T, gx, weight_grad);
    y64.backward(gy.to(at::kDouble));
    ExpectClose(gx, x64.grad(), size);
    ExpectClose(weight_grad - 1, weight64.grad(), rows);
  });
}

TEST_P(Kernels, SwiGlu) {
  ForEachShape([&](int64_t rows, int64_t size) {
    const at::Tensor gate_up = Random({rows, 2 * size}, 4);
    at::Tensor y = Empty({rows, size});
    kernels::SwiGlu(gate_up, y);
    at::Tensor gate_up64 = gate_up.to(at::kDouble).requires_grad_(true);
    const at::Tensor y64 = at::silu(gate_up64.narrow(1, 0, size)) * gate_up64.narrow(1, size, size);
    ExpectClose(y, y64.detach());

    const at::Tensor gy = Random({rows, size});
    at::Tensor grad = Empty({rows, 2 * size});
    kernels::SwiGluBackward(gy, gate_up, grad);
    y64.backward(gy.to(at::kDouble));
    ExpectClose(grad, gate_up64.grad());
  });
}

TEST_P(Kernels, Rotary) {
  ForEachShape([&](int64_t rows, int64_t size) {
    const int64_t heads = 5;
    const int64_t rotated = 3;
    const int64_t half = size / 2;
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
      ExpectClose(y.narrow(1, 0, rotated), at::cat({a * cos - b * sin, b * cos + a * sin}, 2));
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
    kernels::ScaledSoftmaxInPlace(scaled, lse_N, scale_N);
    ExpectClose(scaled, logits64.softmax(1) * scale_N.to(at::kDouble).unsqueeze(1), vocab);
  });
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
    kernels::ScaledSoftmaxInPlace(logits, lse, one);
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

#if defined(__x86_64__)
// Every instruction set of this processor computes what the baseline does.
TEST(RowKernels, AllInstructionSetsAgree) {
  const int64_t size = 131;
  const at::Tensor x = at::randn({size}, at::detail::createCPUGenerator(3), at::kFloat).mul_(3);
  const at::Tensor weight = at::randn({size}, at::detail::createCPUGenerator(4), at::kFloat);
  auto run = [&](const RowKernels<float>& table) {
    const auto* in = x.data_ptr<float>();
    const auto* w = weight.data_ptr<float>();
    at::Tensor out = at::zeros({7, size}, at::kFloat);
    auto row = [&](int64_t i) { return out.data_ptr<float>() + i * size; };
    const float rstd = table.rms_norm(in, w, 1e-5f, size, row(0));
    table.rms_norm_backward(w, in, w, rstd, size, row(1), row(2));
    table.swiglu(in, w, size, row(3));
    table.swiglu_backward(w, in, w, size, row(4), row(5));
    out[6].copy_(x);
    float lse = 0;
    float mean = 0;
    table.logit_stats(in, size, &lse, &mean);
    table.scaled_softmax(row(6), size, lse, 2.0f);
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
