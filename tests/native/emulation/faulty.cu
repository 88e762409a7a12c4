// Kernels that are wrong, each in one way, for the emulation to find; and one that is right.
#include <cuda_runtime.h>

#include <cstdint>

namespace tunesmith {
extern __shared__ uint4 shared_memory[];
}

namespace {

__device__ float* shared() { return reinterpret_cast<float*>(tunesmith::shared_memory); }

__global__ void right(float* data) {
  shared()[threadIdx.x] = data[threadIdx.x];
  __syncthreads();
  const float other = shared()[threadIdx.x ^ 1];
  data[threadIdx.x] = other + __shfl_xor_sync(0xFFFFFFFFu, other, 1);
}

__global__ void missing_barrier(float* data) {
  shared()[threadIdx.x] = data[threadIdx.x];
  data[threadIdx.x] = shared()[threadIdx.x ^ 1];
}

__global__ void missing_second_barrier(float* data) {
  for (int round = 0; round < 2; ++round) {
    shared()[threadIdx.x] = data[threadIdx.x] + round;
    __syncthreads();
    data[threadIdx.x] = shared()[blockDim.x - 1 - threadIdx.x];
  }
}

__global__ void barrier_of_some(float* data) {
  if (threadIdx.x < 40) __syncthreads();
  data[threadIdx.x] = 1;
}

__global__ void barriers_apart(float* data) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  data[threadIdx.x] = 1;
}

__global__ void shuffle_of_some(float* data) {
  if (threadIdx.x % 32 < 5) data[threadIdx.x] = __shfl_xor_sync(0xFFFFFFFFu, 1.0f, 1);
}

__global__ void reads_behind(float* data) { data[threadIdx.x] = data[threadIdx.x + 1]; }
__global__ void reads_before(float* data) { data[threadIdx.x] = data[int(threadIdx.x) - 1024]; }
__global__ void writes_behind(float* data) { data[threadIdx.x + 1] = 1; }

// one element, so that the rest of 16 bytes is a guard
__global__ void writes_beside(float* data) { data[1 + threadIdx.x % 2] = 1; }

__global__ void misaligned(float* data) { reinterpret_cast<uint4*>(data + 1)->x = threadIdx.x; }

__global__ void local_index(float* data) {
  float local[4] = {};
  local[threadIdx.x] = 1;
  data[threadIdx.x] = local[0];
}

__global__ void shared_behind(float* data) { shared()[threadIdx.x + 1] = data[threadIdx.x]; }

}  // namespace

extern "C" const char* run_faulty(int which, float* data, unsigned threads, size_t shared_bytes) {
  void (*const kernels[])(float*) = {
      right,           missing_barrier, missing_second_barrier, barrier_of_some, barriers_apart,
      shuffle_of_some, reads_behind,    reads_before,           writes_behind,   writes_beside,
      misaligned,      local_index,     shared_behind};
  const cudaLaunchConfig_t config = {dim3(1), dim3(threads), shared_bytes, nullptr, nullptr, 0};
  const cudaError_t error = cudaLaunchKernelEx(&config, kernels[which], data);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
