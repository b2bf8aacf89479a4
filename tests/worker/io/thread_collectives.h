#ifndef SIMPO_TESTS_WORKER_IO_THREAD_COLLECTIVES_H_
#define SIMPO_TESTS_WORKER_IO_THREAD_COLLECTIVES_H_

#include <ATen/ATen.h>

#include <barrier>
#include <functional>
#include <thread>
#include <vector>

#include "worker/comm/collectives.h"

namespace simpo {

// Ranks as threads of one process.
class ThreadWorld {
 public:
  explicit ThreadWorld(int size) : size_(size), barrier_(size), tensors_(size) {}

  // Runs `rank_main` once per rank and waits for all.
  static void Run(int size, const std::function<void(Collectives&)>& rank_main) {
    ThreadWorld world(size);
    std::vector<std::thread> threads;
    for (int rank = 0; rank < size; ++rank) {
      threads.emplace_back([&, rank] {
        Rank comm(world, rank);
        rank_main(comm);
      });
    }
    for (std::thread& thread : threads) thread.join();
  }

 private:
  class Rank final : public Collectives {
   public:
    Rank(ThreadWorld& world, int rank) : world_(world), rank_(rank) {}
    int rank() const override { return rank_; }
    int world_size() const override { return world_.size_; }

    void AllReduce(at::Tensor tensor) override {
      Share(tensor);
      at::Tensor sum = world_.tensors_[0].clone();
      for (int rank = 1; rank < world_.size_; ++rank) sum.add_(world_.tensors_[rank]);
      Barrier();  // all have read
      tensor.copy_(sum);
      Barrier();  // all have written: nobody shares the next tensor before
    }
    void ReduceScatter(at::Tensor tensor) override { AllReduce(tensor); }
    void AllGather(at::Tensor tensor) override {
      Share(tensor);
      const int64_t slice = tensor.numel() / world_.size_;
      for (int rank = 0; rank < world_.size_; ++rank) {
        if (rank == rank_) continue;
        tensor.narrow(0, rank * slice, slice).copy_(world_.tensors_[rank].narrow(0, rank * slice, slice));
      }
      Barrier();
    }
    void Broadcast(at::Tensor tensor, int root) override {
      Share(tensor);
      if (rank_ != root) tensor.copy_(world_.tensors_[root]);
      Barrier();
    }
    void Barrier() override { world_.barrier_.arrive_and_wait(); }

   private:
    void Share(const at::Tensor& tensor) {
      world_.tensors_[rank_] = tensor;
      Barrier();
    }
    ThreadWorld& world_;
    const int rank_;
  };

  const int size_;
  std::barrier<> barrier_;
  std::vector<at::Tensor> tensors_;  // what each rank has brought to the verb under way
};

}  // namespace simpo

#endif  // SIMPO_TESTS_WORKER_IO_THREAD_COLLECTIVES_H_
