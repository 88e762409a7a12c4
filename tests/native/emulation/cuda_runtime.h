// A CUDA that runs on the CPU, so that csrc/cuda/*.cu can be tested without a device.
//
// The .cu files are compiled as C++ with this folder first on the include path, and linked with
// emulation.cpp. Threads of a block are fibers: each runs until it waits for others, in an order
// that the test chooses. What a device would get wrong silently is an error here; emulation.cpp
// says what it finds. There is no allocation and no synchronization with the host: the kernels must
// not need any.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
// aligned as on the device, where a misaligned access is an error; the sanitizer finds those
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

inline float __fmul_rn(float a, float b) { return a * b; }  // never contracted: -ffp-contract=off
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
using std::fmaf;

namespace emulation {

// Where in the source threads wait: all that wait for each other must be at one place.
struct Site {
  const char* file;
  int line;
  unsigned mask;  // of the lanes that take part; 0 for a barrier of the block
};

void wait_for_block(Site site);
// Hands `bits` to the others of the warp and returns those of lane `from`.
uint32_t exchange(Site site, uint32_t bits, unsigned from);
unsigned lane();

template <typename T>
T shuffle(Site site, T value, unsigned from) {
  static_assert(sizeof(T) == 4, "only 32-bit shuffles are emulated");
  uint32_t bits;
  memcpy(&bits, &value, 4);
  bits = exchange(site, bits, from);
  memcpy(&value, &bits, 4);
  return value;
}

}  // namespace emulation

#define __syncthreads() emulation::wait_for_block({__FILE__, __LINE__, 0})
// four bytes of x and y (those of x are 0 to 3), each chosen by four bits of `from`
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned from) {
  const uint64_t both = uint64_t(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= unsigned(both >> 8 * (from >> 4 * i & 7) & 0xFF) << 8 * i;
  }
  return result;
}

#define __shfl_xor_sync(mask, value, lanes) \
  emulation::shuffle({__FILE__, __LINE__, mask}, value, emulation::lane() ^ unsigned(lanes))

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = struct CUstream_st*;

const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

namespace emulation {

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const std::function<void()>& run_thread);
cudaError_t allow_shared_bytes(const void* kernel, int bytes);

}  // namespace emulation

// The attributes say what may overlap; here one kernel follows the other.
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    int programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

template <typename... Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Params... params) {
  return emulation::launch(reinterpret_cast<const void*>(kernel), config->gridDim, config->blockDim,
                           config->dynamicSmemBytes, config->stream, [=] { kernel(params...); });
}

template <typename... Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params...), cudaFuncAttribute, int value) {
  return emulation::allow_shared_bytes(reinterpret_cast<const void*>(kernel), value);
}
