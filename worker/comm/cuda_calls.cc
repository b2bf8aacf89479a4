// The real CUDA calls, over libtorch's streams and allocators. Linked where there are GPUs only.
#include "worker/comm/cuda_calls.h"

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>

namespace simpo::cuda {

int DeviceCount() { return c10::cuda::device_count(); }
void UseDevice(int device) { c10::cuda::set_device(static_cast<c10::DeviceIndex>(device)); }
int CurrentDevice() { return c10::cuda::current_device(); }

bool OnDevice(const at::Tensor& tensor) { return tensor.is_cuda(); }
at::Tensor DeviceEmpty(int64_t bytes) { return at::empty({bytes}, at::TensorOptions(at::kCUDA).dtype(at::kByte)); }
at::Tensor PinnedEmpty(int64_t bytes) {
  return at::empty({bytes}, at::TensorOptions(at::kCPU).dtype(at::kByte).pinned_memory(true));
}

cudaStream_t CurrentStream() { return c10::cuda::getCurrentCUDAStream(); }
cudaStream_t NewStream() { return c10::cuda::getStreamFromPool(/*isHighPriority=*/true); }

cudaEvent_t NewEvent() {
  cudaEvent_t event = nullptr;
  C10_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}
void FreeEvent(cudaEvent_t event) { C10_CUDA_IGNORE_ERROR(cudaEventDestroy(event)); }
void RecordEvent(cudaEvent_t event, cudaStream_t stream) { C10_CUDA_CHECK(cudaEventRecord(event, stream)); }
void StreamWaitEvent(cudaStream_t stream, cudaEvent_t event) {
  C10_CUDA_CHECK(cudaStreamWaitEvent(stream, event, /*flags=*/0));
}
bool EventDone(cudaEvent_t event) {
  const cudaError_t result = cudaEventQuery(event);
  if (result == cudaErrorNotReady) {
    (void)cudaGetLastError();  // it is no error, and nobody is to find it
    return false;
  }
  C10_CUDA_CHECK(result);
  return true;
}

void CopyAsync(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  C10_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream));
}

}  // namespace simpo::cuda
