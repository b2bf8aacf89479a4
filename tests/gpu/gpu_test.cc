// The training step on GPUs against the same step on the CPU, over the real NCCL: what only a GPU can show. Needs
// torch, g++ and CMake and nothing else (preset cuda-step), so it brings its own few lines of a test runner.
//
//   gpu_test             one rank on each GPU of this machine
//   gpu_test --stand-in  linked with tests/worker/comm's stand-in for NCCL and CUDA: the same checks on host memory
#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <future>
#include <map>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "worker/adamw.h"
#include "worker/comm/collectives.h"
#include "worker/comm/cuda_calls.h"
#include "worker/lr_schedule.h"
#include "worker/model/decoder.h"
#include "worker/model/model_families.h"
#include "worker/pack.h"
#include "worker/sampler.h"
#include "worker/shard/sharded_params.h"
#include "worker/train_step.h"

namespace simpo {
namespace {

constexpr int kStandInRanks = 3;

bool g_stand_in = false;
int g_passed = 0, g_failed = 0;

void Check(const std::string& what, bool holds, const std::string& figure = "") {
  (holds ? g_passed : g_failed)++;
  std::printf("%-4s %s%s%s\n", holds ? "ok" : "FAIL", what.c_str(), figure.empty() ? "" : ": ", figure.c_str());
}
void CheckAtMost(const std::string& what, double figure, double bound) {
  char text[64];
  std::snprintf(text, sizeof(text), "%.2g (at most %g)", figure, bound);
  Check(what, figure <= bound, text);  // a NaN is not
}

at::Device DeviceOf(int rank) {
  return g_stand_in ? at::Device(at::kCPU) : at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(rank));
}

// Runs rank_main on a thread for each rank, each with its own GPU. An exception is a failure of `what`.
void RunRanks(const std::string& what, int ranks, const std::function<void(Collectives&)>& rank_main) {
  std::promise<std::string> id;
  const std::shared_future<std::string> shared = id.get_future().share();
  std::vector<std::string> errors(ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      try {
        at::set_num_threads(1);
        cuda::UseDevice(rank);
        const auto share = [&](const std::string& bytes) {
          if (rank == 0) id.set_value(bytes);
          return shared.get();
        };
        const std::chrono::seconds timeout(60);
        rank_main(*MakeNcclCollectives(rank, ranks, share, {.timeout = timeout, .connect_timeout = timeout}));
      } catch (const std::exception& error) {
        errors[rank] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int rank = 0; rank < ranks; ++rank) {
    if (!errors[rank].empty()) Check(what + " on rank " + std::to_string(rank), false, errors[rank]);
  }
}

// Whole numbers, so that sums are exact in every type and order.
void CheckVerbs(int ranks) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kDouble, at::kLong}) {
    const bool on_host = type == at::kDouble || type == at::kLong;  // votes and statistics; weights on the device
    std::vector<int> wrong(ranks);
    const std::string name = std::string("collectives of ") + at::toString(type) + (on_host ? " on the host" : "");
    RunRanks(name, ranks, [&](Collectives& comm) {
      const auto options =
          at::TensorOptions().dtype(type).device(on_host ? at::Device(at::kCPU) : DeviceOf(comm.rank()));
      const auto expect = [&](const at::Tensor& got, const at::Tensor& want) {
        wrong[comm.rank()] += at::equal(got.cpu(), want.cpu()) ? 0 : 1;
      };
      for (const int64_t slice : {1, 17, 4096, 1'000'003}) {
        const int64_t size = slice * ranks, begin = slice * comm.rank();
        const at::Tensor base = at::arange(size, options).remainder(7);
        const auto of_rank = [&](int64_t rank) { return base + rank; };
        const at::Tensor sum = base * ranks + ranks * (ranks - 1) / 2;

        at::Tensor tensor = of_rank(comm.rank());
        comm.AllReduce(tensor);
        expect(tensor, sum);
        if (!on_host) {
          tensor = of_rank(comm.rank());
          comm.ReduceScatter(tensor);
          expect(tensor.narrow(0, begin, slice), sum.narrow(0, begin, slice));
        }
        tensor = at::full({size}, -1, options);
        tensor.narrow(0, begin, slice).copy_(base.narrow(0, begin, slice));
        comm.AllGather(tensor);
        expect(tensor, base);
        tensor = of_rank(comm.rank());
        comm.Broadcast(tensor, ranks - 1);
        expect(tensor, of_rank(ranks - 1));

        // Two under way at once, with work of the device before, between and after.
        at::Tensor first = of_rank(comm.rank()), second = of_rank(0);
        Pending one = comm.BeginAllReduce(first);
        second.add_(comm.rank());
        Pending two = comm.BeginAllReduce(second);
        one.Wait();
        two.Wait();
        expect(first + second, sum * 2);
      }
      comm.Barrier();
    });
    const int total = std::accumulate(wrong.begin(), wrong.end(), 0);
    Check(name + " on " + std::to_string(ranks) + " ranks", total == 0,
          total == 0 ? "" : std::to_string(total) + " results are wrong");
  }
}

// A model of a family, small enough for a CPU in fp32 but with all that is particular to the family.
ModelConfig TinyModel(std::string_view model_type) {
  ModelConfig config = FamilyOf(model_type)->config;
  config.vocab_size = 331;
  config.hidden_size = 64;
  config.intermediate_size = 112;
  config.num_layers = 2;
  config.num_heads = 4;
  config.num_kv_heads = model_type == "olmo2" ? 4 : 2;
  config.head_dim = 16;
  config.max_position_embeddings = 512;
  if (model_type == "llama") {
    config.rope.type = "llama3";
    config.rope.factor = 8;
    config.rope.original_max_position_embeddings = 64;
  }
  if (model_type == "mistral" || model_type == "phi3") config.windows = {24, 24};
  if (model_type == "gemma2") config.windows = {24, 0};
  return config;
}

void FillWeights(const ModelConfig& config, ShardedParams& params) {
  at::Generator generator = at::detail::createCPUGenerator(7);
  const double norm_mean = config.norm_style == NormStyle::kOnePlusWeight ? 0 : 1;
  for (Bucket& bucket : params.buckets()) {
    for (const ParamSlot& slot : bucket.slots) {
      const bool norm = slot.spec.name.find("norm") != std::string::npos;
      const at::Tensor noise = at::randn(slot.spec.shape, generator, at::kFloat) * (norm ? 0.1 : 0.15);
      params.SetWeight(bucket, slot, norm ? noise + norm_mean : noise);
    }
  }
}

// Pairs of a conversation's form: a prompt in common, responses that part at once or later.
struct OwnedPair {
  std::vector<int32_t> chosen, rejected;
  int32_t prompt_length = 0;
  TokenizedPair view() const {
    return {.chosen = chosen,
            .rejected = rejected,
            .chosen_prompt_length = prompt_length,
            .rejected_prompt_length = prompt_length};
  }
};

std::vector<OwnedPair> MakePairs(int count, int64_t vocab_size) {
  std::vector<OwnedPair> pairs(count);
  uint64_t state = 12345;
  const auto next = [&](int64_t below) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    return static_cast<int32_t>((state >> 33) % static_cast<uint64_t>(below));
  };
  for (OwnedPair& pair : pairs) {
    const int32_t prompt = 3 + next(40), shared = prompt + next(4);
    for (int32_t i = 0; i < shared; ++i) pair.chosen.push_back(next(vocab_size));
    pair.rejected = pair.chosen;
    pair.prompt_length = prompt;
    for (int32_t i = 1 + next(50); i >= 0; --i) pair.chosen.push_back(next(vocab_size));
    for (int32_t i = 1 + next(50); i >= 0; --i) pair.rejected.push_back(next(vocab_size));
  }
  return pairs;
}

const SimpoLoss kLoss = {.beta = 2.5, .gamma_beta_ratio = 0.55, .label_smoothing = 0.05, .sft_weight = 0.1};

double Relative(double got, double want) { return std::abs(got - want) / std::max(1.0, std::abs(want)); }

// Loss and gradients of one batch on one rank.
struct LossAndGradients {
  double loss = 0;
  std::map<std::string, at::Tensor> gradients;  // fp64, on the host

  LossAndGradients(const ModelConfig& config, at::ScalarType dtype, at::Device device) {
    const std::unique_ptr<Collectives> alone = MakeSingleRankCollectives();
    ShardedParams params(config, {.compute_dtype = dtype, .zero_stage = 0, .device = device}, *alone);
    FillWeights(config, params);
    const std::vector<OwnedPair> owned = MakePairs(6, config.vocab_size);
    std::vector<TokenizedPair> pairs;
    GlobalBatchSize global = {.pairs = static_cast<double>(owned.size()), .chosen_tokens = 0};
    for (const OwnedPair& pair : owned) {
      pairs.push_back(pair.view());
      global.chosen_tokens += static_cast<double>(pair.chosen.size()) - pair.prompt_length;
    }
    const Decoder decoder(config, params);
    params.ZeroGrads();
    const PackedBatch batch = Pack(pairs, config.rope.SharedAnglesUpTo());
    const SimpoStats stats = ForwardBackward(decoder, params, batch, kLoss, global, false, /*last=*/true);
    params.FinishReduce();
    loss = stats.loss / global.pairs + kLoss.sft_weight * stats.nll_chosen / global.chosen_tokens;
    for (const Bucket& bucket : params.buckets()) {
      for (const ParamSlot& slot : bucket.slots) {
        gradients[slot.spec.name] = SlotOf(bucket.grads, slot).cpu().to(at::kDouble);
      }
    }
  }

  // The largest over the weights of ||got - want|| / ||want||; a gradient that is all but zero counts by the others.
  double LargestDistance(const LossAndGradients& want) const {
    double largest = 0, norm = 0;
    for (const auto& [name, gradient] : want.gradients) norm = std::max(norm, gradient.norm().item<double>());
    for (const auto& [name, gradient] : want.gradients) {
      const double distance = (gradients.at(name) - gradient).norm().item<double>();
      const double relative = distance / std::max(gradient.norm().item<double>(), 1e-3 * norm);
      largest = relative <= largest ? largest : relative;  // a NaN stays
    }
    return largest;
  }
  // ||got - want|| / ||want|| of all weights together.
  double Distance(const LossAndGradients& want) const {
    double error = 0, norm = 0;
    for (const auto& [name, gradient] : want.gradients) {
      error += (gradients.at(name) - gradient).pow(2).sum().item<double>();
      norm += gradient.pow(2).sum().item<double>();
    }
    return std::sqrt(error / norm);
  }
};

// Every family's loss and gradients: fp32 as on the CPU; bf16 (variable-length FlashAttention) near them.
void CheckFamilies() {
  for (const char* model_type : kModelTypes) {
    const ModelConfig config = TinyModel(model_type);
    const std::string name = model_type;
    const LossAndGradients want(config, at::kFloat, at::kCPU);
    const LossAndGradients fp32(config, at::kFloat, DeviceOf(0));
    CheckAtMost(name + " fp32, loss", Relative(fp32.loss, want.loss), 1e-5);
    CheckAtMost(name + " fp32, largest gradient", fp32.LargestDistance(want), 1e-4);
    const LossAndGradients bf16(config, at::kBFloat16, DeviceOf(0));
    CheckAtMost(name + " bf16, loss", Relative(bf16.loss, want.loss), 3e-2);
    CheckAtMost(name + " bf16, gradient", bf16.Distance(want), 6e-2);
  }
}

struct Layout {
  int zero_stage = 0;
  bool offload = false, gradient_checkpointing = false;
  at::ScalarType dtype = at::kFloat;
  at::ScalarType reduce_dtype = at::kFloat;

  std::string ToString() const {
    return "stage " + std::to_string(zero_stage) + (offload ? ", offload" : "") +
           (gradient_checkpointing ? ", gradient checkpointing" : "") + (dtype == at::kBFloat16 ? ", bf16" : "") +
           (reduce_dtype == at::kBFloat16 ? ", reduced in bf16" : "");
  }
};

struct StepNumbers {
  double loss = 0, grad_norm = 0;
};

// Some optimizer steps over global batches of 8 pairs in micro-batches of at most 160 tokens.
std::vector<StepNumbers> Train(const ModelConfig& config, const Layout& layout, int steps, at::Device device,
                               Collectives& comm) {
  ShardedParams params(config,
                       {.compute_dtype = layout.dtype,
                        .zero_stage = layout.zero_stage,
                        .reduce_dtype = layout.reduce_dtype,
                        .offload_optimizer = layout.offload,
                        .device = device,
                        .poison_released = true},
                       comm);
  FillWeights(config, params);
  const Decoder decoder(config, params);
  const std::vector<OwnedPair> owned = MakePairs(24, config.vocab_size);
  std::vector<TokenizedPair> data;
  for (const OwnedPair& pair : owned) data.push_back(pair.view());
  BatchSampler sampler(static_cast<int64_t>(data.size()), /*global_batch_size=*/8, /*seed=*/3, /*shuffle=*/true);
  const LrSchedule schedule = {.type = "cosine", .base = 2e-3, .warmup = 2, .total = steps};
  const AdamWOptions adamw = {.weight_decay = 0.01};
  std::vector<StepNumbers> numbers;
  for (int step = 0; step < steps; ++step) {
    const std::vector<int64_t> indices = sampler.Batch(step);
    GlobalBatchSize global = {.pairs = static_cast<double>(indices.size()), .chosen_tokens = 0};
    std::vector<int64_t> tokens;
    for (const int64_t i : indices) {
      global.chosen_tokens += static_cast<double>(data[i].chosen.size()) - data[i].chosen_prompt_length;
      tokens.push_back(PackedSize(data[i], config.rope.SharedAnglesUpTo()));
    }
    params.ZeroGrads();
    SimpoStats stats;
    const auto mine = MicroBatchesOfRank(indices, tokens, /*max_tokens=*/160, 0, comm.rank(), comm.world_size());
    for (const std::vector<int64_t>& micro_batch : mine) {
      std::vector<TokenizedPair> pairs;
      for (const int64_t i : micro_batch) pairs.push_back(data[i]);
      stats += ForwardBackward(decoder, params, Pack(pairs, config.rope.SharedAnglesUpTo()), kLoss, global,
                               layout.gradient_checkpointing, &micro_batch == &mine.back());
    }
    params.FinishReduce();
    const double grad_norm = GlobalGradNorm(params, comm);
    AdamWStep(params, adamw, schedule.Rate(step), ClipCoefficient(grad_norm, 1.0), step + 1);
    at::Tensor sums = at::tensor({stats.loss, stats.nll_chosen}, at::kDouble);
    comm.AllReduce(sums);
    numbers.push_back({.loss = sums[0].item<double>() / global.pairs +
                               kLoss.sft_weight * sums[1].item<double>() / global.chosen_tokens,
                       .grad_norm = grad_norm});
  }
  return numbers;
}

double LargestDifference(const std::vector<StepNumbers>& got, const std::vector<StepNumbers>& want) {
  if (got.size() != want.size()) return NAN;
  double largest = 0;
  for (size_t i = 0; i < want.size(); ++i) {
    for (const double difference :
         {Relative(got[i].loss, want[i].loss), Relative(got[i].grad_norm, want[i].grad_norm)}) {
      largest = difference <= largest ? largest : difference;
    }
  }
  return largest;
}

// Training runs in every layout: fp32 as one rank on the CPU, bf16 near it.
void CheckTraining(int ranks) {
  constexpr int kSteps = 20;
  const auto run = [&](const ModelConfig& config, const Layout& layout, const std::string& name) {
    std::vector<StepNumbers> numbers;
    RunRanks(name, ranks, [&](Collectives& comm) {
      const auto mine = Train(config, layout, kSteps, DeviceOf(comm.rank()), comm);
      if (comm.rank() == 0) numbers = mine;
    });
    return numbers;
  };
  for (const char* model_type : {"llama", "gemma2"}) {  // own head, and tied embeddings with a softcap
    const ModelConfig config = TinyModel(model_type);
    const std::unique_ptr<Collectives> alone = MakeSingleRankCollectives();
    const std::vector<StepNumbers> want = Train(config, {}, kSteps, at::kCPU, *alone);
    for (int stage = 0; stage <= 3; ++stage) {
      for (const bool offload : {false, true}) {
        for (const bool checkpointing : {false, true}) {
          const Layout layout = {.zero_stage = stage, .offload = offload, .gradient_checkpointing = checkpointing};
          const std::string name =
              std::string(model_type) + ", " + std::to_string(ranks) + " ranks, " + layout.ToString();
          CheckAtMost(name, LargestDifference(run(config, layout, name), want), 1e-5);
        }
      }
    }
    const Layout bf16 = {.zero_stage = 3, .offload = true, .dtype = at::kBFloat16, .reduce_dtype = at::kBFloat16};
    const std::string name = std::string(model_type) + ", " + std::to_string(ranks) + " ranks, " + bf16.ToString();
    CheckAtMost(name, LargestDifference(run(config, bf16, name), want), 5e-2);
  }

  at::globalContext().setDeterministicAlgorithms(true, /*warn_only=*/false);
  const ModelConfig config = TinyModel("mistral");
  const Layout layout = {.zero_stage = 3, .gradient_checkpointing = true, .dtype = at::kBFloat16};
  const std::string name = "deterministic: two runs";
  const std::vector<StepNumbers> first = run(config, layout, name), second = run(config, layout, name);
  CheckAtMost(name, LargestDifference(second, first), 0);
  at::globalContext().setDeterministicAlgorithms(false, /*warn_only=*/false);
}

// A rank that leaves: the others are told, and do not wait for ever.
void CheckLostRank(int ranks) {
  if (ranks < 2) {
    std::printf("--   a lost rank: needs two GPUs, not checked\n");
    return;
  }
  std::vector<std::string> errors(ranks);
  const auto began = std::chrono::steady_clock::now();
  std::promise<std::string> id;
  const std::shared_future<std::string> shared = id.get_future().share();
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      cuda::UseDevice(rank);
      const auto share = [&](const std::string& bytes) {
        if (rank == 0) id.set_value(bytes);
        return shared.get();
      };
      try {
        const auto comm = MakeNcclCollectives(rank, ranks, share, {.timeout = std::chrono::seconds(2)});
        at::Tensor tensor = at::ones({64}, at::TensorOptions().dtype(at::kFloat).device(DeviceOf(rank)));
        comm->AllReduce(tensor);
        if (rank == 0) return;  // it never joins the next
        comm->AllReduce(tensor);
        at::Tensor on_host = at::ones({1}, at::kDouble);
        comm->AllReduce(on_host);
      } catch (const std::exception& error) {
        errors[rank] = error.what();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  for (int rank = 1; rank < ranks; ++rank) {
    Check("rank " + std::to_string(rank) + " is told that rank 0 is gone", !errors[rank].empty(), errors[rank]);
  }
  CheckAtMost("seconds until then", seconds, 45);
}

// What the tensors of a model take on the device is what ShardedParams says: a GPU's memory holds nothing else.
void CheckMemory() {
  if (g_stand_in) return;  // host memory has no such counter
  const auto requested = [] { return at::getDeviceAllocator(at::kCUDA)->getDeviceStats(0).requested_bytes[0].current; };
  ModelConfig config = TinyModel("qwen2");
  config.vocab_size = 32'000;
  config.hidden_size = 512;
  config.intermediate_size = 1'536;
  config.num_layers = 4;
  const std::unique_ptr<Collectives> alone = MakeSingleRankCollectives();
  for (const bool offload : {false, true}) {
    cuda::UseDevice(0);
    const int64_t before = requested();
    const ShardedParams params(
        config, {.compute_dtype = at::kBFloat16, .zero_stage = 2, .offload_optimizer = offload, .device = DeviceOf(0)},
        *alone);
    const ShardedParams::Bytes bytes = params.MemoryBytes();
    const int64_t want = bytes.weights + (offload ? 0 : bytes.grads + bytes.optimizer);
    CheckAtMost(std::string("device memory against the formula") + (offload ? ", offload" : ""),
                std::abs(static_cast<double>(requested() - before) / static_cast<double>(want) - 1), 0.01);
  }
}

int Main(int argc, char** argv) {
  g_stand_in = argc == 2 && std::strcmp(argv[1], "--stand-in") == 0;
  if (argc != 1 && !g_stand_in) {
    std::fprintf(stderr, "usage: gpu_test [--stand-in]\n");
    return 2;
  }
  setvbuf(stdout, nullptr, _IOLBF, 0);                            // a crash hides no line
  setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);  // what cuBLAS asks for to be deterministic
  const int devices = cuda::DeviceCount();
  if (devices == 0 || (!g_stand_in && !at::hasCUDA())) {
    std::fprintf(stderr, "gpu_test: no GPU is visible: see nvidia-smi and CUDA_VISIBLE_DEVICES\n");
    return 1;
  }
  const int ranks = g_stand_in ? kStandInRanks : devices;
  std::printf("%d ranks, %s\n", ranks, g_stand_in ? "on the stand-in" : "one GPU each");
  CheckVerbs(ranks);
  CheckFamilies();
  CheckTraining(ranks);
  CheckMemory();
  CheckLostRank(ranks);
  std::printf("%d passed, %d failed\n", g_passed, g_failed);
  return g_failed == 0 && g_passed > 0 ? 0 : 1;
}

}  // namespace
}  // namespace simpo

int main(int argc, char** argv) { return simpo::Main(argc, argv); }
