#include "worker/model/kernels_cpu.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <vector>

#include "worker/model/row_kernels.h"

namespace simpo {

// One namespace per instruction set that row_kernels.cc was compiled for.
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

enum class Level { kBaseline, kV3, kV4 };

Level DetectLevel() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("x86-64-v4")) return Level::kV4;
  if (__builtin_cpu_supports("x86-64-v3")) return Level::kV3;
#endif
  return Level::kBaseline;
}

}  // namespace

template <>
const RowKernels<float>& BestRowKernels<float>() {
#if defined(__x86_64__)
  static const Level level = DetectLevel();
  if (level == Level::kV4) return v4::kFloatKernels;
  if (level == Level::kV3) return v3::kFloatKernels;
#endif
  return baseline::kFloatKernels;
}

template <>
const RowKernels<Bf16Bits>& BestRowKernels<Bf16Bits>() {
#if defined(__x86_64__)
  static const Level level = DetectLevel();
  if (level == Level::kV4) return v4::kBf16Kernels;
  if (level == Level::kV3) return v3::kBf16Kernels;
#endif
  return baseline::kBf16Kernels;
}

namespace kernels {
namespace {

// About 32k elements a task: below that, waking a thread costs more than it brings.
int64_t GrainRows(int64_t row_size) { return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, row_size)); }

template <typename T>
T* Ptr(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Calls body.template operator()<T>() with the row type of `tensor`'s dtype.
template <typename Body>
void ForDtype(const at::Tensor& tensor, Body body) {
  TORCH_CHECK(tensor.is_cpu(), "a CPU kernel was given another device's tensor");
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return body.template operator()<float>();
    case at::kBFloat16:
      return body.template operator()<Bf16Bits>();
    default:
      TORCH_CHECK(false, "compute dtype ", tensor.scalar_type(), " is not supported");
  }
}

// Rows of the last dimension: those of one t lie side by side, the t at any distance.
struct Rows {
  int64_t per_t, size, stride, count;
  explicit Rows(const at::Tensor& x)
      : per_t(x.dim() == 3 ? x.size(1) : 1), size(x.size(-1)), stride(x.stride(0)), count(x.size(0) * per_t) {
    TORCH_CHECK(x.stride(-1) == 1 && (per_t == 1 || x.stride(1) == size), "rows of one t must lie together");
  }
  int64_t Offset(int64_t row) const { return row / per_t * stride + row % per_t * size; }
};

float Offset(NormStyle style) { return style == NormStyle::kOnePlusWeight ? 1.0f : 0.0f; }
bool RoundsFirst(NormStyle style) { return style == NormStyle::kRoundThenScale; }

}  // namespace

void RmsNorm(const at::Tensor& x, const at::Tensor& weight, NormStyle style, double eps, at::Tensor y,
             at::Tensor rstd) {
  const Rows in(x);
  const Rows out(y);
  ForDtype(x, [&]<typename T>() {
    const auto row = BestRowKernels<T>().rms_norm;
    at::parallel_for(0, in.count, GrainRows(in.size), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        Ptr<float>(rstd)[r] = row(Ptr<T>(x) + in.Offset(r), Ptr<T>(weight), Offset(style), RoundsFirst(style),
                                  static_cast<float>(eps), in.size, Ptr<T>(y) + out.Offset(r));
      }
    });
  });
}

void RmsNormBackward(const at::Tensor& gy, const at::Tensor& x, const at::Tensor& weight, NormStyle style,
                     const at::Tensor& rstd, at::Tensor gx, at::Tensor weight_grad) {
  const Rows grad(gy);
  const Rows in(x);
  const Rows out(gx);
  const int64_t size = in.size;
  // Each task sums its rows' share of the weight's gradient apart; the shares are added in order.
  const int64_t tasks = std::clamp<int64_t>(in.count / GrainRows(size), 1, at::get_num_threads());
  at::Tensor partial = at::zeros({tasks, size}, at::kFloat);
  ForDtype(x, [&]<typename T>() {
    const auto row = BestRowKernels<T>().rms_norm_backward;
    at::parallel_for(0, tasks, 1, [&](int64_t first, int64_t last) {
      for (int64_t task = first; task < last; ++task) {
        for (int64_t r = in.count * task / tasks; r < in.count * (task + 1) / tasks; ++r) {
          row(Ptr<T>(gy) + grad.Offset(r), Ptr<T>(x) + in.Offset(r), Ptr<T>(weight), Offset(style), Ptr<float>(rstd)[r],
              size, Ptr<T>(gx) + out.Offset(r), Ptr<float>(partial) + task * size);
        }
      }
    });
  });
  for (int64_t task = 0; task < tasks; ++task) weight_grad.add_(partial[task]);
}

void GatedActivation(const at::Tensor& gate_up, Activation activation, at::Tensor y) {
  const int64_t width = y.size(1);
  ForDtype(gate_up, [&]<typename T>() {
    const RowKernels<T>& table = BestRowKernels<T>();
    const auto row = activation == Activation::kSilu ? table.swiglu : table.geglu;
    at::parallel_for(0, y.size(0), GrainRows(width), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const T* gate = Ptr<T>(gate_up) + t * 2 * width;
        row(gate, gate + width, width, Ptr<T>(y) + t * width);
      }
    });
  });
}

void GatedActivationBackward(const at::Tensor& gy, const at::Tensor& gate_up, Activation activation,
                             at::Tensor grad_gate_up) {
  const int64_t width = gy.size(1);
  ForDtype(gate_up, [&]<typename T>() {
    const RowKernels<T>& table = BestRowKernels<T>();
    const auto row = activation == Activation::kSilu ? table.swiglu_backward : table.geglu_backward;
    at::parallel_for(0, gy.size(0), GrainRows(width), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const T* gate = Ptr<T>(gate_up) + t * 2 * width;
        T* grad = Ptr<T>(grad_gate_up) + t * 2 * width;
        row(Ptr<T>(gy) + t * width, gate, gate + width, width, grad, grad + width);
      }
    });
  });
}

void Rotary(const at::Tensor& x, int64_t heads, const at::Tensor& cos_TR, const at::Tensor& sin_TR, bool inverse,
            at::Tensor y) {
  const int64_t all_heads = x.size(1);
  const int64_t head_dim = x.size(2);
  const int64_t pairs = cos_TR.size(1);
  TORCH_CHECK(x.stride(2) == 1 && x.stride(1) == head_dim, "heads of a row must lie together");
  ForDtype(x, [&]<typename T>() {
    const auto rotate = BestRowKernels<T>().rotate;
    at::parallel_for(0, x.size(0), GrainRows(all_heads * head_dim), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const T* in = Ptr<T>(x) + t * x.stride(0);
        T* out = Ptr<T>(y) + t * all_heads * head_dim;
        for (int64_t h = 0; h < heads; ++h) {
          const T* head = in + h * head_dim;
          rotate(head, Ptr<float>(cos_TR) + t * pairs, Ptr<float>(sin_TR) + t * pairs, pairs, inverse ? -1.0f : 1.0f,
                 out + h * head_dim);
          std::copy(head + 2 * pairs, head + head_dim, out + h * head_dim + 2 * pairs);
        }
        std::copy(in + heads * head_dim, in + all_heads * head_dim, out + heads * head_dim);
      }
    });
  });
}

void SoftcapInPlace(at::Tensor logits, double cap) {
  const int64_t vocab = logits.size(1);
  ForDtype(logits, [&]<typename T>() {
    const auto row = BestRowKernels<T>().softcap;
    at::parallel_for(0, logits.size(0), GrainRows(vocab), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) row(Ptr<T>(logits) + n * vocab, vocab, static_cast<float>(cap));
    });
  });
}

void LogitStats(const at::Tensor& logits, at::Tensor lse_N, at::Tensor mean_N) {
  const int64_t vocab = logits.size(1);
  ForDtype(logits, [&]<typename T>() {
    const auto row = BestRowKernels<T>().logit_stats;
    at::parallel_for(0, logits.size(0), GrainRows(vocab), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        row(Ptr<T>(logits) + n * vocab, vocab, Ptr<float>(lse_N) + n, Ptr<float>(mean_N) + n);
      }
    });
  });
}

void ScaledSoftmaxInPlace(at::Tensor logits, const at::Tensor& lse_N, const at::Tensor& scale_N, double softcap) {
  const int64_t vocab = logits.size(1);
  const float inverse_cap = softcap > 0 ? static_cast<float>(1 / softcap) : 0.0f;
  ForDtype(logits, [&]<typename T>() {
    const auto row = BestRowKernels<T>().scaled_softmax;
    at::parallel_for(0, logits.size(0), GrainRows(vocab), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        row(Ptr<T>(logits) + n * vocab, vocab, Ptr<float>(lse_N)[n], Ptr<float>(scale_N)[n], inverse_cap);
      }
    });
  });
}

}  // namespace kernels
}  // namespace simpo
