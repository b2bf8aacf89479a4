// What CUDA's runtime headers decorate their declarations with, for a C++ compiler, to which most of it says nothing.
// NVIDIA ships a header of this name with nvcc, which is not needed here. See FindTorchCuda.cmake.
#ifndef SIMPO_CUDA_HOST_DEFINES_H_
#define SIMPO_CUDA_HOST_DEFINES_H_

#define CUDARTAPI
#define CUDART_CB
#define __host__
#define __device__
#define __global__
#define __shared__
#define __constant__
#define __managed__
#define __cudart_builtin__
#define __device_builtin__
#define __device_builtin_texture_type__
#define __device_builtin_surface_type__
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
#define __builtin_align__(n) __align__(n)

#endif  // SIMPO_CUDA_HOST_DEFINES_H_
