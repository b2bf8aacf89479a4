#ifndef SIMPO_WORKER_COMM_CUDA_CALLS_H_
#define SIMPO_WORKER_COMM_CUDA_CALLS_H_

#include <ATen/core/Tensor.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

// The CUDA calls of the NCCL collectives, and no others. cuda_calls.cc has the real ones; the tests link
// ones on host memory instead (tests/worker/comm/stand_in.cc), and with them the very object file of
// collectives_nccl.cc that runs on GPUs. Errors throw.
namespace simpo::cuda {

int DeviceCount();  // 0 without a driver too
void UseDevice(int device);
int CurrentDevice();  // of the calling thread

bool OnDevice(const at::Tensor& tensor);
// Bytes on the current device, for use on the current stream; bytes on the host that the device can
// copy from and to while the host goes on.
at::Tensor DeviceEmpty(int64_t bytes);
at::Tensor PinnedEmpty(int64_t bytes);

cudaStream_t CurrentStream();  // of the calling thread: where its tensor code runs
cudaStream_t NewStream();      // of the current device, high priority; lives as long as the process

cudaEvent_t NewEvent();
void FreeEvent(cudaEvent_t event);                             // never throws
void RecordEvent(cudaEvent_t event, cudaStream_t stream);      // marks what is queued on `stream` by now
void StreamWaitEvent(cudaStream_t stream, cudaEvent_t event);  // what is queued on `stream` from now on runs after it
bool EventDone(cudaEvent_t event);                             // never blocks

// Between device memory and pinned host memory, in the order of `stream`.
void CopyAsync(void* to, const void* from, size_t bytes, cudaStream_t stream);

}  // namespace simpo::cuda

#endif  // SIMPO_WORKER_COMM_CUDA_CALLS_H_
