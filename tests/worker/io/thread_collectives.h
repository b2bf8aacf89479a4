#ifndef SIMPO_TESTS_WORKER_IO_THREAD_COLLECTIVES_H_
#define SIMPO_TESTS_WORKER_IO_THREAD_COLLECTIVES_H_

#include <ATen/ATen.h>

#include <barrier>
#include <cmath>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "worker/comm/collectives.h"

namespace simpo {

// Ranks as threads of one process. What is begun is carried out as late as can be, when it or a later
// verb is waited for: a rank that reads too early sees it.
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

    Pending BeginAllReduce(at::Tensor tensor) override {
      sent_.all_reduce += 2 * ShareOfOthers(tensor);
      return Begin([this, tensor] { SumOverRanks(tensor); });
    }
    Pending BeginReduceScatter(at::Tensor tensor) override {
      sent_.reduce_scatter += ShareOfOthers(tensor);
      return Begin([this, tensor] {
        SumOverRanks(tensor);
        // Only the own slice is defined.
        const int64_t slice = tensor.numel() / world_.size_;
        for (int rank = 0; rank < world_.size_; ++rank) {
          if (rank != rank_) tensor.narrow(0, rank * slice, slice).fill_(std::nan(""));
        }
      });
    }
    Pending BeginAllGather(at::Tensor tensor) override {
      sent_.all_gather += ShareOfOthers(tensor);
      return Begin([this, tensor] { GatherSlices(tensor); });
    }
    void Broadcast(at::Tensor tensor, int root) override {
      CarryOut(queue_.size());
      Share(tensor);
      if (rank_ != root) tensor.copy_(world_.tensors_[root]);
      Meet();
    }
    void Barrier() override {
      CarryOut(queue_.size());
      Meet();
    }

   private:
    Pending Begin(std::function<void()> work) {
      queue_.push_back(std::move(work));
      ++begun_;
      return Pending(
          [this, until = begun_] {
            if (until > done_) CarryOut(until - done_);
          },
          &activity_);
    }
    void CarryOut(size_t count) {
      for (size_t i = 0; i < count; ++i) {
        const std::function<void()> work = std::move(queue_.front());
        queue_.pop_front();
        ++done_;
        work();
        world_.tensors_[rank_].reset();  // the last Meet of every verb comes after all have read
      }
    }

    void SumOverRanks(at::Tensor tensor) {
      Share(tensor);
      at::Tensor sum = world_.tensors_[0].clone();
      for (int rank = 1; rank < world_.size_; ++rank) sum.add_(world_.tensors_[rank]);
      Meet();  // all have read
      tensor.copy_(sum);
      Meet();  // all have written: nobody shares the next tensor before
    }
    void GatherSlices(at::Tensor tensor) {
      Share(tensor);
      const int64_t slice = tensor.numel() / world_.size_;
      for (int rank = 0; rank < world_.size_; ++rank) {
        if (rank == rank_) continue;
        tensor.narrow(0, rank * slice, slice).copy_(world_.tensors_[rank].narrow(0, rank * slice, slice));
      }
      Meet();
    }
    void Share(const at::Tensor& tensor) {
      world_.tensors_[rank_] = tensor;
      Meet();
    }
    void Meet() { world_.barrier_.arrive_and_wait(); }
    ThreadWorld& world_;
    const int rank_;
    std::deque<std::function<void()>> queue_;  // begun, not carried out
    size_t begun_ = 0, done_ = 0;
  };

  const int size_;
  std::barrier<> barrier_;
  std::vector<at::Tensor> tensors_;  // what each rank has brought to the verb under way
};

}  // namespace simpo

#endif  // SIMPO_TESTS_WORKER_IO_THREAD_COLLECTIVES_H_
