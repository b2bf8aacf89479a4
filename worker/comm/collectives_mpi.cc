#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>
#include <mpi.h>

#include <condition_variable>
#include <deque>
#include <future>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

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

// One thread that carries out what it is given, in order.
class CommThread {
 public:
  CommThread() : thread_([this] { Loop(); }) {}
  ~CommThread() {
    Add([this] { stop_ = true; }).wait();
    thread_.join();
  }
  std::future<void> Add(std::function<void()> work) {
    std::packaged_task<void()> task(std::move(work));
    std::future<void> done = task.get_future();
    {
      const std::lock_guard lock(mutex_);
      queue_.push_back(std::move(task));
    }
    wake_.notify_one();
    return done;
  }

 private:
  void Loop() {
    while (!stop_) {
      std::packaged_task<void()> task;
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [this] { return !queue_.empty(); });
        task = std::move(queue_.front());
        queue_.pop_front();
      }
      task();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<std::packaged_task<void()>> queue_;
  bool stop_ = false;  // of the thread itself
  std::thread thread_;
};

// MPI has no bf16: the sum is made in fp32 and rounded once per pair of ranks.
void SumBf16(void* in, void* inout, int* count, MPI_Datatype*) {
  const auto* a = static_cast<const c10::BFloat16*>(in);
  auto* b = static_cast<c10::BFloat16*>(inout);
  for (int i = 0; i < *count; ++i) b[i] = static_cast<float>(a[i]) + static_cast<float>(b[i]);
}

class MpiCollectives final : public Collectives {
 public:
  MpiCollectives() {
    // Errors come back as codes, so that they can be reported with the verb that met them.
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    Check(MPI_Comm_rank(MPI_COMM_WORLD, &rank_), "MPI_Comm_rank");
    Check(MPI_Comm_size(MPI_COMM_WORLD, &world_size_), "MPI_Comm_size");
    Check(MPI_Type_contiguous(2, MPI_BYTE, &bf16_), "MPI_Type_contiguous");
    Check(MPI_Type_commit(&bf16_), "MPI_Type_commit");
    Check(MPI_Op_create(&SumBf16, /*commute=*/1, &sum_bf16_), "MPI_Op_create");
  }
  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }

  Pending BeginAllReduce(at::Tensor tensor) override {
    if (world_size_ == 1) return {};
    sent_.all_reduce += 2 * ShareOfOthers(tensor);
    return Begin("all-reduce", tensor, [tensor, data = Data(tensor), kind = KindOf(tensor)] {
      const auto element_size = static_cast<int64_t>(tensor.element_size());
      for (int64_t begin = 0; begin < tensor.numel(); begin += kChunk) {
        const int count = static_cast<int>(std::min(kChunk, tensor.numel() - begin));
        Check(MPI_Allreduce(MPI_IN_PLACE, data + begin * element_size, count, kind.type, kind.sum, MPI_COMM_WORLD),
              "MPI_Allreduce");
      }
    });
  }

  Pending BeginReduceScatter(at::Tensor tensor) override {
    if (world_size_ == 1) return {};
    sent_.reduce_scatter += ShareOfOthers(tensor);
    const int count = Count(SliceNumel(tensor));
    return Begin("reduce-scatter", tensor, [this, tensor, count, data = Data(tensor), kind = KindOf(tensor)] {
      // In place the result lands in slice 0, wherever the rank's own slice is.
      Check(MPI_Reduce_scatter_block(MPI_IN_PLACE, data, count, kind.type, kind.sum, MPI_COMM_WORLD),
            "MPI_Reduce_scatter_block");
      const size_t bytes = static_cast<size_t>(count) * tensor.element_size();
      if (rank_ != 0) std::memcpy(data + static_cast<size_t>(rank_) * bytes, data, bytes);
    });
  }

  Pending BeginAllGather(at::Tensor tensor) override {
    if (world_size_ == 1) return {};
    sent_.all_gather += ShareOfOthers(tensor);
    const int64_t bytes = SliceNumel(tensor) * static_cast<int64_t>(tensor.element_size());
    const bool in_words = bytes % 4 == 0;
    const int count = Count(in_words ? bytes / 4 : bytes);
    return Begin("all-gather", tensor, [tensor, count, data = Data(tensor), type = in_words ? MPI_FLOAT : MPI_BYTE] {
      Check(MPI_Allgather(MPI_IN_PLACE, 0, MPI_DATATYPE_NULL, data, count, type, MPI_COMM_WORLD), "MPI_Allgather");
    });
  }

  void Broadcast(at::Tensor tensor, int root) override {
    if (world_size_ == 1) return;
    const auto bytes = static_cast<int64_t>(tensor.nbytes());
    sent_.broadcast += rank_ == root ? bytes : 0;
    Begin("broadcast", tensor, [data = Data(tensor), bytes, root] {
      for (int64_t begin = 0; begin < bytes; begin += kChunk) {
        const int count = static_cast<int>(std::min(kChunk, bytes - begin));
        Check(MPI_Bcast(data + begin, count, MPI_BYTE, root, MPI_COMM_WORLD), "MPI_Bcast");
      }
    }).Wait();
  }

  void Barrier() override {
    Begin("barrier", at::Tensor(), [] { Check(MPI_Barrier(MPI_COMM_WORLD), "MPI_Barrier"); }).Wait();
  }

 private:
  static constexpr int64_t kChunk = int64_t{1} << 30;

  struct Kind {
    MPI_Datatype type;
    MPI_Op sum;
  };
  Kind KindOf(const at::Tensor& tensor) const {
    switch (tensor.scalar_type()) {
      case at::kFloat:
        return {MPI_FLOAT, MPI_SUM};
      case at::kBFloat16:
        return {bf16_, sum_bf16_};
      case at::kDouble:
        return {MPI_DOUBLE, MPI_SUM};
      case at::kLong:
        return {MPI_INT64_T, MPI_SUM};
      default:
        throw std::invalid_argument("no MPI reduction for this element type");
    }
  }

  Pending Begin(const char* verb, const at::Tensor& tensor, std::function<void()> work) {
    activity_.Began(verb, tensor.defined() ? static_cast<int64_t>(tensor.nbytes()) : 0);
    auto done = std::make_shared<std::future<void>>(thread_.Add(std::move(work)));
    return Pending([done] { done->get(); }, &activity_);
  }

  static char* Data(const at::Tensor& tensor) {
    TORCH_CHECK(tensor.is_contiguous() && tensor.is_cpu(), "collectives take contiguous host tensors");
    return static_cast<char*>(tensor.data_ptr());
  }
  int64_t SliceNumel(const at::Tensor& tensor) const {
    TORCH_CHECK(tensor.numel() % world_size_ == 0, "not divisible by the world size");
    return tensor.numel() / world_size_;
  }
  static int Count(int64_t count) {
    TORCH_CHECK(count <= std::numeric_limits<int>::max(), "a slice of more than 2^31 elements");
    return static_cast<int>(count);
  }

  int rank_ = 0;
  int world_size_ = 1;
  MPI_Datatype bf16_ = MPI_DATATYPE_NULL;
  MPI_Op sum_bf16_ = MPI_OP_NULL;
  CommThread thread_;
};

}  // namespace

std::unique_ptr<Collectives> MakeMpiCollectives() { return std::make_unique<MpiCollectives>(); }

}  // namespace simpo
