# Imported targets beside FindTorchCpu's, from the same folder SIMPO_TORCH_DIR, which is laid out as the site-packages
# of a Python with torch (2.11 or later) and its nvidia-* packages, and may be just that:
#   nccl_headers   nccl.h and the CUDA runtime's headers; compiling against them links nothing
#   nccl_library   libnccl
#   torch_cuda     libtorch_cuda, the CUDA runtime and NCCL
# deploy/install-deps.sh fetches what these need; what libtorch_cuda itself loads (cuBLAS, cuDNN and others) is
# only needed to run: deploy/install-deps.sh --with cuda, or an installed torch.
set(_nvidia ${SIMPO_TORCH_DIR}/nvidia)
file(GLOB _cu ${_nvidia}/cu*/include/cuda_runtime_api.h)
if(NOT _cu)
  message(FATAL_ERROR "No cuda_runtime_api.h in ${_nvidia}/cu*/include. Run deploy/install-deps.sh; or, with a torch of "
                      "your own in SIMPO_TORCH_DIR, pip install the nvidia-cuda-runtime that it names")
endif()
list(GET _cu 0 _cu)
cmake_path(GET _cu PARENT_PATH _cu_include)
cmake_path(GET _cu_include PARENT_PATH _cu)
file(GLOB _cudart ${_cu}/lib/libcudart.so.*)
file(GLOB _nccl_lib ${_nvidia}/nccl/lib/libnccl.so.*)
foreach(_file ${_nvidia}/nccl/include/nccl.h ${SIMPO_TORCH_DIR}/torch/lib/libtorch_cuda.so)
  if(NOT EXISTS ${_file})
    message(FATAL_ERROR "${_file} is missing. Run deploy/install-deps.sh; or, with a torch of your own in "
                        "SIMPO_TORCH_DIR, pip install its nvidia-nccl and nvidia-cuda-runtime in the versions that it names")
  endif()
endforeach()

# Those headers include some of CUDA's compiler, which come with nvcc only and say nothing to a C++ compiler: our few
# lines of cuda_host_headers stand before them.
add_library(nccl_headers INTERFACE)
target_include_directories(nccl_headers SYSTEM INTERFACE
  ${CMAKE_CURRENT_LIST_DIR}/cuda_host_headers ${_cu_include} ${_nvidia}/nccl/include)

add_library(nccl_library INTERFACE)
target_link_libraries(nccl_library INTERFACE ${_nccl_lib} ${_cudart})
target_link_options(nccl_library INTERFACE -Wl,-rpath,${_nvidia}/nccl/lib -Wl,-rpath,${_cu}/lib)

add_library(torch_cuda INTERFACE)
# libtorch_cuda registers its kernels as it is loaded: it stays although nothing of ours may name it.
target_link_libraries(torch_cuda INTERFACE nccl_headers torch_cpu -Wl,--no-as-needed
  ${SIMPO_TORCH_DIR}/torch/lib/libtorch_cuda.so ${SIMPO_TORCH_DIR}/torch/lib/libc10_cuda.so nccl_library)
# Our own names must all be found in the real libraries; theirs may wait until there is a GPU to run on.
target_link_options(torch_cuda INTERFACE -Wl,--allow-shlib-undefined)
file(GLOB _lib_dirs ${_nvidia}/*/lib)
foreach(_dir ${SIMPO_TORCH_DIR}/torch/lib ${_lib_dirs})
  target_link_options(torch_cuda INTERFACE -Wl,-rpath,${_dir})
endforeach()
set(TorchCuda_FOUND TRUE)
