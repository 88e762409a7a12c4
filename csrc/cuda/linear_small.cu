// y = x Wt + bias + scaling s Bt for a few tokens: generation, where reading W is what takes time.
//
// Two kernels: s = x At, then the rest, which reads the packed weight once and never writes it out
// dequantized. For more tokens the library's GEMM on a dequantized weight is faster.
#include "linear_small.cuh"

namespace tunesmith {
namespace {

constexpr int kAdapterThreads = 128;

// A thread block for one element of s; the grid is [rank, tokens].
template <typename X, typename A>
__global__ void __launch_bounds__(kAdapterThreads)
    adapter_kernel(const typename X::Storage* __restrict__ x,
                   const typename A::Storage* __restrict__ lora_a, int64_t in_features,
                   bool by_vectors, float* __restrict__ s) {
  let_next_kernel_start();
  x += blockIdx.y * in_features;
  lora_a += blockIdx.x * in_features;
  float sum = 0.0f;
  if (by_vectors) {
#pragma unroll 4
    for (int64_t k = 8 * threadIdx.x; k < in_features; k += 8 * kAdapterThreads) {
      float x_eight[8], a_eight[8];
      load_eight<X>(x + k).unpack(x_eight);
      load_eight<A>(lora_a + k).unpack(a_eight);
#pragma unroll
      for (int i = 0; i < 8; ++i) sum = fmaf(x_eight[i], a_eight[i], sum);
    }
  } else {
    for (int64_t k = threadIdx.x; k < in_features; k += kAdapterThreads) {
      sum = fmaf(X::widen(x[k]), A::widen(lora_a[k]), sum);
    }
  }
  float* warp_sums = reinterpret_cast<float*>(shared_memory);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) warp_sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < kAdapterThreads / kWarp; ++warp) sum += warp_sums[warp];
  s[blockIdx.y * int64_t(gridDim.x) + blockIdx.x] = sum;
}

// Any shape, block size and alignment: a warp for a row of W, one element at a time.
__global__ void __launch_bounds__(kThreads)
    linear_by_elements_kernel(tunesmith_linear linear, const void* __restrict__ x,
                              const float* __restrict__ s, void* __restrict__ y) {
  Tables& tables = *reinterpret_cast<Tables*>(shared_memory);
  fill(tables, linear.type);
  __syncthreads();
  const float offset = linear.nested_absmax == nullptr ? 0.0f : *linear.nested_offset;
  const int lane = threadIdx.x % kWarp;
  const int64_t row = thread_index() / kWarp;
  if (row >= linear.out_features) return;  // a whole warp

  float sums[1][kSmallTokens] = {};
  add_adapter(linear, s, row, lane, sums);
  for (int64_t k = lane; k < linear.in_features; k += kWarp) {
    const int64_t element = row * linear.in_features + k;
    const float scale =
        scale_of(element / linear.blocksize, linear.absmax, linear.nested_absmax, offset, kDynamic);
    const float value = tables.values[code_at(static_cast<const uint8_t*>(linear.weight), element)];
#pragma unroll
    for (int m = 0; m < kSmallTokens; ++m) {
      if (m >= linear.tokens) break;
      const float of_x = load_one(x, linear.dtype, m * linear.in_features + k);
      sums[0][m] = fmaf(value * scale, of_x, sums[0][m]);
    }
  }
  write_sums(linear, row, lane, sums, y);
}

const char* launch_adapter(const tunesmith_linear& linear, const void* x, float* s, void* stream) {
  const bool by_vectors =
      linear.in_features % 8 == 0 && is_aligned(x, 16) && is_aligned(linear.lora_a, 16);
  const dim3 grid(unsigned(linear.rank), unsigned(linear.tokens));
  constexpr size_t kSharedBytes = kAdapterThreads / kWarp * sizeof(float);
  return for_dtype(linear.dtype, [&](auto of_x) {
    return for_dtype(linear.adapter_dtype, [&](auto of_a) {
      using X = decltype(of_x);
      using A = decltype(of_a);
      return launch(adapter_kernel<X, A>, grid, kAdapterThreads, kSharedBytes, stream,
                    static_cast<const typename X::Storage*>(x),
                    static_cast<const typename A::Storage*>(linear.lora_a), linear.in_features,
                    by_vectors, s);
    });
  });
}

const char* launch_by_elements(const tunesmith_linear& linear, const void* x, const float* s,
                               void* y, void* stream) {
  const int64_t warps = kThreads / kWarp;
  const dim3 grid(unsigned((linear.out_features + warps - 1) / warps));
  return launch(linear_by_elements_kernel, grid, kThreads, sizeof(Tables), stream, linear, x, s, y);
}

template <typename X, int Tokens, int Rows>
const char* launch_by_rows(const tunesmith_linear& linear, const void* x, const float* s, void* y,
                           void* stream) {
  constexpr int64_t kRowsOfBlock = kThreads / kWarp * Rows;
  const dim3 grid(unsigned((linear.out_features + kRowsOfBlock - 1) / kRowsOfBlock));
  const size_t shared_bytes = sizeof(Tables) + staged_chunks<X, Tokens>(linear) * Tokens * kChunk *
                                                   sizeof(typename X::Storage);
  // what comes before it is the adapter's kernel, and all else is complete since that has begun
  int major = 0;
  if (linear.rank > 0) {
    if (const char* error = ask_device(cudaDevAttrComputeCapabilityMajor, major)) return error;
  }
  return launch_early(major >= 9, linear_by_pieces_kernel<X, Tokens, Rows>, grid, kThreads,
                      shared_bytes, stream, linear, static_cast<const typename X::Storage*>(x), s,
                      y, log2_of(linear.blocksize), is_aligned(x, 16));
}

// More rows to a warp use what is read of x more often, but there must be work for every
// multiprocessor.
template <int Tokens>
const char* launch_by_pieces(const tunesmith_linear& linear, const void* x, const float* s, void* y,
                             void* stream) {
  int processors = 0;
  if (const char* error = ask_device(cudaDevAttrMultiProcessorCount, processors)) return error;
  const int64_t rows = linear.out_features / (kThreads / kWarp) / processors;
  return for_dtype(linear.dtype, [&](auto of_x) {
    using X = decltype(of_x);
    if constexpr (Tokens > 4) {
      if (rows >= 3) return launch_by_rows<X, Tokens, 4>(linear, x, s, y, stream);
    }
    return launch_by_rows<X, Tokens, 2>(linear, x, s, y, stream);
  });
}

}  // namespace
}  // namespace tunesmith

using namespace tunesmith;

int64_t tunesmith_small_tokens(void) { return kSmallTokens; }

const char* tunesmith_linear_small_cuda(const struct tunesmith_linear* linear, const void* x,
                                        float* s, void* y, void* stream) {
  if (!is_four_bit(linear->type) || linear->weight == nullptr || linear->keep != nullptr ||
      linear->tokens > kSmallTokens) {
    return not_supported();
  }
  if (linear->tokens == 0 || linear->out_features == 0) return nullptr;
  if (linear->rank > 0) {
    if (const char* error = launch_adapter(*linear, x, s, stream)) return error;
  }
  if (linear->in_features % kPiece != 0 || !fits_vectors(linear->blocksize) ||
      !is_aligned(linear->weight, 16)) {
    return launch_by_elements(*linear, x, s, y, stream);
  }
  if (linear->tokens == 1) return launch_by_pieces<1>(*linear, x, s, y, stream);
  if (linear->tokens == 2) return launch_by_pieces<2>(*linear, x, s, y, stream);
  if (linear->tokens <= 4) return launch_by_pieces<4>(*linear, x, s, y, stream);
  if (linear->tokens <= 8) return launch_by_pieces<8>(*linear, x, s, y, stream);
  return launch_by_pieces<16>(*linear, x, s, y, stream);
}
