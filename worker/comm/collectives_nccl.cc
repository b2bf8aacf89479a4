// The five verbs over NCCL, one GPU per rank. Built with the cuda preset only; the only file that
// names NCCL. Calls are queued on the current CUDA stream, so what follows on that stream sees their
// result. A communicator that has failed is aborted, so that no rank waits for one that is gone.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <nccl.h>

#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>

#include "worker/comm/collectives.h"

namespace simpo {
namespace {

void Check(ncclResult_t result, const char* what) {
  if (result == ncclSuccess || result == ncclInProgress) return;
  throw std::runtime_error(std::string(what) + " failed: " + ncclGetErrorString(result));
}

ncclDataType_t TypeOf(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return ncclFloat32;
    case at::kBFloat16:
      return ncclBfloat16;
    case at::kDouble:
      return ncclFloat64;
    case at::kLong:
      return ncclInt64;
    case at::kByte:
      return ncclUint8;
    default:
      throw std::invalid_argument("no NCCL type for this element type");
  }
}

class NcclCollectives final : public Collectives {
 public:
  NcclCollectives(const ncclUniqueId& id, int rank, int world_size) : rank_(rank), world_size_(world_size) {
    Check(ncclCommInitRank(&comm_, world_size, id, rank), "ncclCommInitRank");
  }
  ~NcclCollectives() override {
    // After a failure a graceful end would wait for the lost peer.
    if (failed_) {
      ncclCommAbort(comm_);
    } else {
      ncclCommDestroy(comm_);
    }
  }
  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }

  void AllReduce(at::Tensor tensor) override {
    Run("ncclAllReduce", [&](cudaStream_t stream) {
      return ncclAllReduce(Data(tensor), Data(tensor), Count(tensor), TypeOf(tensor), ncclSum, comm_, stream);
    });
    bytes_sent_ += 2 * ShareOfOthers(tensor);
  }

  // In place: slice r of the tensor is where rank r's result belongs.
  void ReduceScatter(at::Tensor tensor) override {
    const at::Tensor mine = Slice(tensor);
    Run("ncclReduceScatter", [&](cudaStream_t stream) {
      return ncclReduceScatter(Data(tensor), Data(mine), Count(mine), TypeOf(tensor), ncclSum, comm_, stream);
    });
    bytes_sent_ += ShareOfOthers(tensor);
  }

  void AllGather(at::Tensor tensor) override {
    const at::Tensor mine = Slice(tensor);
    Run("ncclAllGather", [&](cudaStream_t stream) {
      return ncclAllGather(Data(mine), Data(tensor), Count(mine), TypeOf(tensor), comm_, stream);
    });
    bytes_sent_ += ShareOfOthers(tensor);
  }

  void Broadcast(at::Tensor tensor, int root) override {
    Run("ncclBroadcast", [&](cudaStream_t stream) {
      return ncclBroadcast(Data(tensor), Data(tensor), Count(tensor), TypeOf(tensor), root, comm_, stream);
    });
    bytes_sent_ += rank_ == root ? static_cast<int64_t>(tensor.nbytes()) : 0;
  }

  void Barrier() override {
    AllReduce(at::zeros({1}, at::TensorOptions().dtype(at::kFloat).device(at::kCUDA)));
    C10_CUDA_CHECK(cudaStreamSynchronize(c10::cuda::getCurrentCUDAStream()));
  }

 private:
  template <typename Call>
  void Run(const char* what, Call call) {
    try {
      ncclResult_t asynchronous = ncclSuccess;
      Check(ncclCommGetAsyncError(comm_, &asynchronous), "ncclCommGetAsyncError");
      Check(asynchronous, "an earlier collective");
      Check(call(c10::cuda::getCurrentCUDAStream()), what);
    } catch (...) {
      failed_ = true;
      throw;
    }
  }

  static void* Data(const at::Tensor& tensor) {
    TORCH_CHECK(tensor.is_contiguous() && tensor.is_cuda(), "NCCL takes contiguous tensors on the GPU");
    return tensor.data_ptr();
  }
  static size_t Count(const at::Tensor& tensor) { return static_cast<size_t>(tensor.numel()); }
  at::Tensor Slice(const at::Tensor& tensor) const {
    TORCH_CHECK(tensor.numel() % world_size_ == 0, "not divisible by the world size");
    const int64_t slice = tensor.numel() / world_size_;
    return tensor.narrow(0, rank_ * slice, slice);
  }
  int64_t ShareOfOthers(const at::Tensor& tensor) const {
    return static_cast<int64_t>(tensor.nbytes()) / world_size_ * (world_size_ - 1);
  }

  ncclComm_t comm_ = nullptr;
  const int rank_;
  const int world_size_;
  bool failed_ = false;
};

}  // namespace

std::unique_ptr<Collectives> MakeNcclCollectives(Collectives& host) {
  ncclUniqueId id;
  if (host.rank() == 0) Check(ncclGetUniqueId(&id), "ncclGetUniqueId");
  host.Broadcast(at::from_blob(&id, {static_cast<int64_t>(sizeof(id))}, at::kByte), /*root=*/0);
  return std::make_unique<NcclCollectives>(id, host.rank(), host.world_size());
}

}  // namespace simpo
