// Matrix products with a 4-bit factor, written once for every instruction set.
//
// A file that includes this supplies `Arithmetic`: how numbers are held, loaded and multiplied. The
// scheme is that of Goto and van de Geijn (doi:10.1145/1356052.1356053): both factors are brought into
// blocks that fit the caches, and a tile of sums stays in registers while the depth runs. What a 4-bit
// factor adds is that "brought into" means decoding: each code is decoded once per call (or once per
// kTokens rows of `left`), into a block that no one sees but the core that multiplies it.
//
//   transposed    sums[n][m] += right[n][p] * left[m][p]   right gives the rows, left the panels
//   otherwise     sums[m][n] += left[m][p] * right[p][n]   left gives the rows, right the panels
//
// Rows are [row][kRowStride] with p running; a panel is [p][width] with the lanes running. An
// arithmetic that multiplies pairs (kPair = 2) has two p side by side in each place. Where the depth is
// no multiple of kUnit, which an arithmetic multiplies at once, both are filled up with zeros.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../kernels.h"
#include "../nf4.h"
#include "isa.h"
#include "parallel.h"
#include "pool.h"

namespace tunesmith {
namespace {

constexpr DynamicTable kScales = make_dynamic_table();

inline bool is_4bit(int type) { return type == TUNESMITH_NF4 || type == TUNESMITH_FP4; }

constexpr int64_t round_up(int64_t count, int64_t size) { return divide_up(count, size) * size; }

inline float load_as_float(const void* data, int type, int64_t at) {
  switch (type) {
    case TUNESMITH_FLOAT16: return float16_to_float(static_cast<const uint16_t*>(data)[at]);
    case TUNESMITH_BFLOAT16: return bfloat16_to_float(static_cast<const uint16_t*>(data)[at]);
    default: return static_cast<const float*>(data)[at];
  }
}

inline void store_float(void* data, int type, int64_t at, float value) {
  switch (type) {
    case TUNESMITH_FLOAT16: static_cast<uint16_t*>(data)[at] = float_to_float16(value); break;
    case TUNESMITH_BFLOAT16: static_cast<uint16_t*>(data)[at] = float_to_bfloat16(value); break;
    default: static_cast<float*>(data)[at] = value;
  }
}

inline float scale_of(const Matrix& matrix, int64_t block) {
  return scale_of(block, matrix.absmax, matrix.nested_absmax, matrix.nested_offset, kScales);
}

// The scales of blocks [first, first + count), one by one.
inline void fetch_scales(const Matrix& matrix, int64_t first, int64_t count, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = scale_of(matrix, first + i);
}

// By how many bits an element's index is shifted for that of its block; a block size is a power of 2.
inline int shift_of(const Matrix& matrix) {
  if (!is_4bit(matrix.type) || matrix.blocksize <= 0) return 0;
  return __builtin_ctzll(uint64_t(matrix.blocksize));
}

// Asks for elements [column, column + count) of a row that will be fetched soon. Blocks are read a
// little of many rows at a time, which the hardware does not foresee. Inlined always: GCC takes a
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

// The blocks of a 4-bit matrix and their scales, those of some rows at hand: to fetch them one by one
// takes as long as to decode what they scale.
template <typename Simd>
class Scales {
 public:
  explicit Scales(const Matrix& matrix) : matrix_(matrix), shift_(shift_of(matrix)) {}

  // How many floats the scales of `rows` rows take at most, be they of blocks or of every 64 elements.
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
    parallel_for(block_of(rows * matrix_.columns - 1) + 1, kScalesGrain, [&](int64_t first, int64_t last) {
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
  template <typename Place>
  void fetch(int64_t row, int64_t column, int64_t count, float* out, Place place) const {
    const int64_t begin = row * matrix_.columns + column;
    if (is_4bit(matrix_.type)) {
      decode(begin, count, out, place);
    } else {
      convert(begin, count, out, place);
    }
  }

 private:
  template <typename Place>
  void convert(int64_t begin, int64_t count, float* out, Place place) const {
    int64_t i = 0;
    for (; i + Simd::kLanes <= count; i += Simd::kLanes) {
      auto values = Simd::load(matrix_.data, matrix_.type, begin + i);
      if (matrix_.keep != nullptr) {
        values = Simd::kept(values, matrix_.keep + begin + i, matrix_.keep_scale);
      }
      Simd::store(out + place(i), values);
    }
    for (; i < count; ++i) {
      float value = load_as_float(matrix_.data, matrix_.type, begin + i);
      if (matrix_.keep != nullptr) {
        value = matrix_.keep[begin + i] ? value * matrix_.keep_scale : 0.0f;
      }
      out[place(i)] = value;
    }
  }

  template <typename Place>
  void decode(int64_t begin, int64_t count, float* out, Place place) const {
    const auto* packed = static_cast<const uint8_t*>(matrix_.data);
    for (int64_t i = 0; i < count;) {
      const int64_t block = scales_.block_of(begin + i);
      const int64_t end = std::min(count, scales_.end_of(block) - begin);
      const float scale = scales_(block);
      while (i < end) {
        const int64_t at = begin + i;
        if (at % 2 == 0 && i + 64 <= end && i % Simd::kLanes == 0) {
          Simd::decode64(packed + at / 2, codes_, scale,
                         [&](int64_t j) { return out + place(i + j); });
          i += 64;
          continue;
        }
        const uint8_t pair = packed[at / 2];
        const unsigned code = at % 2 == 0 ? pair >> 4 : pair & 0xF;
        out[place(i)] = matrix_.table->values[code] * scale;
        ++i;
      }
    }
  }

  static constexpr FourBitTable kNoTable = {};

  const Matrix& matrix_;
  typename Simd::Codes codes_;
  Scales<Simd> scales_;
};

// How many rows before its turn a row of a panel is asked for.
constexpr int64_t kRowsAhead = 8;

// Multiplies in fp32, with the vectors of Simd.
template <typename Simd>
struct Fp32Arithmetic {
  using Element = float;
  using Vectors = Simd;
  using From = Source<Simd>;
  static constexpr int kPair = 1;
  static constexpr int kUnit = 1;
  // of rows at best a multiple of this is brought at once
  static constexpr int kRowsUnit = 1;
  // up to so many tokens are offered to add_few_tokens, which only an arithmetic has where that is any:
  // it adds all of rows [row, row + rows) times them in a way of its own, or returns false
  static constexpr int kFew = 0;
  static constexpr int kLanes = Simd::kLanes;
  static constexpr int kTileRows = Simd::kTileRows;
  static constexpr int kDepth = Simd::kDepth;
  // not a power of two, so that rows do not fall on the same cache sets
  static constexpr int kRowStride = kDepth + 16;

  static void agree(From&, From&) {}

  // What a thread holds while it multiplies.
  struct Session {};

  static void rows(const From& source, int64_t row, int64_t rows, int64_t p, int64_t depth,
                   float* out) {
    const int64_t next = std::min<int64_t>(kDepth, source.columns() - p - depth);
    for (int64_t r = 0; r < rows; ++r) {
      source.prefetch(row + r, p + depth, next);
      source.fetch(row + r, p, depth, out + r * kRowStride, InOrder());
    }
  }

  // Columns [column, column + columns) to panels two vectors wide, each `stride` from the last.
  static void panels(const From& source, int64_t p, int64_t depth, int64_t column, int64_t columns,
                     int64_t stride, float* out) {
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
  static void panel_of_rows(const From& source, int64_t row, int64_t rows, int64_t width,
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

  // Adds R rows times `Vectors` vectors of a panel, over `depth`, to sums [R][width].
  template <int R, int Count>
  static void tile(int64_t depth, const float* rows, const float* panel, float* sums) {
    using V = typename Simd::V;
    V total[R][Count];
    // unrolled in full, or the sums would live in memory
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < Count; ++v) total[r][v] = Simd::load(sums + (r * Count + v) * kLanes);
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

  // The same, but nothing is there to add to.
  template <int R, int Count>
  static void fresh_tile(int64_t depth, const float* rows, const float* panel, float* sums) {
    std::fill(sums, sums + R * Count * kLanes, 0.0f);
    tile<R, Count>(depth, rows, panel, sums);
  }
};

// Adds `rows` rows times one panel of Count vectors to sums [rows][width], or puts them there where
// kFresh says that nothing is there yet.
template <typename A, bool kFresh, int Count, int R>
void add_tiles(int64_t rows, int64_t depth, const typename A::Element* left,
               const typename A::Element* panel, float* sums) {
  constexpr int64_t kWidth = int64_t(Count) * A::kLanes;
  while (rows >= R) {
    if constexpr (kFresh) {
      A::template fresh_tile<R, Count>(depth, left, panel, sums);
    } else {
      A::template tile<R, Count>(depth, left, panel, sums);
    }
    rows -= R;
    left += int64_t(R) * A::kRowStride;
    sums += R * kWidth;
  }
  if constexpr (R > 1) {
    if (rows > 0) {
      add_tiles<A, kFresh, Count, (R > 4 ? R / 2 : R - 1)>(rows, depth, left, panel, sums);
    }
  }
}

template <typename A, bool kFresh>
void add_panel(int64_t rows, int64_t depth, int64_t width, const typename A::Element* left,
               const typename A::Element* panel, float* sums) {
  // as many sums in registers either way
  if (width == A::kLanes) {
    add_tiles<A, kFresh, 1, 2 * A::kTileRows>(rows, depth, left, panel, sums);
  } else {
    add_tiles<A, kFresh, 2, A::kTileRows>(rows, depth, left, panel, sums);
  }
}

// The same, `fresh` or not.
template <typename A>
void add_panel(bool fresh, int64_t rows, int64_t depth, int64_t width,
               const typename A::Element* left, const typename A::Element* panel, float* sums) {
  if (fresh) return add_panel<A, true>(rows, depth, width, left, panel, sums);
  add_panel<A, false>(rows, depth, width, left, panel, sums);
}

// How much of a depth is multiplied at a time, so that the last part is not a small one.
template <typename A>
int64_t depth_of_blocks(int64_t depth, int64_t unit) {
  depth = std::max<int64_t>(depth, 1);
  return std::min<int64_t>(A::kDepth, round_up(divide_up(depth, divide_up(depth, A::kDepth)), unit));
}

// How rows or columns that become lanes fall into panels: two vectors wide, and the last one vector
// if that holds what is left.
template <typename A>
struct Panels {
  static constexpr int64_t kWidth = 2 * A::kLanes;
  int64_t count;

  int64_t panels() const { return divide_up(count, kWidth); }
  int64_t used(int64_t panel) const { return std::min(kWidth, count - panel * kWidth); }
  int64_t width(int64_t panel) const { return used(panel) <= A::kLanes ? A::kLanes : kWidth; }
};

// Once `count` rows of `left` have been multiplied, a block of `right` is decoded anew: by then
// decoding is a small part, and the sums still fit the cache.
constexpr int64_t kTokens = 512;
// right's rows (transposed) or columns that one core decodes and multiplies at a time
constexpr int64_t kBlockRows = 64;
constexpr int64_t kBlockColumns = 256;
// sums that a core keeps in its second-level cache
constexpr int64_t kSums = int64_t(1) << 15;
// fewer multiplications than this are not worth a second thread
constexpr int64_t kGrain = int64_t(1) << 16;

// How a product is cut into units that threads share: some columns of some tokens.
struct Grid {
  int64_t tokens;        // of one unit
  int64_t token_blocks;
  int64_t unit;          // how many columns one has
  int64_t units;         // that make up all columns
  int64_t together;      // units side by side that are multiplied at once, at most

  int64_t count() const { return token_blocks * units; }
  int64_t columns() const { return together * unit; }

  // How much work less than which is not worth a second thread is in units.
  int64_t grain(int64_t depth) const {
    return divide_up(kGrain, tokens * unit * std::max<int64_t>(depth, 1));
  }

  // Calls use(block of tokens, first column, columns) for units [first, last), of up to columns() that
  // lie side by side, and not many with one and few with the next.
  template <typename Use>
  void each(int64_t first, int64_t last, Use use) const {
    while (first < last) {
      const int64_t at = first % units;
      const int64_t run = std::min(last - first, units - at);
      const int64_t count = divide_up(run, divide_up(run, together));
      use(first / units, at * unit, count * unit);
      first += count;
    }
  }
};

inline Grid make_grid(int64_t tokens, int64_t columns, int64_t depth, int64_t token_unit,
                      int64_t column_unit, int64_t column_block) {
  Grid grid = {std::min(kTokens, round_up(tokens, token_unit)), 0, column_unit,
               divide_up(columns, column_unit), column_block / column_unit};
  const int64_t threads = std::max<int64_t>(1, std::min(max_threads(), tokens * columns * depth / kGrain));
  const auto cut = [&] { grid.token_blocks = divide_up(tokens, grid.tokens); };
  cut();
  // every thread should have something to do
  if (grid.count() < threads) {
    const int64_t parts = divide_up(threads, grid.units);
    grid.tokens = std::min(grid.tokens, round_up(divide_up(tokens, parts), token_unit));
    cut();
  }
  return grid;
}

// Writes finished sums, times a factor.
struct Output {
  const Product& product;
  float factor = 1.0f;

  void operator()(int64_t m, int64_t n, float sum) const {
    const int64_t at = m * product.row_stride + n * product.column_stride;
    sum *= factor;
    if (product.bias != nullptr) sum += load_as_float(product.bias, product.out_type, n);
    if (product.accumulate) sum += load_as_float(product.out, product.out_type, at);
    store_float(product.out, product.out_type, at, sum);
  }

  // The same for columns [n, n + columns) of rows [m, m + count), whose sums are `stride` apart.
  template <typename Simd>
  void rows(int64_t m, int64_t count, int64_t n, int64_t columns, const float* sums,
            int64_t stride) const {
    const auto write = [&](auto type) {
      rows_of<Simd, decltype(type)::value>(m, count, n, columns, sums, stride);
    };
    switch (product.out_type) {
      case TUNESMITH_FLOAT16: return write(std::integral_constant<int, TUNESMITH_FLOAT16>());
      case TUNESMITH_BFLOAT16: return write(std::integral_constant<int, TUNESMITH_BFLOAT16>());
      default: return write(std::integral_constant<int, TUNESMITH_FLOAT32>());
    }
  }

  // Whether rows [m, m + count) of a column lie side by side, for `column` to write them.
  bool has_columns() const { return product.row_stride == 1 && product.bias == nullptr; }

  template <typename Simd>
  void column(int64_t m, int64_t n, int64_t count, const float* sums) const {
    const int64_t at = m + n * product.column_stride;
    int64_t i = 0;
    for (; i + Simd::kLanes <= count; i += Simd::kLanes) {
      auto values = Simd::mul(Simd::load(sums + i), Simd::set(factor));
      if (product.accumulate) {
        values = Simd::add(values, Simd::load(product.out, product.out_type, at + i));
      }
      Simd::store(product.out, product.out_type, at + i, values);
    }
    for (; i < count; ++i) (*this)(m + i, n, sums[i]);
  }

 private:
  template <typename Simd, int kType>
  void rows_of(int64_t m, int64_t count, int64_t n, int64_t columns, const float* sums,
               int64_t stride) const {
    // copies, for all a compiler knows is that what is written may be the product itself
    const bool accumulate = product.accumulate;
    const int64_t row_stride = product.row_stride, column_stride = product.column_stride;
    const void* const bias = product.bias;
    void* const out = product.out;
    const float scale = factor;
    int64_t first = m * row_stride + n * column_stride;
    for (int64_t r = 0; r < count; ++r, first += row_stride, sums += stride) {
      int64_t i = 0;
      for (; i + Simd::kLanes <= columns && column_stride == 1; i += Simd::kLanes) {
        auto values = Simd::mul(Simd::load(sums + i), Simd::set(scale));
        if (bias != nullptr) values = Simd::add(values, Simd::load(bias, kType, n + i));
        if (accumulate) values = Simd::add(values, Simd::load(out, kType, first + i));
        Simd::store(out, kType, first + i, values);
      }
      for (; i < columns; ++i) {
        const int64_t at = first + i * column_stride;
        float sum = sums[i] * scale;
        if (bias != nullptr) sum += load_as_float(bias, kType, n + i);
        if (accumulate) sum += load_as_float(out, kType, at);
        store_float(out, kType, at, sum);
      }
    }
  }
};

template <typename Simd>
void scale_sums(float* sums, int64_t count, float factor) {
  if (factor == 1.0f) return;
  for (int64_t i = 0; i < count; i += Simd::kLanes) {
    Simd::store(sums + i, Simd::mul(Simd::load(sums + i), Simd::set(factor)));
  }
}

// Drops some sums of one row.
template <typename Simd>
void keep_sums(float* sums, int64_t count, const uint8_t* keep, float keep_scale) {
  int64_t i = 0;
  for (; i + Simd::kLanes <= count; i += Simd::kLanes) {
    Simd::store(sums + i, Simd::kept(Simd::load(sums + i), keep + i, keep_scale));
  }
  for (; i < count; ++i) sums[i] = keep[i] ? sums[i] * keep_scale : 0.0f;
}

// Whether left2 right2 is all there is, and so shallow that it is done at once.
template <typename A>
bool is_low_rank(const Product& product) {
  const int64_t rank = product.left2.columns;
  return product.left.columns == 0 && rank > 0 && rank <= A::kDepth;
}

// Does such a product. The output, read and written once, is most of the work: whole rows of it are done
// one after the other.
template <typename A>
void multiply_low_rank(const Product& product) {
  using Element = typename A::Element;
  using Simd = typename A::Vectors;
  constexpr int kRows = A::kTileRows;
  constexpr int64_t kWidth = 2 * A::kLanes;
  const int64_t rank = product.left2.columns, padded_rank = round_up(rank, A::kUnit);
  const int64_t panels = divide_up(product.columns, kWidth);
  const typename A::From from_left2(product.left2), from_right2(product.right2);
  Scratch right(sizeof(Element) * panels * kWidth * padded_rank);
  parallel_for(panels, divide_up(kGrain / 4, kWidth * rank), [&](int64_t first, int64_t last) {
    for (int64_t panel = first; panel < last; ++panel) {
      const int64_t n = panel * kWidth, columns = std::min(kWidth, product.columns - n);
      Element* const to = right.as<Element>() + n * padded_rank;
      if (product.transposed) {
        A::panel_of_rows(from_right2, n, columns, kWidth, to);
      } else {
        A::panels(from_right2, 0, rank, n, columns, kWidth * padded_rank, to);
      }
    }
  });
  const Output output = {product, product.keep == nullptr ? product.alpha2 : 1.0f};
  const int64_t groups = divide_up(product.rows, kRows);
  const int64_t grain = divide_up(kGrain, kRows * rank * product.columns);
  parallel_for(groups, grain, [&](int64_t first, int64_t last) {
    [[maybe_unused]] const typename A::Session session = {};
    Scratch left(sizeof(Element) * kRows * A::kRowStride);
    std::fill(left.as<Element>(), left.as<Element>() + kRows * A::kRowStride, Element(0));
    // two, so that the next sums are begun before these are written
    alignas(64) float sums[2][kRows * kWidth];
    for (int64_t group = first; group < last; ++group) {
      const int64_t m = group * kRows, rows = std::min<int64_t>(kRows, product.rows - m);
      A::rows(from_left2, m, rows, 0, rank, left.as<Element>());
      for (int64_t panel = 0; panel <= panels; ++panel) {
        if (panel < panels) {
          A::template fresh_tile<kRows, 2>(padded_rank / A::kPair, left.as<Element>(),
                                           right.as<Element>() + panel * kWidth * padded_rank,
                                           sums[panel % 2]);
        }
        if (panel == 0) continue;
        float* const done = sums[(panel - 1) % 2];
        const int64_t n = (panel - 1) * kWidth, columns = std::min(kWidth, product.columns - n);
        for (int64_t r = 0; r < rows && product.keep != nullptr; ++r) {
          scale_sums<Simd>(done + r * kWidth, kWidth, product.alpha2);
          keep_sums<Simd>(done + r * kWidth, columns,
                          product.keep + (m + r) * product.columns + n, product.keep_scale);
        }
        output.template rows<Simd>(m, rows, n, columns, done, kWidth);
      }
    }
  });
}

// How far rows of turned sums are apart: not by a power of two, which would fall on few cache sets.
template <typename A>
constexpr int64_t kTurnedStride = kBlockRows + A::kTileRows + A::kLanes;

// Writes kLanes lanes of `rows` rows of sums, `width` apart, as rows.
template <typename A>
void turn_lanes(const float* sums, int64_t rows, int64_t width, float* to) {
  constexpr int64_t kLanes = A::kLanes;
  int64_t r = 0;
  for (; r + kLanes <= rows; r += kLanes) {
    A::Vectors::transpose(sums + r * width, width, to + r, kTurnedStride<A>);
  }
  for (; r < rows; ++r) {
    for (int64_t lane = 0; lane < kLanes; ++lane) to[lane * kTurnedStride<A> + r] = sums[r * width + lane];
  }
}

// right is [N, P]: it gives the rows, left the panels.
template <typename A>
void multiply_transposed(const Product& product) {
  if (is_low_rank<A>(product)) return multiply_low_rank<A>(product);
  using Element = typename A::Element;
  using Simd = typename A::Vectors;
  constexpr int64_t kWidth = Panels<A>::kWidth;
  const int64_t depth = product.left.columns;
  const int64_t rank = product.left2.columns;
  const Panels<A> tokens = {product.rows};
  typename A::From from_left(product.left), from_right(product.right);
  A::agree(from_left, from_right);
  const typename A::From from_left2(product.left2), from_right2(product.right2);
  const int64_t padded_depth = round_up(depth, A::kUnit), padded_rank = round_up(rank, A::kUnit);
  Scratch left(sizeof(Element) * tokens.panels() * kWidth * padded_depth);
  Scratch left2(sizeof(Element) * tokens.panels() * kWidth * padded_rank);
  parallel_for(tokens.panels(), divide_up(kGrain / 4, kWidth * std::max<int64_t>(depth, 1)),
               [&](int64_t first, int64_t last) {
                 for (int64_t i = first; i < last; ++i) {
                   const int64_t m = i * kWidth, used = tokens.used(i), width = tokens.width(i);
                   A::panel_of_rows(from_left, m, used, width,
                                    left.as<Element>() + m * padded_depth);
                   if (rank > 0) {
                     A::panel_of_rows(from_left2, m, used, width,
                                      left2.as<Element>() + m * padded_rank);
                   }
                 }
               });

  constexpr int64_t kBlock = round_up(kBlockRows, A::kTileRows);
  const bool few = product.rows <= A::kFew;
  // add_few_tokens takes as long for part of a block as for a whole one
  const int64_t unit = few ? kBlock : A::kTileRows;
  const int64_t block_depth = depth_of_blocks<A>(depth, A::kRowsUnit);
  const Grid grid = make_grid(product.rows, product.columns, depth + rank, kWidth, unit, kBlock);
  parallel_for(grid.count(), grid.grain(depth + rank), [&](int64_t first, int64_t last) {
    [[maybe_unused]] const typename A::Session session = {};
    // add_few_tokens takes room for a whole block however few rows there are
    Scratch block(sizeof(Element) * kBlock * A::kRowStride);
    Scratch sums_of_block(sizeof(float) * kBlock * round_up(grid.tokens, kWidth));
    Scratch scales(sizeof(float) * Scales<Simd>::count(product.right, kBlock));
    typename A::From rows_from = from_right;
    grid.each(first, last, [&](int64_t token_block, int64_t n, int64_t columns) {
      const int64_t rows = std::min(columns, product.columns - n);
      if (depth > 0) rows_from.hold_scales(n, rows, scales.as<float>());
      const int64_t token = token_block * grid.tokens;
      const int64_t first_panel = token / kWidth;
      const int64_t last_panel = divide_up(std::min(token + grid.tokens, product.rows), kWidth);
      const auto sums_at = [&](int64_t i) {
        return sums_of_block.as<float>() + (i - first_panel) * kWidth * kBlock;
      };
      // left multiplies with right, left2 with right2
      const auto add_block = [&](bool fresh, int64_t p, int64_t count, const Element* panels,
                                 int64_t padded) {
        for (int64_t i = first_panel; i < last_panel; ++i) {
          const int64_t width = tokens.width(i);
          add_panel<A>(fresh, rows, round_up(count, A::kUnit) / A::kPair, width,
                       block.as<Element>(), panels + i * kWidth * padded + p * width, sums_at(i));
        }
      };
      // first, for only this part is scaled by alpha2; alpha is 1 where it is there
      for (int64_t p = 0; p < rank; p += A::kDepth) {
        const int64_t count = std::min<int64_t>(A::kDepth, rank - p);
        A::rows(from_right2, n, rows, p, count, block.as<Element>());
        add_block(p == 0, p, count, left2.as<Element>(), padded_rank);
      }
      for (int64_t i = first_panel; i < last_panel; ++i) {
        if (rank > 0) scale_sums<Simd>(sums_at(i), rows * tokens.width(i), product.alpha2);
      }
      bool fresh = rank == 0 && depth > 0 && !few;
      if (rank == 0 && !fresh) std::fill(sums_at(first_panel), sums_at(last_panel), 0.0f);
      bool done = false;
      if constexpr (A::kFew > 0) {
        done = few && A::add_few_tokens(rows_from, n, rows, left.as<Element>(), block.as<Element>(),
                                        sums_at(first_panel));
      }
      for (int64_t p = 0; p < depth && !done; p += block_depth) {
        const int64_t count = std::min<int64_t>(block_depth, depth - p);
        A::rows(rows_from, n, rows, p, count, block.as<Element>());
        add_block(fresh, p, count, left.as<Element>(), padded_depth);
        fresh = false;
      }
      const Output output = {product, rank == 0 ? product.alpha : 1.0f};
      alignas(64) float turned[A::kLanes * kTurnedStride<A>];
      for (int64_t i = first_panel; i < last_panel; ++i) {
        const int64_t width = tokens.width(i);
        if (output.has_columns()) {
          for (int64_t r = 0; r < rows; ++r) {
            output.template column<Simd>(i * kWidth, n + r, tokens.used(i), sums_at(i) + r * width);
          }
          continue;
        }
        for (int64_t lane = 0; lane < tokens.used(i); lane += A::kLanes) {
          const int64_t lanes = std::min<int64_t>(A::kLanes, tokens.used(i) - lane);
          turn_lanes<A>(sums_at(i) + lane, rows, width, turned);
          output.template rows<Simd>(i * kWidth + lane, lanes, n, rows, turned, kTurnedStride<A>);
        }
      }
    });
  });
}

// right is [P, N]: it gives the panels, left the rows.
template <typename A>
void multiply_plain(const Product& product) {
  if (is_low_rank<A>(product)) return multiply_low_rank<A>(product);
  using Element = typename A::Element;
  using Simd = typename A::Vectors;
  constexpr int64_t kWidth = Panels<A>::kWidth;
  const int64_t tokens = product.rows;
  const typename A::From from_left(product.left);
  typename A::From from_right(product.right);
  const typename A::From from_left2(product.left2), from_right2(product.right2);
  const int64_t depth = product.left.columns;
  const int64_t rank = product.left2.columns;
  Scratch scales(sizeof(float) * Scales<Simd>::count(product.right, depth));
  from_right.hold_all_scales(depth, scales.as<float>());
  const auto block_of = [](int64_t total) { return depth_of_blocks<A>(total, A::kUnit); };
  const int64_t blocks = divide_up(depth, block_of(depth)), blocks2 = divide_up(rank, block_of(rank));
  // [block of the depth][token][kRowStride]
  Scratch left(sizeof(Element) * blocks * tokens * A::kRowStride);
  Scratch left2(sizeof(Element) * blocks2 * tokens * A::kRowStride);
  parallel_for(tokens, divide_up(kGrain / 4, std::max<int64_t>(depth, 1)),
               [&](int64_t first, int64_t last) {
                 const auto bring = [&](const auto& from, int64_t columns, Element* to) {
                   const int64_t size = block_of(columns);
                   for (int64_t p = 0; p < columns; p += size) {
                     A::rows(from, first, last - first, p, std::min(size, columns - p),
                             to + (p / size * tokens + first) * A::kRowStride);
                   }
                 };
                 bring(from_left, depth, left.as<Element>());
                 bring(from_left2, rank, left2.as<Element>());
               });

  // wide, so that whole cache lines of codes are read, unless there are many tokens
  const int64_t fitting = kSums / std::min(kTokens, tokens) / kWidth * kWidth;
  const Grid grid = make_grid(tokens, product.columns, depth + rank, A::kTileRows, kWidth,
                              std::min(kBlockColumns, std::max(2 * kWidth, fitting)));
  constexpr int64_t panel_stride = kWidth * A::kDepth;  // kDepth is a multiple of kUnit
  parallel_for(grid.count(), grid.grain(depth + rank), [&](int64_t first, int64_t last) {
    [[maybe_unused]] const typename A::Session session = {};
    Scratch block(sizeof(Element) * grid.columns() * A::kDepth);
    Scratch sums_of_block(sizeof(float) * grid.columns() * grid.tokens);
    grid.each(first, last, [&](int64_t token_block, int64_t n, int64_t most) {
      const int64_t columns = std::min(most, product.columns - n);
      const int64_t panels = divide_up(columns, kWidth);
      const int64_t token = token_block * grid.tokens;
      const int64_t rows = std::min(grid.tokens, tokens - token);
      const auto sums_at = [&](int64_t panel) {
        return sums_of_block.as<float>() + panel * kWidth * rows;
      };
      const auto add_blocks = [&](bool fresh, const auto& from, int64_t total,
                                  const Element* left_blocks) {
        const int64_t size = block_of(total);
        for (int64_t p = 0; p < total; p += size) {
          const int64_t count = std::min(size, total - p);
          A::panels(from, p, count, n, columns, panel_stride, block.as<Element>());
          for (int64_t panel = 0; panel < panels; ++panel) {
            add_panel<A>(fresh && p == 0, rows, round_up(count, A::kUnit) / A::kPair, kWidth,
                         left_blocks + (p / size * tokens + token) * A::kRowStride,
                         block.as<Element>() + panel * panel_stride, sums_at(panel));
          }
        }
      };
      if (depth + rank == 0) std::fill(sums_at(0), sums_at(panels), 0.0f);
      // first, for only this part is scaled by alpha2 and masked; alpha is 1 where it is there
      add_blocks(true, from_right2, rank, left2.as<Element>());
      if (rank > 0) scale_sums<Simd>(sums_at(0), panels * kWidth * rows, product.alpha2);
      if (rank > 0 && product.keep != nullptr) {
        for (int64_t m = 0; m < rows; ++m) {
          const uint8_t* keep = product.keep + (token + m) * product.columns + n;
          for (int64_t panel = 0; panel < panels; ++panel) {
            keep_sums<Simd>(sums_at(panel) + m * kWidth, std::min(kWidth, columns - panel * kWidth),
                            keep + panel * kWidth, product.keep_scale);
          }
        }
      }
      add_blocks(rank == 0, from_right, depth, left.as<Element>());
      const Output output = {product, rank == 0 ? product.alpha : 1.0f};
      for (int64_t panel = 0; panel < panels; ++panel) {
        output.template rows<Simd>(token, rows, n + panel * kWidth,
                                   std::min(kWidth, columns - panel * kWidth), sums_at(panel), kWidth);
      }
    });
  });
}

// Few rows of `left` are multiplied without a block: decoding is then most of the work, and each value
// is used as it leaves the register, by up to 4 rows.
inline bool has_few_tokens(const Product& product) {
  return product.transposed && product.rows <= kFewTokens && is_4bit(product.right.type) &&
         product.left.columns > 0 && product.left.columns % 64 == 0;
}

template <typename Simd>
float dot(const float* a, const float* b, int64_t count) {
  auto total = Simd::set(0.0f);
  int64_t i = 0;
  for (; i + Simd::kLanes <= count; i += Simd::kLanes) {
    total = Simd::fma(Simd::load(a + i), Simd::load(b + i), total);
  }
  float sum = Simd::sum(total);
  for (; i < count; ++i) sum += a[i] * b[i];
  return sum;
}

// A row of a plain matrix in fp32: where it lies if it is that already, else brought to `to`.
template <typename Simd>
const float* row_as_float(const Source<Simd>& from, const Matrix& matrix, int64_t row, float* to) {
  if (matrix.type == TUNESMITH_FLOAT32 && matrix.keep == nullptr) {
    return static_cast<const float*>(matrix.data) + row * matrix.columns;
  }
  from.fetch(row, 0, matrix.columns, to, InOrder());
  return to;
}

// Whether a product of few rows with a plain factor is too small to bring either into blocks.
inline bool is_small(const Product& product) {
  return product.transposed && product.rows <= kFewTokens && !is_4bit(product.right.type) &&
         product.left2.columns == 0 && product.keep == nullptr && product.left.columns > 0 &&
         product.columns * product.left.columns <= kGrain;
}

// Each of its sums on its own.
template <typename Simd>
void multiply_small(const Product& product) {
  const int64_t depth = product.left.columns;
  const Source<Simd> from_left(product.left), from_right(product.right);
  Scratch left(sizeof(float) * product.rows * depth), right(sizeof(float) * depth);
  for (int64_t m = 0; m < product.rows; ++m) {
    from_left.fetch(m, 0, depth, left.as<float>() + m * depth, InOrder());
  }
  const Output output = {product};
  for (int64_t n = 0; n < product.columns; ++n) {
    const float* const row = row_as_float(from_right, product.right, n, right.as<float>());
    for (int64_t m = 0; m < product.rows; ++m) {
      output(m, n, product.alpha * dot<Simd>(left.as<float>() + m * depth, row, depth));
    }
  }
}

// The scale of each 64 elements of a row, and zeros after the last up to a whole group.
template <typename Simd>
void fetch_scales_of_row(const Matrix& matrix, int64_t row, float* out) {
  fetch_scales<Simd>(matrix, row, 1, out);
  for (int64_t i = matrix.columns / 64; i % (Simd::kGroup / 64) != 0; ++i) out[i] = 0.0f;
}

// Rows [row, row + kRows) of the product. Simd decodes a group of codes at a time, in an order that
// suits it; left is brought into the same order.
template <typename Simd, int kRows>
void multiply_few_rows(const Product& product, int64_t row) {
  constexpr int64_t kLanes = Simd::kLanes, kGroup = Simd::kGroup, kBlocks = kGroup / 64;
  const Matrix& right = product.right;
  const int64_t depth = product.left.columns, groups = divide_up(depth, kGroup);
  const int64_t rank = product.left2.columns;
  const Source<Simd> from_left(product.left), from_left2(product.left2);
  const Source<Simd> from_right2(product.right2);
  Scratch in_order(sizeof(float) * depth);
  Scratch left(sizeof(float) * kRows * groups * kGroup);
  Scratch left2(sizeof(float) * kRows * rank);
  for (int64_t m = 0; m < kRows; ++m) {
    from_left.fetch(row + m, 0, depth, in_order.as<float>(), InOrder());
    float* to = left.as<float>() + m * groups * kGroup;
    for (int64_t begin = 0; begin < depth; begin += kGroup) {
      for (int64_t at = 0; at < kGroup; ++at) {
        const int64_t from = begin + Simd::source(at);
        to[begin + at] = from < depth ? in_order.as<float>()[from] : 0.0f;
      }
    }
    if (rank > 0) {
      float* const scaled = left2.as<float>() + m * rank;
      from_left2.fetch(row + m, 0, rank, scaled, InOrder());
      for (int64_t i = 0; i < rank; ++i) scaled[i] *= product.alpha2;
    }
  }
  const int64_t whole_groups = depth / kGroup;
  const auto* packed = static_cast<const uint8_t*>(right.data);
  const typename Simd::Codes codes(*right.table);
  const Output output = {product};
  parallel_for(product.columns, divide_up(kGrain, depth), [&](int64_t first, int64_t last) {
    // two rows of right at a time, so that one need not wait for the other
    constexpr int kMost = 2;  // rows of right at a time, which share what is loaded of left
    Scratch row2(sizeof(float) * rank);
    Scratch scales(sizeof(float) * kMost * groups * kBlocks);
    const auto multiply_columns = [&](int64_t n, auto together) {
      constexpr int kTogether = decltype(together)::value;
      for (int c = 0; c < kTogether; ++c) {
        fetch_scales_of_row<Simd>(right, n + c, scales.as<float>() + c * groups * kBlocks);
      }
      typename Simd::V total[kTogether][kRows];
      for (auto& sums : total) {
        for (auto& sum : sums) sum = Simd::set(0.0f);
      }
      const uint8_t* codes_of_row = packed + n * depth / 2;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t blocks = g < whole_groups ? kBlocks : kBlocks - 1;
        const float* values = left.as<float>() + g * kGroup;
        for (int c = 0; c < kTogether; ++c) {
          const uint8_t* at = codes_of_row + (c * depth + g * kGroup) / 2;
          __builtin_prefetch(at + kTogether * depth / 2);  // the same place of the next rows
          // two sums for each row of left, so that one need not wait for the other
          typename Simd::V sums[kRows][2];
          for (int m = 0; m < kRows; ++m) sums[m][0] = sums[m][1] = Simd::set(0.0f);
          Simd::decode_group(at, blocks, codes, [&](int i, typename Simd::V decoded) {
            for (int m = 0; m < kRows; ++m) {
              const auto lanes = Simd::load(values + m * groups * kGroup + i * kLanes);
              sums[m][i % 2] = Simd::fma(decoded, lanes, sums[m][i % 2]);
            }
          });
          const auto scale = Simd::spread(scales.as<float>() + (c * groups + g) * kBlocks);
          for (int m = 0; m < kRows; ++m) {
            total[c][m] = Simd::fma(Simd::add(sums[m][0], sums[m][1]), scale, total[c][m]);
          }
        }
      }
      for (int c = 0; c < kTogether; ++c) {
        const float* low_rank = nullptr;
        if (rank > 0) low_rank = row_as_float(from_right2, product.right2, n + c, row2.as<float>());
        for (int64_t m = 0; m < kRows; ++m) {
          // summed up together with what the adapter adds, which is scaled already
          const float* const scaled = left2.as<float>() + m * rank;
          auto all = Simd::mul(total[c][m], Simd::set(product.alpha));
          int64_t i = 0;
          for (; i + kLanes <= rank; i += kLanes) {
            all = Simd::fma(Simd::load(scaled + i), Simd::load(low_rank + i), all);
          }
          float sum = Simd::sum(all);
          for (; i < rank; ++i) sum += scaled[i] * low_rank[i];
          output(row + m, n + c, sum);
        }
      }
    };
    int64_t n = first;
    for (; n + kMost <= last; n += kMost) {
      multiply_columns(n, std::integral_constant<int, kMost>());
    }
    if (n < last) multiply_columns(n, std::integral_constant<int, 1>());
  });
}

// Calls use(count, row) for up to 4 rows of the product at a time, `count` a constant.
template <typename Use>
void for_few_rows(const Product& product, Use use) {
  for (int64_t row = 0; row < product.rows; row += 4) {
    switch (product.rows - row) {
      case 1: use(std::integral_constant<int, 1>(), row); break;
      case 2: use(std::integral_constant<int, 2>(), row); break;
      case 3: use(std::integral_constant<int, 3>(), row); break;
      default: use(std::integral_constant<int, 4>(), row);
    }
  }
}

// Whether a sum of values times codes, which is scaled last, might overflow or lose what is small
// where the product of the scaled ones does not.
inline bool has_extreme_values(const Matrix& matrix, int64_t rows) {
  const int64_t count = rows * matrix.columns;
  bool extreme = false;
  if (matrix.type == TUNESMITH_FLOAT32) {
    constexpr float kInfinity = __builtin_inff();
    const auto* values = static_cast<const float*>(matrix.data);
    for (int64_t i = 0; i < count; ++i) {
      const float size = values[i] < 0.0f ? -values[i] : values[i];
      extreme |= ((size > 1e30f) & (size < kInfinity)) | ((size > 0.0f) & (size < 1e-30f));
    }
  } else if (matrix.type == TUNESMITH_BFLOAT16) {
    constexpr int kLarge = 0x7149, kSmall = 0x0DA2, kInfinity = 0x7F80;  // 1e30, 1e-30
    const auto* values = static_cast<const uint16_t*>(matrix.data);
    for (int64_t i = 0; i < count; ++i) {
      const int size = values[i] & 0x7FFF;
      extreme |= ((size > kLarge) & (size < kInfinity)) | ((size > 0) & (size < kSmall));
    }
  }
  return extreme;
}

template <typename Simd>
void multiply_few(const Product& product) {
  for_few_rows(product, [&](auto count, int64_t row) {
    multiply_few_rows<Simd, decltype(count)::value>(product, row);
  });
}

}  // namespace
}  // namespace tunesmith
