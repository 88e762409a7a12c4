// The arithmetic of product.h in fp32.
#pragma once

#include <algorithm>
#include <cstdint>

#include "source.h"

namespace tunesmith {
namespace {

// Multiplies in fp32, with the vectors of Simd.
template <typename Simd>
struct Fp32Arithmetic {
  using Element = float;
  using Vectors = Simd;
  using From = Source<Simd>;
  static constexpr int kPair = 1;
  static constexpr int kUnit = 1;
  // up to so many tokens go to add_few_tokens, which only an arithmetic has where that is any
  static constexpr int kFew = 0;
  static constexpr int kLanes = Simd::kLanes;
  static constexpr int kTileRows = Simd::kTileRows;
  static constexpr int kDepth = Simd::kDepth;
  // not a power of two, so that rows do not fall on the same cache sets
  static constexpr int kRowStride = kDepth + 16;

  static void agree_on_order(From&, From&) {}

  // What a thread holds while it multiplies.
  struct ThreadState {};

  static void pack_rows(const From& source, int64_t row, int64_t rows, int64_t p, int64_t depth,
                        float* out) {
    const int64_t next = std::min<int64_t>(kDepth, source.columns() - p - depth);
    for (int64_t r = 0; r < rows; ++r) {
      source.prefetch(row + r, p + depth, next);
      source.fetch(row + r, p, depth, out + r * kRowStride, InOrder());
    }
  }

  // Columns [column, column + columns) to panels two vectors wide, each `stride` from the last.
  static void pack_panels(const From& source, int64_t p, int64_t depth, int64_t column,
                          int64_t columns, int64_t stride, float* out) {
    constexpr int64_t kWidth = 2 * kLanes;
    for (int64_t d = 0; d < depth; ++d) {
      float* row = out + d * kWidth;
      if (d + kRowsAhead < depth) source.prefetch(p + d + kRowsAhead, column, columns);
      source.fetch(p + d, column, columns, row, InPanels<kWidth>{stride});
      if (columns % kWidth != 0) {
        float* last = row + columns / kWidth * stride;
        std::fill(last + columns % kWidth, last + kWidth, 0.0f);
      }
    }
  }

  // Rows [row, row + rows) to one panel in which they are the lanes.
  static void pack_panel_of_rows(const From& source, int64_t row, int64_t rows, int64_t width,
                                 float* out) {
    constexpr int64_t kChunk = 64;
    alignas(64) float values[2 * kLanes][kChunk];
    for (int64_t r = rows; r < width; ++r) std::fill(values[r], values[r] + kChunk, 0.0f);
    for (int64_t p = 0; p < source.columns(); p += kChunk) {
      const int64_t count = std::min(kChunk, source.columns() - p);
      for (int64_t r = 0; r < rows; ++r) {
        source.fetch(row + r, p, count, values[r], InOrder());
      }
      for (int64_t i = 0; i < count; ++i) {
        float* to = out + (p + i) * width;
        for (int64_t r = 0; r < width; ++r) to[r] = values[r][i];
      }
    }
  }

  // Adds R rows times Count vectors of a panel, over `depth`, to sums [R][width], or puts them
  // there where kFresh says that nothing is there yet.
  template <bool kFresh, int R, int Count>
  static void tile(int64_t depth, const float* rows, const float* panel, float* sums) {
    using V = typename Simd::V;
    V total[R][Count];
    // unrolled in full, or the sums would live in memory
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < Count; ++v) {
        total[r][v] = kFresh ? Simd::set(0.0f) : Simd::load(sums + (r * Count + v) * kLanes);
      }
    }
    for (int64_t p = 0; p < depth; ++p) {
      V lanes[Count];
      for (int v = 0; v < Count; ++v) lanes[v] = Simd::load(panel + (p * Count + v) * kLanes);
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        const V value = Simd::broadcast(rows + r * kRowStride + p);
        for (int v = 0; v < Count; ++v) total[r][v] = Simd::fma(value, lanes[v], total[r][v]);
      }
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < Count; ++v) Simd::store(sums + (r * Count + v) * kLanes, total[r][v]);
    }
  }
};

}  // namespace
}  // namespace tunesmith
