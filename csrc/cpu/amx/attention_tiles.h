// What both passes of attention with AMX are made of: bf16, heads of whole tiles.
//
// What is multiplied lies as tiles take it: a left factor in rows of bf16, a right one in pairs
// along the sum ("paired": [depth / 2, columns] of two bf16 each). Everything is held with the
// queries running.
#pragma once

#include <algorithm>

#include "../attention.h"
#include "../pool.h"
#include "../avx512/product_bf16.h"
#include "tiles.h"

namespace tunesmith {
namespace {

constexpr int64_t kSquare =
    2 * kTile;  // what four tiles of sums are the size of, and one step's depth
constexpr float kLog2E = 1.44269504f;

inline int64_t up_to_square(int64_t count) { return divide_up(count, kSquare) * kSquare; }

// Adds left [32, 32 steps] times right, paired [16 steps, 32], to sums [32, 32]; strides in
// elements of each.
template <bool kFresh>
inline void add_square(const uint16_t* left, int64_t left_stride, const uint32_t* right,
                       int64_t right_stride, int64_t steps, float* sums, int64_t sums_stride) {
  const int64_t left_bytes = 2 * left_stride, right_bytes = 4 * right_stride;
  const int64_t sums_bytes = 4 * sums_stride;
  float* const lower = sums + kTile * sums_stride;
  if constexpr (kFresh) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, sums_bytes);
    _tile_loadd(1, sums + kTile, sums_bytes);
    _tile_loadd(2, lower, sums_bytes);
    _tile_loadd(3, lower + kTile, sums_bytes);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const uint16_t* const rows = left + step * kSquare;
    const uint32_t* const lanes = right + step * kTilePairs * right_stride;
    _tile_loadd(4, rows, left_bytes);
    _tile_loadd(6, lanes, right_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, lanes + kTile, right_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, rows + kTile * left_stride, left_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, sums_bytes);
  _tile_stored(1, sums + kTile, sums_bytes);
  _tile_stored(2, lower, sums_bytes);
  _tile_stored(3, lower + kTile, sums_bytes);
}

// 16 pairs from 16 bf16 each of two rows.
inline __m512i paired(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first),
                         _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

inline void store_half(void* at, __m256i bits) {
  _mm256_storeu_si256(static_cast<__m256i*>(at), bits);
}

// 2 to the power of x, within 2 units in the last place; 0 far below 1. The polynomial is the best
// one of its degree on [-1/2, 1/2] that is 1 at 0.
inline __m512 exp2_of(__m512 x) {
  const __m512 magic =
      _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: what is added is rounded to integers
  x = _mm512_max_ps(_mm512_set1_ps(-200.0f), x);  // in this order NaN stays NaN
  const __m512 n = _mm512_sub_ps(_mm512_add_ps(x, magic), magic);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 sum = _mm512_set1_ps(0.00132647273f);
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.00967151299f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.0555073358f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.240222424f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(0.693147004f));
  sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, n);
}

// What a task of one head is made of. Has the thread's tiles while it lives.
class HeadTask {
 public:
  HeadTask(const HeadTask&) = delete;
  HeadTask& operator=(const HeadTask&) = delete;

 protected:
  HeadTask(const tunesmith_attention& job, const AttentionGroup& group)
      : job_(job), group_(group), size_(job.head_size), padded_(up_to_square(group.keys)) {
    set_up_tiles(kTile, kTile);
  }
  ~HeadTask() { _tile_release(); }

  int64_t offset_of(int64_t heads, int64_t head, int64_t token) const {
    return element_of(job_, group_.row, token, heads, head);
  }

  // Rows up to `padded` are zero.
  void gather(const void* from, int64_t heads, int64_t head, int64_t token, int64_t count,
              int64_t padded, uint16_t* to) const {
    for (int64_t i = 0; i < count; ++i) {
      memcpy(to + i * size_, static_cast<const uint16_t*>(from) + offset_of(heads, head, token + i),
             size_t(2 * size_));
    }
    memset(to + count * size_, 0, size_t(2 * (padded - count) * size_));
  }

  // rows [count, size] to pairs along the columns: [size / 2, count]
  void pair_columns(const uint16_t* rows, int64_t count, uint32_t* to) const {
    for (int64_t i = 0; i < count; i += kTile) {
      for (int64_t d = 0; d < size_ / 2; d += kTile) {
        transpose(rows + i * size_ + 2 * d, size_ / 2, [&](int column, __m512i words) {
          store_bits(to + (d + column) * count + i, words);
        });
      }
    }
  }

  // rows [count, size] to [size, count]; `pairs` is work space of [count / 2, 16]
  void transpose_rows(const uint16_t* rows, int64_t count, uint32_t* pairs, uint16_t* to) const {
    for (int64_t d = 0; d < size_; d += kTile) {
      for (int64_t i = 0; i < count; i += 2) {
        const uint16_t* const first = rows + i * size_ + d;
        store_bits(pairs + i / 2 * kTile,
                   paired(load_half_bits(first), load_half_bits(first + size_)));
      }
      for (int64_t i = 0; i < count / 2; i += kTile) {
        transpose(pairs + i * kTile, kTile, [&](int column, __m512i words) {
          store_bits(to + (d + column) * count + 2 * i, words);
        });
      }
    }
  }

  // What is held as [size, padded] to rows of a tensor of so many heads, from a token on.
  void write_transposed(const float* from, int64_t padded, int64_t count, int64_t heads,
                        int64_t head, int64_t token, void* out) const {
    alignas(64) float transposed[kTile * kTile];
    for (int64_t i = 0; i < count; i += kTile) {
      for (int64_t d = 0; d < size_; d += kTile) {
        transpose(from + d * padded + i, padded,
                  [&](int row, __m512i words) { store_bits(transposed + row * kTile, words); });
        for (int64_t row = 0; row < std::min<int64_t>(kTile, count - i); ++row) {
          auto* const to =
              static_cast<uint16_t*>(out) + offset_of(heads, head, token + i + row) + d;
          store_half(to, rounded(_mm512_loadu_ps(transposed + row * kTile)));
        }
      }
    }
  }

  const tunesmith_attention& job_;
  const AttentionGroup& group_;
  int64_t size_, padded_;
};

inline bool of_whole_tiles(const tunesmith_attention& job) {
  return job.dtype == TUNESMITH_BFLOAT16 && job.head_size % kSquare == 0;
}

}  // namespace
}  // namespace tunesmith
