// Dequantizing on CUDA: the bits of the CPU kernels, nested scales dequantized on the way.
#include <type_traits>

#include "common.cuh"

namespace tunesmith {
namespace {

constexpr int kVectorsAtOnce = 2;  // loads a thread has under way

struct Packed {
  const uint8_t* codes;
  const void* absmax;
  const float* nested_absmax;
  const float* nested_offset;
  int64_t numel;
  int64_t blocksize;
  int blocksize_log2;  // for the vectors
  int type;
};

// What a thread loads before it dequantizes.
template <int Vectors>
struct Loaded {
  unsigned codes[Vectors];
  LoadedScale scales[Vectors];
};

// First the elements of that many vectors of 16 bytes of `out`, then one by one what is left. While
// one tile is dequantized, the next is on its way.
template <typename T, int Vectors>
__global__ void __launch_bounds__(kThreads)
    dequantize_kernel(Packed weight, int64_t vectors, typename T::Storage* __restrict__ out) {
  constexpr int kElements = 4 * T::kPerWord;
  using Codes = std::conditional_t<kElements == 8, uint32_t, uint16_t>;

  const Codes* __restrict__ codes = reinterpret_cast<const Codes*>(weight.codes);
  uint4* __restrict__ out_vectors = reinterpret_cast<uint4*>(out);
  const int64_t tile = int64_t(blockDim.x) * Vectors;
  const auto load = [&](int64_t start) {
    Loaded<Vectors> loaded;
#pragma unroll
    for (int i = 0; i < Vectors; ++i) {
      const int64_t vector = start + i * int64_t(blockDim.x) + threadIdx.x;
      if (vector >= vectors) break;
      loaded.codes[i] = codes[vector];
      const auto block = uint64_t(vector) * kElements >> weight.blocksize_log2;
      loaded.scales[i] = load_scale(block, weight.absmax, weight.nested_absmax);
    }
    return loaded;
  };

  Loaded<Vectors> next = load(blockIdx.x * tile);
  Tables& tables = *reinterpret_cast<Tables*>(shared_memory);
  fill(tables, weight.type);
  const bool nested = weight.nested_absmax != nullptr;
  const float offset = nested ? *weight.nested_offset : 0.0f;
  __syncthreads();

  for (int64_t start = blockIdx.x * tile; start < vectors; start += gridDim.x * tile) {
    const Loaded<Vectors> now = next;
    next = load(start + gridDim.x * tile);
#pragma unroll
    for (int i = 0; i < Vectors; ++i) {
      const int64_t vector = start + i * int64_t(blockDim.x) + threadIdx.x;
      if (vector >= vectors) break;
      const float scale = dequantize_scale(now.scales[i], nested, offset, tables);
      float elements[kElements];
#pragma unroll
      for (int e = 0; e < kElements; ++e) {
        elements[e] = times_scale(tables.values[code_at(now.codes[i], e)], scale);
      }
      uint4 bits;
      bits.x = T::pack(elements);
      bits.y = T::pack(elements + T::kPerWord);
      bits.z = T::pack(elements + 2 * T::kPerWord);
      bits.w = T::pack(elements + 3 * T::kPerWord);
      out_vectors[vector] = bits;
    }
  }

  for (int64_t i = vectors * kElements + thread_index(); i < weight.numel; i += thread_count()) {
    const float scale =
        scale_of(i / weight.blocksize, weight.absmax, weight.nested_absmax, offset, kDynamic);
    out[i] = T::narrow(times_scale(tables.values[code_at(weight.codes, i)], scale));
  }
}

template <typename T>
const char* dequantize(const Packed& weight, void* out, void* stream) {
  constexpr int kElements = 4 * T::kPerWord;
  const bool by_vectors = is_aligned(out, 16) && is_aligned(weight.codes, kElements / 2) &&
                          fits_vectors(weight.blocksize);
  const int64_t vectors = by_vectors ? weight.numel / kElements : 0;
  const int64_t work = by_vectors ? vectors / kVectorsAtOnce + 1 : weight.numel;
  const unsigned grid = grid_for(work, kThreads);
  return launch(dequantize_kernel<T, kVectorsAtOnce>, grid, kThreads, sizeof(Tables), stream,
                weight, vectors, static_cast<typename T::Storage*>(out));
}

}  // namespace
}  // namespace tunesmith

using namespace tunesmith;

const char* tunesmith_dequantize_4bit_cuda(const uint8_t* packed, const void* absmax,
                                           const float* nested_absmax, const float* nested_offset,
                                           int64_t numel, int64_t blocksize, int type, int dtype,
                                           void* out, void* stream) {
  if (!is_four_bit(type)) return not_supported();
  if (numel == 0) return nullptr;  // CUDA refuses an empty grid
  const Packed weight = {packed, absmax,    nested_absmax,      nested_offset,
                         numel,  blocksize, log2_of(blocksize), type};
  return for_dtype(
      dtype, [&](auto element) { return dequantize<decltype(element)>(weight, out, stream); });
}
