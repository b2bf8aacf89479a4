#ifndef SIMPO_WORKER_COMM_COLLECTIVES_H_
#define SIMPO_WORKER_COMM_COLLECTIVES_H_

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <span>

namespace simpo {

// What ranks do together: five verbs. Every rank of the world calls them in the same order with
// tensors of the same size. Tensors are contiguous. Errors throw (a lost peer ends the process).
// Not thread-safe.
class Collectives {
 public:
  virtual ~Collectives() = default;
  virtual int rank() const = 0;
  virtual int world_size() const = 0;

  // tensor <- sum over ranks. Element types: float, double, int64.
  virtual void AllReduce(at::Tensor tensor) = 0;
  // The rank's slice [rank * n, (rank+1) * n) of `tensor` (n = numel / world_size) <- its sum over
  // ranks; the other slices are undefined afterwards. float.
  virtual void ReduceScatter(at::Tensor tensor) = 0;
  // Every slice of `tensor` <- that of the rank that owns it; the own slice is the input. Any type.
  virtual void AllGather(at::Tensor tensor) = 0;
  virtual void Broadcast(at::Tensor tensor, int root) = 0;
  virtual void Barrier() = 0;

  // Bytes that this rank has sent so far, by the ring formulas of each verb.
  int64_t bytes_sent() const { return bytes_sent_; }

 protected:
  int64_t bytes_sent_ = 0;
};

// MPI on host memory; MPI_Init must have been called.
std::unique_ptr<Collectives> MakeMpiCollectives();

// NCCL on GPU tensors, one GPU per rank; `host` carries the unique id. Only in builds with SIMPO_CUDA.
std::unique_ptr<Collectives> MakeNcclCollectives(Collectives& host);

// A world of one rank: every verb is the identity. Also what unit tests use.
std::unique_ptr<Collectives> MakeSingleRankCollectives();

}  // namespace simpo

#endif  // SIMPO_WORKER_COMM_COLLECTIVES_H_
