#ifndef SIMPO_TESTS_WORKER_IO_SAVED_CHECKPOINTS_H_
#define SIMPO_TESTS_WORKER_IO_SAVED_CHECKPOINTS_H_

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>

#include "tests/worker/io/thread_collectives.h"
#include "tests/worker/io/tiny_model.h"
#include "worker/shard/checkpoint.h"
#include "worker/shard/sharded_params.h"

namespace simpo {

// Checkpoints of the tiny model whose every element is known.

// How a run holds its parameters.
struct Layout {
  int ranks = 1;
  int zero_stage = 1;
  at::ScalarType dtype = at::kFloat;
  bool offload = false;

  ShardingOptions Sharding() const {
    return {.compute_dtype = dtype, .zero_stage = zero_stage, .offload_optimizer = offload};
  }
};

// The value of element i of a tensor: any two differ, and none is exact in bf16.
inline at::Tensor Values(int64_t numel, double base) {
  return (at::arange(numel, at::kDouble).mul(1.0009e-4).add(base)).to(at::kFloat);
}

inline double BaseOf(size_t bucket, size_t slot, int part) {
  return 0.1 + static_cast<double>(bucket) + 0.01 * static_cast<double>(slot) + 100.0 * part;
}

inline at::Tensor& Part(Bucket& bucket, int part) {
  return part == 0 ? bucket.master : part == 1 ? bucket.exp_avg : bucket.exp_avg_sq;
}

// Calls f(this rank's piece of a slot, its first element in the slot, base value) for all state.
inline void ForEachPiece(ShardedParams& params, int rank,
                         const std::function<void(at::Tensor, int64_t, int64_t, double)>& f) {
  for (size_t b = 0; b < params.buckets().size(); ++b) {
    Bucket& bucket = params.buckets()[b];
    const int64_t mine = params.zero_stage() == 0 ? 0 : rank * bucket.shard_numel;
    for (size_t s = 0; s < bucket.slots.size(); ++s) {
      const ParamSlot& slot = bucket.slots[s];
      const int64_t begin = std::max(mine, slot.offset);
      const int64_t end = std::min(mine + bucket.master.numel(), slot.offset + slot.numel);
      if (begin >= end) continue;
      for (int part = 0; part < 3; ++part) {
        f(Part(bucket, part).narrow(0, begin - mine, end - begin), begin - slot.offset, slot.numel, BaseOf(b, s, part));
      }
    }
  }
}

inline void Fill(ShardedParams& params, int rank, double shift = 0) {
  ForEachPiece(params, rank, [&](at::Tensor piece, int64_t first, int64_t numel, double base) {
    piece.copy_(Values(numel, base + shift).narrow(0, first, piece.numel()));
  });
  params.SpreadAll();
}

inline void ExpectFilled(ShardedParams& params, int rank, double shift = 0) {
  int64_t elements = 0;
  ForEachPiece(params, rank, [&](at::Tensor piece, int64_t first, int64_t numel, double base) {
    elements += piece.numel();
    EXPECT_TRUE(at::equal(piece, Values(numel, base + shift).narrow(0, first, piece.numel())));
  });
  EXPECT_GT(elements, 0);
  params.GatherAll();
  for (size_t b = 0; b < params.buckets().size(); ++b) {
    const Bucket& bucket = params.buckets()[b];
    for (size_t s = 0; s < bucket.slots.size(); ++s) {
      const ParamSlot& slot = bucket.slots[s];
      const at::Tensor master = Values(slot.numel, BaseOf(b, s, 0) + shift);
      EXPECT_TRUE(at::equal(SlotOf(bucket.weights, slot).flatten(), master.to(params.compute_dtype())))
          << slot.spec.name;
    }
  }
}

inline TrainerState SomeState(int64_t step, double shift = 0) {
  return {.step = step,
          .steps_planned = 120,
          .global_batch_size = 8,
          .pairs_seen = 8 * step,
          .tokens_seen = 12345678901,
          .seed = -42,
          .extra = {{"best", 0.1 + 0.2},
                    {"shift", shift},
                    {"tiny", std::numeric_limits<double>::denorm_min()},
                    {"nan", std::nan("")},
                    {"inf", -std::numeric_limits<double>::infinity()}}};
}

inline void Save(const std::filesystem::path& dir, int64_t step, const Layout& layout, double shift = 0,
                 const ModelConfig& config = TinyConfig()) {
  ThreadWorld::Run(layout.ranks, [&](Collectives& comm) {
    ShardedParams params(config, layout.Sharding(), comm);
    Fill(params, comm.rank(), shift);
    const auto path = SaveCheckpoint(dir, params, SomeState(step, shift), comm);
    EXPECT_TRUE(path.ok()) << path.status();
  });
}

inline void ExpectLoads(const std::filesystem::path& path, const Layout& layout, double shift = 0) {
  ThreadWorld::Run(layout.ranks, [&](Collectives& comm) {
    ShardedParams params(TinyConfig(), layout.Sharding(), comm);
    const auto state = LoadCheckpoint(path, params, comm);
    ASSERT_TRUE(state.ok()) << state.status();
    ExpectFilled(params, comm.rank(), shift);
  });
}

}  // namespace simpo

#endif  // SIMPO_TESTS_WORKER_IO_SAVED_CHECKPOINTS_H_
