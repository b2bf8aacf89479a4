// What a rank allocates, counted at the allocator: no rank ever holds a whole model under stage 3.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/CPUAllocator.h>
#include <gtest/gtest.h>

#include <cstdio>

#include "tests/worker/golden.h"
#include "tests/worker/io/test_files.h"
#include "tests/worker/io/thread_collectives.h"
#include "worker/model/read_model_config.h"
#include "worker/shard/export_hf.h"
#include "worker/shard/load_weights.h"
#include "worker/shard/sharded_params.h"

namespace simpo {
namespace {

thread_local int64_t t_live = 0;
thread_local int64_t t_peak = 0;

// Counts the bytes of this thread's tensors; each rank of a ThreadWorld is a thread.
class CountingAllocator final : public c10::Allocator {
 public:
  static void Install() {
    static CountingAllocator* allocator = new CountingAllocator(c10::GetDefaultCPUAllocator());  // lives for ever
    c10::SetCPUAllocator(allocator, /*priority=*/1);
  }
  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr inner = inner_->allocate(bytes);
    t_live += static_cast<int64_t>(bytes);
    t_peak = std::max(t_peak, t_live);
    void* data = inner.get();
    auto* block = new Block{std::move(inner), static_cast<int64_t>(bytes)};
    return {data, block, &Free, c10::DeviceType::CPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return nullptr; }
  void copy_data(void* to, const void* from, size_t count) const override { std::memcpy(to, from, count); }

 private:
  struct Block {
    c10::DataPtr inner;
    int64_t bytes;
  };
  explicit CountingAllocator(c10::Allocator* inner) : inner_(inner) {}
  static void Free(void* block) {
    t_live -= static_cast<Block*>(block)->bytes;
    delete static_cast<Block*>(block);
  }
  c10::Allocator* inner_;
};

// A model of 12 layers with files of its own, so that a rank's share is much less than the whole.
class Memory : public testing::Test {
 protected:
  void SetUp() override {
    CountingAllocator::Install();
    nlohmann::json json = nlohmann::json::parse(R"({
      "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 256, "hidden_size": 64,
      "intermediate_size": 128, "num_hidden_layers": 12, "num_attention_heads": 4, "num_key_value_heads": 2,
      "hidden_act": "silu", "max_position_embeddings": 64, "rms_norm_eps": 1e-05, "tie_word_embeddings": false,
      "torch_dtype": "float32", "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2})");
    WriteText(dir_ / "config.json", json.dump());
    config_ = ReadModelConfig(dir_.path()).value();
    std::vector<std::pair<std::string, at::Tensor>> tensors;
    for (const WeightSpec& spec : ModelWeights(config_)) {
      tensors.emplace_back(spec.name, at::randn(spec.shape));
    }
    ASSERT_TRUE(WriteSafetensors(dir_ / "model.safetensors", tensors, {}).ok());
  }

  TempDir dir_;
  ModelConfig config_;
};

TEST_F(Memory, LoadingAndExportStayWithinOneBucketOfTheShare) {
  const int64_t whole = config_.NumParameters() * 4;
  for (const int ranks : {2, 4}) {
    ThreadWorld::Run(ranks, [&](Collectives& comm) {
      at::set_num_threads(1);
      t_live = t_peak = 0;
      ShardedParams params(config_, {.zero_stage = 3}, comm);
      int64_t largest = 0;
      for (const Bucket& bucket : params.buckets()) largest = std::max(largest, bucket.numel * 4);
      const ShardedParams::Bytes bytes = params.MemoryBytes();
      const int64_t share = bytes.weights + bytes.grads + bytes.optimizer;
      {
        const auto reader = ModelWeightsReader::Open(dir_.path()).value();
        EXPECT_TRUE(LoadWeights(*reader, params).ok());
      }
      EXPECT_LE(t_peak, share + largest) << "loading, rank " << comm.rank();
      const int64_t after_load = t_peak;
      const absl::Status status = ExportHf(dir_ / "final", params, config_, dir_.path(), dir_.path(), "", comm);
      EXPECT_TRUE(status.ok()) << status;
      EXPECT_LE(t_peak, share + largest) << "export, rank " << comm.rank();
      EXPECT_LT(bytes.weights + largest, whole);
      if (comm.rank() == 0) {
        std::printf("%d ranks: share %ld bytes, largest bucket %ld, peak at loading %ld, at export %ld\n", ranks, share,
                    largest, after_load, t_peak);
      }
    });
  }
}

}  // namespace
}  // namespace simpo
