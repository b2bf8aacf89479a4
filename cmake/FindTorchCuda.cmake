# Imported target torch_cuda: libtorch_cuda, the CUDA runtime and NCCL of an installed Python torch with its
# nvidia-* packages (deploy/install-deps.sh --with parity makes one).
#   SIMPO_TORCH_SITE_PACKAGES   the folder that holds torch/ and nvidia/
file(GLOB _site_packages ${_deps}/parity-venv/lib/python3.*/site-packages)
set(SIMPO_TORCH_SITE_PACKAGES "${_site_packages}" CACHE PATH "Folder that holds a CUDA torch/ and its nvidia/")
set(_cuda ${SIMPO_TORCH_SITE_PACKAGES}/nvidia/cu13)
set(_nccl ${SIMPO_TORCH_SITE_PACKAGES}/nvidia/nccl)
foreach(_file ${SIMPO_TORCH_SITE_PACKAGES}/torch/lib/libtorch_cuda.so ${_cuda}/include/cuda_runtime_api.h
        ${_nccl}/include/nccl.h)
  if(NOT EXISTS ${_file})
    message(FATAL_ERROR "SIMPO_CUDA needs ${_file}; set SIMPO_TORCH_SITE_PACKAGES to the folder that holds a CUDA "
                        "build of torch and its nvidia packages, or run deploy/install-deps.sh --with parity")
  endif()
endforeach()
file(GLOB _cudart ${_cuda}/lib/libcudart.so.*)
file(GLOB _nccl_lib ${_nccl}/lib/libnccl.so.*)
add_library(torch_cuda INTERFACE)
target_include_directories(torch_cuda SYSTEM INTERFACE ${_cuda}/include ${_nccl}/include)
target_link_libraries(torch_cuda INTERFACE torch_cpu ${SIMPO_TORCH_SITE_PACKAGES}/torch/lib/libtorch_cuda.so
  ${SIMPO_TORCH_SITE_PACKAGES}/torch/lib/libc10_cuda.so ${_cudart} ${_nccl_lib})
foreach(_dir torch/lib nvidia/cu13/lib nvidia/nccl/lib nvidia/cudnn/lib nvidia/cusparselt/lib nvidia/nvshmem/lib)
  target_link_options(torch_cuda INTERFACE -Wl,-rpath,${SIMPO_TORCH_SITE_PACKAGES}/${_dir}
    -Wl,-rpath-link,${SIMPO_TORCH_SITE_PACKAGES}/${_dir})
endforeach()
set(TorchCuda_FOUND TRUE)
