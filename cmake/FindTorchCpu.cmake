# Imported targets for the libtorch that deploy/install-deps.sh unpacks. TorchConfig.cmake is not
# used: that of the only registry build asks for a CUDA toolkit. Defines the target torch_cpu.
set(SIMPO_TORCH_VERSION 2.15.0)
if(DEFINED ENV{SIMPO_DEPS})
  set(_deps $ENV{SIMPO_DEPS})
elseif(DEFINED ENV{XDG_CACHE_HOME})
  set(_deps $ENV{XDG_CACHE_HOME}/simpo-deps)
else()
  set(_deps $ENV{HOME}/.cache/simpo-deps)
endif()
set(SIMPO_TORCH_DIR ${_deps}/torch-${SIMPO_TORCH_VERSION} CACHE PATH "Folder that holds torch/ and nvidia/")
if(NOT EXISTS ${SIMPO_TORCH_DIR}/torch/lib/libtorch_cpu.so)
  message(FATAL_ERROR "libtorch is not in ${SIMPO_TORCH_DIR}; run deploy/install-deps.sh first")
endif()
add_library(torch_cpu INTERFACE)
target_include_directories(torch_cpu SYSTEM INTERFACE
  ${SIMPO_TORCH_DIR}/torch/include ${SIMPO_TORCH_DIR}/torch/include/torch/csrc/api/include)
# The old tags make this RPATH serve the libraries that libtorch itself loads (the CUDA runtime and CUPTI stubs).
target_link_libraries(torch_cpu INTERFACE
  ${SIMPO_TORCH_DIR}/torch/lib/libtorch_cpu.so ${SIMPO_TORCH_DIR}/torch/lib/libc10.so)
target_link_options(torch_cpu INTERFACE
  -Wl,--disable-new-dtags
  -Wl,-rpath,${SIMPO_TORCH_DIR}/torch/lib -Wl,-rpath,${SIMPO_TORCH_DIR}/nvidia/cu13/lib
  -Wl,-rpath-link,${SIMPO_TORCH_DIR}/torch/lib -Wl,-rpath-link,${SIMPO_TORCH_DIR}/nvidia/cu13/lib)
set(TorchCpu_FOUND TRUE)
