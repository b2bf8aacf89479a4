#include <c10/util/Exception.h>
#include <mpi.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "worker/comm/collectives.h"

namespace simpo {
namespace {

void Check(int code, const char* what) {
  if (code == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(code, text, &length);
  throw std::runtime_error(std::string(what) + " failed: " + std::string(text, length));
}

MPI_Datatype TypeOf(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return MPI_FLOAT;
    case at::kDouble:
      return MPI_DOUBLE;
    case at::kLong:
      return MPI_INT64_T;
    default:
      throw std::invalid_argument("no MPI reduction for this element type");
  }
}

class MpiCollectives final : public Collectives {
 public:
  MpiCollectives() {
    // Errors come back as codes, so that they can be reported with the verb that met them.
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    Check(MPI_Comm_rank(MPI_COMM_WORLD, &rank_), "MPI_Comm_rank");
    Check(MPI_Comm_size(MPI_COMM_WORLD, &world_size_), "MPI_Comm_size");
  }
  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }

  void AllReduce(at::Tensor tensor) override {
    if (world_size_ == 1) return;
    char* data = Data(tensor);
    const MPI_Datatype type = TypeOf(tensor);
    const int64_t element_size = static_cast<int64_t>(tensor.element_size());
    for (int64_t begin = 0; begin < tensor.numel(); begin += kChunk) {
      const int count = static_cast<int>(std::min(kChunk, tensor.numel() - begin));
      Check(MPI_Allreduce(MPI_IN_PLACE, data + begin * element_size, count, type, MPI_SUM, MPI_COMM_WORLD),
            "MPI_Allreduce");
    }
    bytes_sent_ += 2 * ShareOfOthers(tensor);
  }

  void ReduceScatter(at::Tensor tensor) override {
    if (world_size_ == 1) return;
    // In place the result lands in slice 0, wherever the rank's own slice is.
    const int64_t slice = SliceNumel(tensor);
    Check(MPI_Reduce_scatter_block(MPI_IN_PLACE, Data(tensor), Count(slice), TypeOf(tensor), MPI_SUM, MPI_COMM_WORLD),
          "MPI_Reduce_scatter_block");
    if (rank_ != 0) tensor.narrow(0, rank_ * slice, slice).copy_(tensor.narrow(0, 0, slice));
    bytes_sent_ += ShareOfOthers(tensor);
  }

  void AllGather(at::Tensor tensor) override {
    if (world_size_ == 1) return;
    const int64_t bytes = SliceNumel(tensor) * static_cast<int64_t>(tensor.element_size());
    Check(MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, Data(tensor), Count(bytes / 4), MPI_FLOAT, MPI_COMM_WORLD),
          "MPI_Allgather");
    bytes_sent_ += ShareOfOthers(tensor);
  }

  void Broadcast(at::Tensor tensor, int root) override {
    if (world_size_ == 1) return;
    const int64_t bytes = tensor.numel() * static_cast<int64_t>(tensor.element_size());
    char* data = Data(tensor);
    for (int64_t begin = 0; begin < bytes; begin += kChunk) {
      const int count = static_cast<int>(std::min(kChunk, bytes - begin));
      Check(MPI_Bcast(data + begin, count, MPI_BYTE, root, MPI_COMM_WORLD), "MPI_Bcast");
    }
    bytes_sent_ += rank_ == root ? bytes : 0;
  }

  void Barrier() override { Check(MPI_Barrier(MPI_COMM_WORLD), "MPI_Barrier"); }

 private:
  static constexpr int64_t kChunk = int64_t{1} << 30;

  static char* Data(const at::Tensor& tensor) {
    TORCH_CHECK(tensor.is_contiguous() && tensor.is_cpu(), "collectives take contiguous host tensors");
    return static_cast<char*>(tensor.data_ptr());
  }
  int64_t SliceNumel(const at::Tensor& tensor) const {
    TORCH_CHECK(tensor.numel() % world_size_ == 0, "not divisible by the world size");
    return tensor.numel() / world_size_;
  }
  int64_t ShareOfOthers(const at::Tensor& tensor) const {
    return tensor.numel() * static_cast<int64_t>(tensor.element_size()) / world_size_ * (world_size_ - 1);
  }
  static int Count(int64_t count) {
    TORCH_CHECK(count <= std::numeric_limits<int>::max(), "a slice of more than 2^31 elements");
    return static_cast<int>(count);
  }

  int rank_ = 0;
  int world_size_ = 1;
};

class SingleRankCollectives final : public Collectives {
 public:
  int rank() const override { return 0; }
  int world_size() const override { return 1; }
  void AllReduce(at::Tensor) override {}
  void ReduceScatter(at::Tensor) override {}
  void AllGather(at::Tensor) override {}
  void Broadcast(at::Tensor, int) override {}
  void Barrier() override {}
};

}  // namespace

std::unique_ptr<Collectives> MakeMpiCollectives() { return std::make_unique<MpiCollectives>(); }

std::unique_ptr<Collectives> MakeSingleRankCollectives() { return std::make_unique<SingleRankCollectives>(); }

}  // namespace simpo
