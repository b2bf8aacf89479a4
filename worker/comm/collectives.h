#ifndef SIMPO_WORKER_COMM_COLLECTIVES_H_
#define SIMPO_WORKER_COMM_COLLECTIVES_H_

#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>

#include "worker/comm/rank_activity.h"

namespace simpo {

// A collective under way. The tensor must not be touched between the call that began it and Wait().
// Wait on the thread that began it; a handle that goes away waits first and keeps its error to itself.
class Pending {
 public:
  Pending() = default;  // nothing is under way
  // `activity` outlives it and is told of the waiting.
  Pending(std::function<void()> wait, RankActivity* activity) : wait_(std::move(wait)), activity_(activity) {}
  Pending(Pending&& other) noexcept : wait_(std::exchange(other.wait_, nullptr)), activity_(other.activity_) {}
  Pending& operator=(Pending&& other) noexcept;
  ~Pending();
  // Throws what the collective has met. Once done, nothing happens.
  void Wait();
  bool under_way() const { return wait_ != nullptr; }

 private:
  std::function<void()> wait_;
  RankActivity* activity_ = nullptr;
};

// What ranks do together: five verbs. Every rank of the world calls them in the same order with
// tensors of the same size and type. Tensors are contiguous. Errors throw (a lost peer ends the
// process). Not thread-safe. The verbs that move parameters and gradients also come in two halves, so
// that they run while the rank computes; they are carried out in the order in which they began.
class Collectives {
 public:
  // Bytes that this rank has sent so far, by the ring formula of each verb.
  struct Traffic {
    int64_t all_reduce = 0, reduce_scatter = 0, all_gather = 0, broadcast = 0;
    int64_t total() const { return all_reduce + reduce_scatter + all_gather + broadcast; }
  };

  virtual ~Collectives() = default;
  virtual int rank() const = 0;
  virtual int world_size() const = 0;

  // tensor <- sum over ranks. Element types: float, bfloat16, double, int64.
  virtual Pending BeginAllReduce(at::Tensor tensor) = 0;
  // The rank's slice [rank * n, (rank+1) * n) of `tensor` (n = numel / world_size) <- its sum over
  // ranks; the other slices are undefined afterwards. float, bfloat16.
  virtual Pending BeginReduceScatter(at::Tensor tensor) = 0;
  // Every slice of `tensor` <- that of the rank that owns it; the own slice is the input. Any type.
  virtual Pending BeginAllGather(at::Tensor tensor) = 0;
  virtual void Broadcast(at::Tensor tensor, int root) = 0;
  virtual void Barrier() = 0;

  void AllReduce(at::Tensor tensor) { BeginAllReduce(std::move(tensor)).Wait(); }
  void ReduceScatter(at::Tensor tensor) { BeginReduceScatter(std::move(tensor)).Wait(); }
  void AllGather(at::Tensor tensor) { BeginAllGather(std::move(tensor)).Wait(); }

  const Traffic& sent() const { return sent_; }
  // Told by the verbs of what this rank does; others may ask from any thread.
  RankActivity& activity() { return activity_; }

 protected:
  // What a ring sends of `tensor` from each rank to carry every slice to all others.
  int64_t ShareOfOthers(const at::Tensor& tensor) const {
    return static_cast<int64_t>(tensor.nbytes()) / world_size() * (world_size() - 1);
  }
  Traffic sent_;
  RankActivity activity_;
};

// MPI on host memory; MPI_Init_thread with MPI_THREAD_SERIALIZED must have been called. A thread of its
// own makes every MPI call, so that collectives proceed while the rank computes.
std::unique_ptr<Collectives> MakeMpiCollectives();

struct NcclOptions {
  std::chrono::milliseconds timeout{600'000};          // of one collective, from when its turn has come
  std::chrono::milliseconds connect_timeout{300'000};  // for all ranks to join
  std::chrono::milliseconds watch_interval{100};       // how often the communicator is looked at
};

// Gives every rank the bytes that rank 0 passes.
using ShareBytes = std::function<std::string(const std::string& of_rank_0)>;

// NCCL, one rank per GPU (the calling thread's current device). Wait on a tensor in device memory orders
// the current stream and does not block; tensors in host memory are staged through the device. A peer
// that is lost and a collective that does not end make every later call throw. `share` is called once.
std::unique_ptr<Collectives> MakeNcclCollectives(int rank, int world_size, const ShareBytes& share,
                                                 const NcclOptions& options = {});

// A world of one rank: every verb is the identity. Also what unit tests use.
std::unique_ptr<Collectives> MakeSingleRankCollectives();

}  // namespace simpo

#endif  // SIMPO_WORKER_COMM_COLLECTIVES_H_
