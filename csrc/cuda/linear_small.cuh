// The kernel of linear_small.cu that reads a 4-bit weight by pieces of 32 codes.
#pragma once

#include "common.cuh"

namespace tunesmith {
namespace {

constexpr int kSmallTokens = 16;
constexpr int kPiece = 32;              // codes in 16 bytes: what a lane loads at once
constexpr int kChunk = kWarp * kPiece;  // codes of a row that a warp loads at once
constexpr int kFours = kPiece / 4;      // float4 of x that meet a piece

__device__ inline float load_one(const void* from, int dtype, int64_t i) {
  if (dtype == TUNESMITH_FLOAT32) return static_cast<const float*>(from)[i];
  const uint16_t bits = static_cast<const uint16_t*>(from)[i];
  return dtype == TUNESMITH_FLOAT16 ? Float16::widen(bits) : BFloat16::widen(bits);
}

__device__ inline void store_one(float value, void* to, int dtype, int64_t i) {
  if (dtype == TUNESMITH_FLOAT32) {
    static_cast<float*>(to)[i] = value;
  } else {
    static_cast<uint16_t*>(to)[i] =
        dtype == TUNESMITH_FLOAT16 ? Float16::narrow(value) : BFloat16::narrow(value);
  }
}

// Adds scaling s Bt: each lane takes its share of the ranks, as it does of the columns of W, so
// that one reduction over the warp sums up both.
template <int Rows, int Tokens>
__device__ void add_adapter(const tunesmith_linear& linear, const float* __restrict__ s,
                            int64_t first_row, int lane, float (&sums)[Rows][Tokens]) {
  for (int64_t j = lane; j < linear.rank; j += kWarp) {
    float b[Rows];
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const int64_t row = first_row + r < linear.out_features ? first_row + r : 0;
      b[r] = linear.scaling * load_one(linear.lora_b, linear.adapter_dtype, row * linear.rank + j);
    }
#pragma unroll
    for (int m = 0; m < Tokens; ++m) {
      if (m >= linear.tokens) break;
      const float of_s = s[m * linear.rank + j];
#pragma unroll
      for (int r = 0; r < Rows; ++r) sums[r][m] = fmaf(b[r], of_s, sums[r][m]);
    }
  }
}

// Sums up over the warp, adds the bias and writes y, a lane for each element.
template <int Rows, int Tokens>
__device__ void write_sums(const tunesmith_linear& linear, int64_t first_row, int lane,
                           const float (&sums)[Rows][Tokens], void* __restrict__ y) {
  constexpr int kRounds = (Rows * Tokens + kWarp - 1) / kWarp;
  float mine[kRounds] = {};
#pragma unroll
  for (int m = 0; m < Tokens; ++m) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const int element = m * Rows + r;
      const float sum = warp_sum(sums[r][m]);
      if (lane == element % kWarp) mine[element / kWarp] = sum;
    }
  }
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const int element = round * kWarp + lane, m = element / Rows;
    const int64_t row = first_row + element % Rows;
    if (m >= linear.tokens || row >= linear.out_features) continue;
    const float bias = linear.bias == nullptr ? 0.0f : load_one(linear.bias, linear.dtype, row);
    store_one(mine[round] + bias, y, linear.dtype, m * linear.out_features + row);
  }
}

// What a lane loads of one row.
struct Piece {
  uint4 codes;
  LoadedScale scale;
};

// Float4 columns of x in shared memory, as they lie in x.
template <typename X>
struct StagedFour {
  uint2 words;
  __device__ void unpack(float* to) const {
    X::unpack(words.x, to);
    X::unpack(words.y, to + 2);
  }
};
template <>
struct StagedFour<Float32> {
  float4 values;
  __device__ void unpack(float* to) const {
    to[0] = values.x;
    to[1] = values.y;
    to[2] = values.z;
    to[3] = values.w;
  }
};

// How many chunks of x are in shared memory at once: all of them, or 32 KB, or one.
template <typename X, int Tokens>
__host__ __device__ int64_t staged_chunks(const tunesmith_linear& linear) {
  constexpr int64_t kFitting =
      (32 << 10) / (Tokens * kChunk * int64_t(sizeof(typename X::Storage)));
  constexpr int64_t kMax = kFitting < 1 ? 1 : kFitting;
  const int64_t chunks = (linear.in_features + kChunk - 1) / kChunk;
  return chunks < kMax ? chunks : kMax;
}

// Where the four columns lie that lane `lane` multiplies with codes 4 four to 4 four + 3 of its
// piece. Neighbouring lanes have neighbouring fours, and so, by the xor, do the threads that write
// them.
__device__ inline int slot_of(int chunk_and_token, int four, int lane) {
  return (chunk_and_token * kFours + four) * kWarp + (lane ^ four);
}

// Puts columns from `first` of x there, zeros where there are none. All threads take part; each has
// several loads under way.
template <int Tokens, typename X>
__device__ void stage_vectors(const tunesmith_linear& linear,
                              const typename X::Storage* __restrict__ x, int64_t first, int chunks,
                              StagedFour<X>* __restrict__ staged) {
  constexpr int kEights = kChunk / 8, kAtOnce = 4;
  const int count = chunks * Tokens * kEights;
  for (int start = threadIdx.x; start < count; start += kAtOnce * kThreads) {
    Eight<X> loaded[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = start + i * kThreads, row = at / kEights, m = row % Tokens;
      const int64_t k = first + int64_t(row / Tokens) * kChunk + at % kEights * 8;
      loaded[i] = {};
      if (at < count && m < linear.tokens && k < linear.in_features) {
        loaded[i] = load_eight<X>(x + m * linear.in_features + k);
      }
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int at = start + i * kThreads, row = at / kEights, eight = at % kEights;
      if (at >= count) continue;
      const int lane = eight / (kPiece / 8), four = eight % (kPiece / 8) * 2;
      StagedFour<X> fours[2];
      static_assert(sizeof fours == sizeof loaded[i]);
      memcpy(fours, &loaded[i], sizeof fours);
      staged[slot_of(row, four, lane)] = fours[0];
      staged[slot_of(row, four + 1, lane)] = fours[1];
    }
  }
}

// The same for an x that is not aligned to 16 bytes.
template <int Tokens, typename X>
__device__ void stage_elements(const tunesmith_linear& linear,
                               const typename X::Storage* __restrict__ x, int64_t first, int chunks,
                               StagedFour<X>* __restrict__ staged) {
  for (int at = threadIdx.x; at < chunks * Tokens * kChunk; at += kThreads) {
    const int row = at / kChunk, m = row % Tokens, column = at % kChunk;
    const int64_t k = first + int64_t(row / Tokens) * kChunk + column;
    const bool inside = m < linear.tokens && k < linear.in_features;
    StagedFour<X>* const slot = staged + slot_of(row, column % kPiece / 4, column / kPiece);
    reinterpret_cast<typename X::Storage*>(slot)[column % 4] =
        inside ? x[m * linear.in_features + k] : typename X::Storage(0);
  }
}

__device__ inline float value_at(const float* values, unsigned offset) {
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(values) + offset);
}

// Multiplies pieces of `Rows` rows with the columns of x that they meet.
template <typename X, int Rows, int Tokens>
__device__ void multiply(const Piece (&pieces)[Rows], const float (&scales)[Rows],
                         const float* __restrict__ values, const StagedFour<X>* __restrict__ staged,
                         int chunk, int lane, float (&sums)[Rows][Tokens]) {
  // one scale for all of a piece: it multiplies the codes' sums where there are fewer of those
  constexpr bool kScaleSums = Tokens <= 4;
  float unscaled[Rows][Tokens] = {};
#pragma unroll
  for (int four = 0; four < kFours; ++four) {
    float weights[Rows][4];
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      const unsigned words[4] = {pieces[r].codes.x, pieces[r].codes.y, pieces[r].codes.z,
                                 pieces[r].codes.w};
      // where the codes' values lie, in bytes from the first: four are worked out at once
      const unsigned even = words[four / 2] >> 2 & 0x3C3C3C3Cu;
      const unsigned odd = words[four / 2] << 2 & 0x3C3C3C3Cu;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const unsigned byte = four % 2 * 2 + e / 2;  // of `even` or `odd`; the rest becomes zero
        const unsigned offset = __byte_perm(e % 2 == 0 ? even : odd, 0, 0x4440 | byte);
        const float value = value_at(values, offset);
        weights[r][e] = kScaleSums ? value : value * scales[r];
      }
    }
#pragma unroll
    for (int m = 0; m < Tokens; ++m) {
      float of_x[4];
      staged[slot_of(chunk * Tokens + m, four, lane)].unpack(of_x);
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        float& sum = kScaleSums ? unscaled[r][m] : sums[r][m];
#pragma unroll
        for (int e = 0; e < 4; ++e) sum = fmaf(weights[r][e], of_x[e], sum);
      }
    }
  }
  if constexpr (kScaleSums) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
#pragma unroll
      for (int m = 0; m < Tokens; ++m) sums[r][m] = fmaf(scales[r], unscaled[r][m], sums[r][m]);
    }
  }
}

// A warp takes `Rows` rows of W, chunk by chunk, and loads the next while it multiplies with one.
// Needs whole pieces in a row, and a block size that is a multiple of a piece.
template <typename X, int Tokens, int Rows>
__global__ void __launch_bounds__(kThreads, Tokens <= 2   ? 4
                                            : Tokens <= 4 ? 3
                                                          : 1)
    linear_by_pieces_kernel(tunesmith_linear linear, const typename X::Storage* __restrict__ x,
                            const float* __restrict__ s, void* __restrict__ y, int blocksize_log2,
                            bool x_by_vectors) {
  Tables& tables = *reinterpret_cast<Tables*>(shared_memory);
  auto* staged = reinterpret_cast<StagedFour<X>*>(shared_memory + sizeof(Tables) / sizeof(uint4));
  fill(tables, linear.type);
  const bool nested = linear.nested_absmax != nullptr;
  const float offset = nested ? *linear.nested_offset : 0.0f;

  const int lane = threadIdx.x % kWarp;
  const int64_t first_row = thread_index() / kWarp * Rows;
  const int64_t pieces_of_row = linear.in_features / kPiece;
  const int to_block = blocksize_log2 - 5;  // a piece is 2^5 codes
  int64_t left = pieces_of_row - lane;      // in a row, from the next to load on
  uint64_t next[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    // rows past the last are worked out and not written, so that every warp meets every barrier
    next[r] = uint64_t(min(first_row + r, linear.out_features - 1) * pieces_of_row + lane);
  }
  const auto load = [&](Piece(&pieces)[Rows]) {
#pragma unroll
    for (int r = 0; r < Rows; ++r) {
      pieces[r] = {};  // stays so past the end of the row, where the staged x is zero, too
      if (left > 0) {
        pieces[r].codes = static_cast<const uint4*>(linear.weight)[next[r]];
        pieces[r].scale = load_scale(next[r] >> to_block, linear.absmax, linear.nested_absmax);
      }
      next[r] += kWarp;
    }
    left -= kWarp;
  };

  float sums[Rows][Tokens] = {};
  const int64_t chunks = (linear.in_features + kChunk - 1) / kChunk;
  const int64_t max_chunks = staged_chunks<X, Tokens>(linear);
  Piece pieces[Rows];
  load(pieces);
  for (int64_t first = 0; first < chunks; first += max_chunks) {
    const int count = int(chunks - first < max_chunks ? chunks - first : max_chunks);
    if (first > 0) __syncthreads();  // all are done with the columns before
    if (x_by_vectors) {
      stage_vectors<Tokens>(linear, x, first * kChunk, count, staged);
    } else {
      stage_elements<Tokens>(linear, x, first * kChunk, count, staged);
    }
    __syncthreads();
#pragma unroll(Tokens <= 2 ? 2 : 1)  // by two, loads go to other registers in turn
    for (int chunk = 0; chunk < count; ++chunk) {
      Piece loading[Rows];
      load(loading);
      float scales[Rows];
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        scales[r] = dequantize_scale(pieces[r].scale, nested, offset, tables);
      }
      multiply(pieces, scales, tables.values, staged, chunk, lane, sums);
#pragma unroll
      for (int r = 0; r < Rows; ++r) pieces[r] = loading[r];
    }
  }
  wait_for_kernel_before();  // which works out s
  add_adapter(linear, s, first_row, lane, sums);
  write_sums(linear, first_row, lane, sums, y);
}

}  // namespace
}  // namespace tunesmith
