// Reading a matrix as fp32, whatever it is held in, 4-bit codes with their scales included.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../kernels.h"
#include "../four_bit.h"
#include "elements.h"
#include "matrix.h"
#include "parallel.h"

namespace tunesmith {
namespace {

constexpr DynamicTable kScales = make_dynamic_table();

inline bool is_4bit(int type) { return type == TUNESMITH_NF4 || type == TUNESMITH_FP4; }

constexpr int64_t round_up(int64_t count, int64_t size) { return divide_up(count, size) * size; }

inline float scale_of(const Matrix& matrix, int64_t block) {
  return scale_of(block, matrix.absmax, matrix.nested_absmax, matrix.nested_offset, kScales);
}

// The scales of blocks [first, first + count), one by one.
inline void fetch_scales(const Matrix& matrix, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = scale_of(matrix, first + i);
}

// By how many bits an element's index is shifted for that of its block; a block size is a power
// of 2.
inline int shift_of(const Matrix& matrix) {
  if (!is_4bit(matrix.type) || matrix.blocksize <= 0) return 0;
  return __builtin_ctzll(uint64_t(matrix.blocksize));
}

// Prefetches elements [column, column + count) of a row that will be fetched soon. Blocks are read
// a little of many rows at a time, which the hardware does not foresee. Inlined always: GCC takes a
// function that only prefetches for one that does nothing.
[[gnu::always_inline]] inline void prefetch(const Matrix& matrix, int64_t row, int64_t column,
                                            int64_t count) {
  const int64_t begin = row * matrix.columns + column;
  const auto* data = static_cast<const char*>(matrix.data);
  const bool packed = is_4bit(matrix.type);
  const int64_t size = size_of(matrix.type);
  const char* const end = data + (packed ? (begin + count) / 2 : (begin + count) * size);
  for (const char* at = data + (packed ? begin / 2 : begin * size); at < end; at += 64) {
    __builtin_prefetch(at);
  }
}

// Where element i of a row goes.
struct InOrder {
  int64_t operator()(int64_t i) const { return i; }
};
template <int64_t kWidth>
struct InPanels {
  int64_t stride;
  int64_t operator()(int64_t i) const { return i / kWidth * stride + i % kWidth; }
};

// Fewer scales than this are not worth a second thread.
constexpr int64_t kScalesGrain = 4096;

// The blocks of a 4-bit matrix and their scales, those of some rows at hand: to fetch them one by
// one takes as long as to dequantize what they scale.
template <typename Simd>
class Scales {
 public:
  explicit Scales(const Matrix& matrix) : matrix_(matrix), shift_(shift_of(matrix)) {}

  // How many floats the scales of `rows` rows take at most, be they of blocks or of every 64
  // elements.
  static int64_t count(const Matrix& matrix, int64_t rows) {
    return is_4bit(matrix.type) ? rows * matrix.columns / 64 + 2 : 0;
  }

  // Fetches those of rows [row, row + rows) to `to`, which has to live as long as they are read.
  void hold(int64_t row, int64_t rows, float* to) {
    if (!is_4bit(matrix_.type)) return;
    const int64_t begin = row * matrix_.columns, end = begin + rows * matrix_.columns;
    first_ = block_of(begin);
    held_ = to;
    Simd::fetch_scales(matrix_, first_, block_of(end - 1) + 1 - first_, to);
  }

  // Fetches those of all rows, on all threads, to `to`, which has to live as long as they are read.
  void hold_all(int64_t rows, float* to) {
    if (!is_4bit(matrix_.type)) return;
    parallel_for(block_of(rows * matrix_.columns - 1) + 1, kScalesGrain,
                 [&](int64_t first, int64_t last) {
                   Simd::fetch_scales(matrix_, first, last - first, to + first);
                 });
    first_ = 0;
    held_ = to;
  }

  int64_t block_of(int64_t at) const { return at >> shift_; }
  int64_t end_of(int64_t block) const { return (block + 1) << shift_; }
  float operator()(int64_t block) const {
    return held_ != nullptr ? held_[block - first_] : scale_of(matrix_, block);
  }

 private:
  const Matrix& matrix_;
  int shift_;  // a block size is a power of two
  int64_t first_ = 0;
  const float* held_ = nullptr;
};

// The scale of each 64 elements of rows [row, row + rows), which are multiples of 64 long.
template <typename Simd>
void fetch_scales(const Matrix& matrix, int64_t row, int64_t rows, float* out) {
  const int64_t chunks = rows * matrix.columns / 64, shift = shift_of(matrix) - 6;
  const int64_t chunk = row * matrix.columns / 64, block = chunk >> shift;
  const int64_t blocks = ((chunk + chunks - 1) >> shift) - block + 1;
  Simd::fetch_scales(matrix, block, blocks, out);
  if (shift == 0) return;
  for (int64_t i = chunks - 1; i >= 0; --i) {  // in place, from behind: no scale moves forward
    out[i] = out[((chunk + i) >> shift) - block];
  }
}

// A matrix, ready to be read as fp32.
template <typename Simd>
class Source {
 public:
  explicit Source(const Matrix& matrix)
      : matrix_(matrix),
        codes_(matrix.table == nullptr ? kNoTable : *matrix.table),
        scales_(matrix) {}

  int64_t columns() const { return matrix_.columns; }
  void hold_scales(int64_t row, int64_t rows, float* to) { scales_.hold(row, rows, to); }
  void hold_all_scales(int64_t rows, float* to) { scales_.hold_all(rows, to); }

  [[gnu::always_inline]] void prefetch(int64_t row, int64_t column, int64_t count) const {
    tunesmith::prefetch(matrix_, row, column, count);
  }

  // Fetches elements [column, column + count) of one row.
  template <typename Layout>
  void fetch(int64_t row, int64_t column, int64_t count, float* out, Layout layout) const {
    const int64_t begin = row * matrix_.columns + column;
    if (is_4bit(matrix_.type)) {
      dequantize(begin, count, out, layout);
    } else {
      convert(begin, count, out, layout);
    }
  }

 private:
  template <typename Layout>
  void convert(int64_t begin, int64_t count, float* out, Layout layout) const {
    int64_t i = 0;
    for (; i + Simd::kLanes <= count; i += Simd::kLanes) {
      auto values = Simd::load(matrix_.data, matrix_.type, begin + i);
      if (matrix_.keep != nullptr) {
        values = Simd::masked(values, matrix_.keep + begin + i, matrix_.keep_scale);
      }
      Simd::store(out + layout(i), values);
    }
    for (; i < count; ++i) {
      float value = load_float(matrix_.data, matrix_.type, begin + i);
      if (matrix_.keep != nullptr) {
        value = matrix_.keep[begin + i] ? value * matrix_.keep_scale : 0.0f;
      }
      out[layout(i)] = value;
    }
  }

  template <typename Layout>
  void dequantize(int64_t begin, int64_t count, float* out, Layout layout) const {
    const auto* packed = static_cast<const uint8_t*>(matrix_.data);
    for (int64_t i = 0; i < count;) {
      const int64_t block = scales_.block_of(begin + i);
      const int64_t end = std::min(count, scales_.end_of(block) - begin);
      const float scale = scales_(block);
      while (i < end) {
        const int64_t at = begin + i;
        if (at % 2 == 0 && i + 64 <= end && i % Simd::kLanes == 0) {
          Simd::dequantize64(packed + at / 2, codes_, scale,
                             [&](int64_t j) { return out + layout(i + j); });
          i += 64;
          continue;
        }
        const uint8_t pair = packed[at / 2];
        const unsigned code = at % 2 == 0 ? pair >> 4 : pair & 0xF;
        out[layout(i)] = matrix_.table->values[code] * scale;
        ++i;
      }
    }
  }

  static constexpr FourBitTable kNoTable = {};

  const Matrix& matrix_;
  typename Simd::Codes codes_;
  Scales<Simd> scales_;
};

// How many rows before its turn a row of a panel is prefetched.
constexpr int64_t kRowsAhead = 8;

}  // namespace
}  // namespace tunesmith
