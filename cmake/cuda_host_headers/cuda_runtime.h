// nccl.h asks for what kernels need; functions and types are here. See FindTorchCuda.cmake.
#include <cuda_runtime_api.h>
