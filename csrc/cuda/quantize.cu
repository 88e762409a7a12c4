// Quantizing on CUDA: the codes and scales of the CPU kernels, bit for bit.
#include "common.cuh"

namespace tunesmith {
namespace {

// As integers magnitudes sort alike, and NaN and Inf above the rest: nothing is lost.
__device__ unsigned magnitude_of(float value) { return bits_of(value) & 0x7FFFFFFFu; }

// A block that fills whole vectors, with `lanes` neighbours of a warp, each eight at a time.
template <typename T>
__device__ void quantize_block(const typename T::Storage* __restrict__ weight, int64_t blocksize,
                               int lane, int lanes, bool is_mine, const FourBitTable& table,
                               uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  const int64_t begin = 8 * lane, step = 8 * lanes;
  float eight[8];
  unsigned largest = 0;
  if (is_mine) {
    // backwards, so that the first eight, often the only ones, are at hand for the second pass
    for (int64_t i = blocksize - step + begin; i >= 0; i -= step) {
      load_eight<T>(weight + i).unpack(eight);
#pragma unroll
      for (int e = 0; e < 8; ++e) largest = max(largest, magnitude_of(eight[e]));
    }
  }
  const float scale = float_of(warp_max(largest, lanes));
  if (!is_mine) return;
  if (lane == 0) *absmax = scale;
  const float inverse = inverse_of(scale);
  for (int64_t i = begin; i < blocksize; i += step) {
    if (i != begin) load_eight<T>(weight + i).unpack(eight);
    unsigned word = 0;
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      word |= encode_4bit(__fmul_rn(eight[e], inverse), table) << ((4 * e) ^ 4);
    }
    *reinterpret_cast<uint32_t*>(packed + i / 2) = word;
  }
}

// Elements begin to end, with a whole warp, two elements at a time.
template <typename T>
__device__ void quantize_rest(const typename T::Storage* __restrict__ weight, int64_t begin,
                              int64_t end, int lane, const FourBitTable& table,
                              uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  unsigned largest = 0;
  for (int64_t i = begin + lane; i < end; i += kWarp) {
    largest = max(largest, magnitude_of(T::widen(weight[i])));
  }
  const float scale = float_of(warp_max(largest, kWarp));
  if (lane == 0) *absmax = scale;
  const float inverse = inverse_of(scale);
  const auto code_of = [&](int64_t i) {
    return encode_4bit(__fmul_rn(T::widen(weight[i]), inverse), table);
  };
  for (int64_t i = begin + 2 * lane; i < end; i += 2 * kWarp) {
    const unsigned low = i + 1 < end ? code_of(i + 1) : table.zero;
    packed[i / 2] = uint8_t(code_of(i) << 4 | low);
  }
}

// The first `vector_blocks` are read by vectors, `lanes` to a block; the rest a warp to a block.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantize_kernel(const typename T::Storage* __restrict__ weight, int64_t numel,
                    int64_t blocksize, int type, int64_t vector_blocks, int lanes,
                    uint8_t* __restrict__ packed, float* __restrict__ absmax) {
  FourBitTable& table = *reinterpret_cast<FourBitTable*>(shared_memory);
  if (threadIdx.x < 15) table.midpoints[threadIdx.x] = table_of(type).midpoints[threadIdx.x];
  if (threadIdx.x < 16) table.codes[threadIdx.x] = table_of(type).codes[threadIdx.x];
  if (threadIdx.x == 0) table.zero = table_of(type).zero;
  __syncthreads();

  const int lane = threadIdx.x % kWarp;
  const int64_t warp = thread_index() / kWarp, warps = thread_count() / kWarp;
  const int per_warp = kWarp / lanes;
  for (int64_t first = warp * per_warp; first < vector_blocks; first += warps * per_warp) {
    const int64_t block = first + lane / lanes;
    quantize_block<T>(weight + block * blocksize, blocksize, lane % lanes, lanes,
                      block < vector_blocks, table, packed + block * blocksize / 2, absmax + block);
  }
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
  for (int64_t block = vector_blocks + warp; block < blocks; block += warps) {
    const int64_t begin = block * blocksize;
    const int64_t end = begin + blocksize < numel ? begin + blocksize : numel;
    quantize_rest<T>(weight, begin, end, lane, table, packed, absmax + block);
  }
}

// A warp for each 256 absmax.
__global__ void __launch_bounds__(kThreads)
    quantize_absmax_kernel(const float* __restrict__ absmax, int64_t blocks,
                           const float* __restrict__ nested_offset, uint8_t* __restrict__ codes,
                           float* __restrict__ nested_absmax) {
  const int lane = threadIdx.x % kWarp;
  const float offset = *nested_offset;
  const int64_t groups = (blocks + kNestedBlocksize - 1) / kNestedBlocksize;
  for (int64_t group = thread_index() / kWarp; group < groups; group += thread_count() / kWarp) {
    const int64_t begin = group * kNestedBlocksize;
    const int64_t end = begin + kNestedBlocksize < blocks ? begin + kNestedBlocksize : blocks;
    unsigned largest = 0;
    for (int64_t i = begin + lane; i < end; i += kWarp) {
      largest = max(largest, magnitude_of(__fsub_rn(absmax[i], offset)));
    }
    const float scale = float_of(warp_max(largest, kWarp));
    const float inverse = inverse_of(scale);
    if (lane == 0) nested_absmax[group] = scale;
    for (int64_t i = begin + lane; i < end; i += kWarp) {
      const float scaled = __fmul_rn(__fsub_rn(absmax[i], offset), inverse);
      codes[i] = uint8_t(encode_dynamic(scaled, kDynamic));
    }
  }
}

template <typename T>
const char* quantize(const void* weight, int64_t numel, int64_t blocksize, int type,
                     uint8_t* packed, float* absmax, void* stream) {
  const bool by_vectors =
      is_aligned(weight, 16) && is_aligned(packed, 4) && fits_vectors(blocksize);
  const int64_t vector_blocks = by_vectors ? numel / blocksize : 0;
  const int lanes = by_vectors && blocksize < 8 * kWarp ? int(blocksize / 8) : kWarp;
  const int64_t rest = (numel + blocksize - 1) / blocksize - vector_blocks;
  return launch(quantize_kernel<T>, grid_for(vector_blocks * lanes + rest * kWarp, kThreads),
                kThreads, sizeof(FourBitTable), stream,
                static_cast<const typename T::Storage*>(weight), numel, blocksize, type,
                vector_blocks, lanes, packed, absmax);
}

}  // namespace
}  // namespace tunesmith

using namespace tunesmith;

const char* tunesmith_quantize_4bit_cuda(const void* weight, int dtype, int64_t numel,
                                         int64_t blocksize, int type, uint8_t* packed,
                                         float* absmax, void* stream) {
  if (!is_four_bit(type)) return not_supported();
  if (numel == 0) return nullptr;  // CUDA refuses an empty grid
  return for_dtype(dtype, [&](auto element) {
    return quantize<decltype(element)>(weight, numel, blocksize, type, packed, absmax, stream);
  });
}

const char* tunesmith_quantize_absmax_cuda(const float* absmax, int64_t blocks,
                                           const float* nested_offset, uint8_t* codes,
                                           float* nested_absmax, void* stream) {
  if (blocks == 0) return nullptr;
  const int64_t groups = (blocks + kNestedBlocksize - 1) / kNestedBlocksize;
  return launch(quantize_absmax_kernel, grid_for(groups * kWarp, kThreads), kThreads, 0, stream,
                absmax, blocks, nested_offset, codes, nested_absmax);
}
