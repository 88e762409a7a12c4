// What the CUDA kernels share: tables, element types, vectors of elements, reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "../kernels.h"
#include "../four_bit.h"
#include "launch.cuh"

namespace tunesmith {

// All the shared memory of a thread block, as large as its launch asked for.
extern __shared__ uint4 shared_memory[];

namespace {

// In global memory, where lanes may look up different codes at once; in constant memory they would
// wait for each other.
__device__ const FourBitTable kNf4 = make_nf4_table();
__device__ const FourBitTable kFp4 = make_fp4_table();
__device__ const DynamicTable kDynamic = make_dynamic_table();

__device__ inline const FourBitTable& table_of(int type) {
  return type == TUNESMITH_FP4 ? kFp4 : kNf4;
}

// Code number `element` of the eight in a little-endian word: the high nibble of a byte is first.
__device__ inline unsigned code_at(unsigned word, int element) {
  return word >> ((4 * element) ^ 4) & 0xFu;
}

__device__ inline unsigned code_at(const uint8_t* packed, int64_t element) {
  const unsigned pair = packed[element / 2];
  return element % 2 == 0 ? pair >> 4 : pair & 0xFu;
}

// How a type is held, as ../formulas.h takes it. An element in memory is a Storage, and 32 bits of
// memory are a word of one element or two.
struct Float32 {
  using Storage = float;
  static constexpr int kPerWord = 1;
  static __device__ float widen(float value) { return value; }
  static __device__ float narrow(float value) { return value; }
  static __device__ void unpack(unsigned word, float* out) { *out = float_of(word); }
  static __device__ unsigned pack(const float* from) { return bits_of(*from); }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr int kPerWord = 2;
  static __device__ float widen(uint16_t value) { return __half2float(__ushort_as_half(value)); }
  static __device__ uint16_t narrow(float value) {
    return __half_as_ushort(__float2half_rn(value));
  }
  static __device__ void unpack(unsigned word, float* out) {
    out[0] = widen(uint16_t(word));
    out[1] = widen(uint16_t(word >> 16));
  }
  static __device__ unsigned pack(const float* from) {
    const __half2 pair = __floats2half2_rn(from[0], from[1]);
    unsigned word;
    memcpy(&word, &pair, sizeof word);
    return word;
  }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr int kPerWord = 2;
  static __device__ float widen(uint16_t value) { return bfloat16_to_float(value); }
  static __device__ uint16_t narrow(float value) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(value));
  }
  static __device__ void unpack(unsigned word, float* out) {
    out[0] = float_of(word << 16);
    out[1] = float_of(word & 0xFFFF0000u);
  }
  static __device__ unsigned pack(const float* from) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(from[0], from[1]);
    unsigned word;
    memcpy(&word, &pair, sizeof word);
    return word;
  }
};

inline bool is_four_bit(int type) { return type == TUNESMITH_NF4 || type == TUNESMITH_FP4; }

// Returns what `act` does for the type of that dtype. For the host.
template <typename Act>
const char* for_dtype(int dtype, Act act) {
  switch (dtype) {
    case TUNESMITH_FLOAT32: return act(Float32{});
    case TUNESMITH_FLOAT16: return act(Float16{});
    case TUNESMITH_BFLOAT16: return act(BFloat16{});
  }
  return not_supported();
}

// Eight elements as they lie in memory, at a multiple of 16 bytes.
template <typename T>
struct Eight {
  uint4 bits[2 / T::kPerWord];

  __device__ void unpack(float* to) const {
#pragma unroll
    for (int i = 0; i < 2 / T::kPerWord; ++i) {
      const unsigned words[4] = {bits[i].x, bits[i].y, bits[i].z, bits[i].w};
#pragma unroll
      for (int w = 0; w < 4; ++w) T::unpack(words[w], to + (4 * i + w) * T::kPerWord);
    }
  }

  __device__ void pack(const float* from) {
#pragma unroll
    for (int i = 0; i < 2 / T::kPerWord; ++i) {
      unsigned words[4];
#pragma unroll
      for (int w = 0; w < 4; ++w) words[w] = T::pack(from + (4 * i + w) * T::kPerWord);
      bits[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
};

template <typename T>
__device__ Eight<T> load_eight(const typename T::Storage* from) {
  Eight<T> eight;
#pragma unroll
  for (int i = 0; i < 2 / T::kPerWord; ++i) {
    eight.bits[i] = reinterpret_cast<const uint4*>(from)[i];
  }
  return eight;
}

// `Count` elements, eight by vectors or any other number one by one.
template <typename T, int Count>
__device__ void load_some(const typename T::Storage* from, float (&to)[Count]) {
  if constexpr (Count == 8) {
    load_eight<T>(from).unpack(to);
  } else {
#pragma unroll
    for (int e = 0; e < Count; ++e) to[e] = T::widen(from[e]);
  }
}

template <typename T, int Count>
__device__ void store_some(const float (&from)[Count], typename T::Storage* to) {
  if constexpr (Count == 8) {
    Eight<T> eight;
    eight.pack(from);
#pragma unroll
    for (int i = 0; i < 2 / T::kPerWord; ++i) reinterpret_cast<uint4*>(to)[i] = eight.bits[i];
  } else {
#pragma unroll
    for (int e = 0; e < Count; ++e) to[e] = T::narrow(from[e]);
  }
}

// For dequantizing, in shared memory.
struct Tables {
  float values[16];  // of the codes; in 16 banks, so that lanes never wait for each other
  float dynamic[256];
};

// Every thread takes part; a barrier must follow.
__device__ inline void fill(Tables& tables, int type) {
  if (threadIdx.x < 16) tables.values[threadIdx.x] = table_of(type).values[threadIdx.x];
  for (unsigned i = threadIdx.x; i < 256; i += blockDim.x) tables.dynamic[i] = kDynamic.values[i];
}

// The scale of a block as it lies in memory. It is loaded early and dequantized late: dequantizing
// a nested one waits for what was loaded.
struct LoadedScale {
  unsigned absmax;  // its bits, or the code of a nested one
  float nested_absmax;
};

__device__ inline LoadedScale load_scale(uint64_t block, const void* __restrict__ absmax,
                                         const float* __restrict__ nested_absmax) {
  if (nested_absmax == nullptr) return {static_cast<const unsigned*>(absmax)[block], 0.0f};
  return {static_cast<const uint8_t*>(absmax)[block], nested_absmax[block / kNestedBlocksize]};
}

__device__ inline float dequantize_scale(const LoadedScale& scale, bool nested, float offset,
                                         const Tables& tables) {
  if (!nested) return float_of(scale.absmax);
  return __fadd_rn(__fmul_rn(tables.dynamic[scale.absmax], scale.nested_absmax), offset);
}

__device__ inline unsigned warp_max(unsigned value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) {
    value = max(value, __shfl_xor_sync(0xFFFFFFFFu, value, offset));
  }
  return value;
}

__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value += __shfl_xor_sync(0xFFFFFFFFu, value, offset);
  }
  return value;
}

__device__ inline int64_t thread_index() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

__device__ inline int64_t thread_count() { return int64_t(gridDim.x) * blockDim.x; }

}  // namespace
}  // namespace tunesmith
