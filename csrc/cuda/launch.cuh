// How the CUDA kernels are started.
//
// Compiled for CUDA, but run in emulation only (tests/native/emulation), NOT YET on a device.
#pragma once

#include <cuda_runtime.h>

#include "../kernels.h"

namespace tunesmith {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;          // of a block, unless said otherwise
constexpr int64_t kMaxGrid = 1 << 20;  // kernels stride over what is left

inline unsigned grid_for(int64_t work, int64_t work_per_block, int64_t most = kMaxGrid) {
  const int64_t wanted = (work + work_per_block - 1) / work_per_block;
  return unsigned(wanted < most ? wanted : most);
}

inline const char* error_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Sets `count` to how many multiprocessors the current device has; returns null or the error.
inline const char* multiprocessors(int64_t& count) {
  int device = 0, found = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&found, cudaDevAttrMultiProcessorCount, device);
  }
  count = found;
  return error_of(error);
}

inline const char* not_supported() { return error_of(cudaErrorInvalidValue); }

template <typename T>
struct Given {
  using Type = T;
};

// Returns null, or what CUDA calls the error. Arguments take the types of the kernel's parameters.
template <typename... Params>
const char* launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
                   void* stream, typename Given<Params>::Type... params) {
  constexpr size_t kUnasked = 48 * 1024;  // more shared memory must be asked for
  if (shared_bytes > kUnasked) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error_of(error);
  }
  void* arguments[] = {const_cast<void*>(static_cast<const void*>(&params))...};
  return error_of(cudaLaunchKernel(kernel, grid, dim3(unsigned(threads)), arguments, shared_bytes,
                                   static_cast<cudaStream_t>(stream)));
}

inline bool is_aligned(const void* pointer, size_t to) {
  return reinterpret_cast<uintptr_t>(pointer) % to == 0;
}

// Vectors must not straddle blocks, and a block is found by a shift.
inline bool fits_vectors(int64_t blocksize) {
  return blocksize >= 64 && (blocksize & (blocksize - 1)) == 0;
}

inline int log2_of(int64_t power_of_two) {
  int log2 = 0;
  while (int64_t(1) << log2 < power_of_two) ++log2;
  return log2;
}

}  // namespace
}  // namespace tunesmith
