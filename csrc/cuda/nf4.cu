// The kernels for CUDA, on the arithmetic of nf4.h.
//
// Compiled by the build, but NOT YET RUN on a device: no machine with a GPU has tested this file.
#include <cuda_runtime.h>

#include "../kernels.h"
#include "../nf4.h"

namespace tunesmith {
namespace {

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr int64_t kMaxGrid = 1 << 20;  // kernels stride over what is left

// In global memory, where lanes may look up different codes at once; constant memory would serialize.
__device__ const Nf4Table kNf4 = make_nf4_table();
__device__ const DynamicTable kDynamic = make_dynamic_table();

struct Float32 {
  using Storage = float;
  static __device__ float load(float value) { return value; }
  static __device__ float store(float value) { return value; }
};
struct Float16 {
  using Storage = uint16_t;
  static __device__ float load(uint16_t value) { return float16_to_float(value); }
  static __device__ uint16_t store(float value) { return float_to_float16(value); }
};
struct BFloat16 {
  using Storage = uint16_t;
  static __device__ float load(uint16_t value) { return bfloat16_to_float(value); }
  static __device__ uint16_t store(float value) { return float_to_bfloat16(value); }
};

__device__ unsigned warp_max(unsigned value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
  }
  return value;
}

__device__ int64_t warp_index() {
  return (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
}

__device__ int64_t warp_count() { return int64_t(gridDim.x) * blockDim.x / kWarp; }

// A warp for each block of the weight.
template <typename T>
__global__ void quantize_kernel(const typename T::Storage* weight, int64_t numel, int64_t blocksize,
                                int64_t blocks, uint8_t* packed, float* absmax) {
  __shared__ Nf4Table table;
  if (threadIdx.x < 15) table.midpoints[threadIdx.x] = kNf4.midpoints[threadIdx.x];
  __syncthreads();
  const int lane = threadIdx.x % kWarp;
  for (int64_t block = warp_index(); block < blocks; block += warp_count()) {
    const int64_t begin = block * blocksize;
    const int64_t end = begin + blocksize < numel ? begin + blocksize : numel;
    // as integers magnitudes sort alike, and NaN and Inf above the rest: nothing is lost
    unsigned largest = 0;
    for (int64_t i = begin + lane; i < end; i += kWarp) {
      largest = max(largest, bits_of(T::load(weight[i])) & 0x7FFFFFFFu);
    }
    const float scale = float_of(warp_max(largest));
    const float inverse = inverse_of(scale);
    if (lane == 0) absmax[block] = scale;
    for (int64_t i = begin + 2 * lane; i < end; i += 2 * kWarp) {
      const unsigned high = encode_nf4(__fmul_rn(T::load(weight[i]), inverse), table);
      const unsigned low =
          i + 1 < end ? encode_nf4(__fmul_rn(T::load(weight[i + 1]), inverse), table) : kZeroCode;
      packed[i / 2] = uint8_t(high << 4 | low);
    }
  }
}

// A warp for each 256 absmax.
__global__ void quantize_absmax_kernel(const float* absmax, int64_t blocks, int64_t groups,
                                       const float* nested_offset, uint8_t* codes,
                                       float* nested_absmax) {
  const int lane = threadIdx.x % kWarp;
  const float offset = *nested_offset;
  for (int64_t group = warp_index(); group < groups; group += warp_count()) {
    const int64_t begin = group * kNestedBlocksize;
    const int64_t end = begin + kNestedBlocksize < blocks ? begin + kNestedBlocksize : blocks;
    unsigned largest = 0;
    for (int64_t i = begin + lane; i < end; i += kWarp) {
      largest = max(largest, bits_of(__fsub_rn(absmax[i], offset)) & 0x7FFFFFFFu);
    }
    const float scale = float_of(warp_max(largest));
    const float inverse = inverse_of(scale);
    if (lane == 0) nested_absmax[group] = scale;
    for (int64_t i = begin + lane; i < end; i += kWarp) {
      const float scaled = __fmul_rn(__fsub_rn(absmax[i], offset), inverse);
      codes[i] = uint8_t(encode_dynamic(scaled, kDynamic));
    }
  }
}

// A thread for each byte.
template <typename T>
__global__ void dequantize_kernel(const uint8_t* packed, const void* absmax,
                                  const float* nested_absmax, const float* nested_offset,
                                  int64_t numel, int64_t blocksize, typename T::Storage* out) {
  __shared__ float values[16];
  if (threadIdx.x < 16) values[threadIdx.x] = kNf4.values[threadIdx.x];
  __syncthreads();
  const float offset = nested_offset == nullptr ? 0.0f : *nested_offset;
  const int64_t bytes = (numel + 1) / 2;
  const int64_t stride = int64_t(gridDim.x) * blockDim.x;
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < bytes; i += stride) {
    const float scale = scale_of(2 * i / blocksize, absmax, nested_absmax, offset, kDynamic);
    const uint8_t pair = packed[i];
    out[2 * i] = T::store(dequantized(values[pair >> 4], scale));
    if (2 * i + 1 < numel) out[2 * i + 1] = T::store(dequantized(values[pair & 0xF], scale));
  }
}

unsigned grid_for(int64_t threads) {
  const int64_t wanted = (threads + kThreads - 1) / kThreads;
  return unsigned(wanted < kMaxGrid ? wanted : kMaxGrid);
}

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <typename T>
void quantize(const void* weight, int64_t numel, int64_t blocksize, uint8_t* packed, float* absmax,
              cudaStream_t stream) {
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
  quantize_kernel<T><<<grid_for(blocks * kWarp), kThreads, 0, stream>>>(
      static_cast<const typename T::Storage*>(weight), numel, blocksize, blocks, packed, absmax);
}

template <typename T>
void dequantize(const uint8_t* packed, const void* absmax, const float* nested_absmax,
                const float* nested_offset, int64_t numel, int64_t blocksize, void* out,
                cudaStream_t stream) {
  dequantize_kernel<T><<<grid_for((numel + 1) / 2), kThreads, 0, stream>>>(
      packed, absmax, nested_absmax, nested_offset, numel, blocksize,
      static_cast<typename T::Storage*>(out));
}

}  // namespace
}  // namespace tunesmith

using namespace tunesmith;

const char* tunesmith_quantize_nf4_cuda(const void* weight, int dtype, int64_t numel,
                                        int64_t blocksize, uint8_t* packed, float* absmax,
                                        void* stream) {
  if (numel == 0) return nullptr;  // CUDA refuses an empty grid
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case TUNESMITH_FLOAT32: quantize<Float32>(weight, numel, blocksize, packed, absmax, on); break;
    case TUNESMITH_FLOAT16: quantize<Float16>(weight, numel, blocksize, packed, absmax, on); break;
    case TUNESMITH_BFLOAT16: quantize<BFloat16>(weight, numel, blocksize, packed, absmax, on); break;
  }
  return launch_error();
}

const char* tunesmith_quantize_absmax_cuda(const float* absmax, int64_t blocks,
                                           const float* nested_offset, uint8_t* codes,
                                           float* nested_absmax, void* stream) {
  if (blocks == 0) return nullptr;
  const int64_t groups = (blocks + kNestedBlocksize - 1) / kNestedBlocksize;
  quantize_absmax_kernel<<<grid_for(groups * kWarp), kThreads, 0,
                           static_cast<cudaStream_t>(stream)>>>(absmax, blocks, groups,
                                                                nested_offset, codes, nested_absmax);
  return launch_error();
}

const char* tunesmith_dequantize_nf4_cuda(const uint8_t* packed, const void* absmax,
                                          const float* nested_absmax, const float* nested_offset,
                                          int64_t numel, int64_t blocksize, int dtype, void* out,
                                          void* stream) {
  if (numel == 0) return nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case TUNESMITH_FLOAT32:
      dequantize<Float32>(packed, absmax, nested_absmax, nested_offset, numel, blocksize, out, on);
      break;
    case TUNESMITH_FLOAT16:
      dequantize<Float16>(packed, absmax, nested_absmax, nested_offset, numel, blocksize, out, on);
      break;
    case TUNESMITH_BFLOAT16:
      dequantize<BFloat16>(packed, absmax, nested_absmax, nested_offset, numel, blocksize, out, on);
      break;
  }
  return launch_error();
}
