// How the CUDA kernels are started.
#pragma once

#include <cuda_runtime.h>

#include "../kernels.h"

namespace tunesmith {
namespace {

constexpr int kWarp = 32;
constexpr int kThreads = 256;          // of a block, unless said otherwise
constexpr int64_t kMaxGrid = 1 << 20;  // kernels stride over what is left

inline unsigned grid_for(int64_t work, int64_t work_per_block) {
  const int64_t wanted = (work + work_per_block - 1) / work_per_block;
  return unsigned(wanted < kMaxGrid ? wanted : kMaxGrid);
}

inline const char* error_of(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Sets `value` to what the current device says of itself; returns null or the error.
inline const char* ask_device(cudaDeviceAttr attribute, int& value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error_of(error);
  return error_of(cudaDeviceGetAttribute(&value, attribute, device));
}

inline const char* not_supported() { return error_of(cudaErrorInvalidValue); }

template <typename T>
struct Given {
  using Type = T;
};

// Returns null, or what CUDA calls the error. Arguments take the types of the kernel's parameters.
//
// An early one may start before the kernel before it has ended, once that has called
// let_next_kernel_start, and must call wait_for_kernel_before ahead of reading what that writes
// ("programmatic dependent launch", which takes compute capability 9).
template <typename... Params>
const char* launch_early(bool early, void (*kernel)(Params...), dim3 grid, int threads,
                         size_t shared_bytes, void* stream,
                         typename Given<Params>::Type... params) {
  constexpr size_t kUnasked = 48 * 1024;  // more shared memory must be asked for
  if (shared_bytes > kUnasked) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error_of(error);
  }
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  return error_of(cudaLaunchKernelEx(&config, kernel, params...));
}

template <typename... Params>
const char* launch(void (*kernel)(Params...), dim3 grid, int threads, size_t shared_bytes,
                   void* stream, typename Given<Params>::Type... params) {
  return launch_early(false, kernel, grid, threads, shared_bytes, stream, params...);
}

__device__ inline void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

__device__ inline void wait_for_kernel_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
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
