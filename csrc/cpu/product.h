// Matrix products with a 4-bit factor, written once for every instruction set.
//
// A file that includes this supplies `Arithmetic`: how numbers are held, loaded and multiplied. The
// scheme is that of Goto and van de Geijn (doi:10.1145/1356052.1356053): both factors are packed
// into blocks that fit the caches, and a tile of sums stays in registers while the depth runs. What
// a 4-bit factor adds is that packing means dequantizing: each code is dequantized once per call
// (or once per kTokens rows of `left`), into a block that no one sees but the core that multiplies
// it.
//
//   transposed    sums[n][m] += right[n][p] * left[m][p]   right gives the rows, left the panels
//   otherwise     sums[m][n] += left[m][p] * right[p][n]   left gives the rows, right the panels
//
// Rows are [row][kRowStride] with p running; a panel is [p][width] with the lanes running. An
// arithmetic that multiplies pairs (kPair = 2) has two p side by side in each place. Where the
// depth is no multiple of kUnit, which an arithmetic multiplies at once, both are filled up with
// zeros.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../kernels.h"
#include "elements.h"
#include "matrix.h"
#include "parallel.h"
#include "pool.h"
#include "source.h"

namespace tunesmith {
namespace {

// Adds `rows` rows times one panel of Count vectors to sums [rows][width], or puts them there where
// kFresh says that nothing is there yet.
template <typename A, bool kFresh, int Count, int R>
void add_tiles(int64_t rows, int64_t depth, const typename A::Element* left,
               const typename A::Element* panel, float* sums) {
  constexpr int64_t kWidth = int64_t(Count) * A::kLanes;
  while (rows >= R) {
    A::template tile<kFresh, R, Count>(depth, left, panel, sums);
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
  return std::min<int64_t>(A::kDepth,
                           round_up(divide_up(depth, divide_up(depth, A::kDepth)), unit));
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

// Once `count` rows of `left` have been multiplied, a block of `right` is dequantized anew: by then
// dequantizing is a small part, and the sums, kTokens by a block, still fit the second-level cache.
constexpr int64_t kTokens = 512;
// right's rows (transposed) or columns that one core dequantizes and multiplies at a time
constexpr int64_t kBlockRows = 128;
constexpr int64_t kBlockColumns = 256;
// up to kTokensOfFewRows tokens so many rows, which then stay in the first-level cache; with more
// it is left that is read anew for each block, and the blocks should be fewer
constexpr int64_t kFewBlockRows = 64;
constexpr int64_t kTokensOfFewRows = 128;
// of rows at best a multiple of this is packed at once: so many codes are dequantized together
constexpr int64_t kRowsUnit = 64;
// fewer multiplications than this are not worth a second thread
constexpr int64_t kGrain = int64_t(1) << 16;

// How a product is cut into units that threads share: some columns of some tokens.
struct Grid {
  int64_t tokens;  // of one unit
  int64_t token_blocks;
  int64_t unit;      // how many columns one has
  int64_t units;     // that make up all columns
  int64_t together;  // units side by side that are multiplied at once, at most

  int64_t count() const { return token_blocks * units; }
  int64_t columns() const { return together * unit; }

  // How much work less than which is not worth a second thread is in units.
  int64_t grain(int64_t depth) const {
    return divide_up(kGrain, tokens * unit * std::max<int64_t>(depth, 1));
  }

  // Calls use(block of tokens, first column, columns) for units [first, last), of up to columns()
  // that lie side by side, and not many with one and few with the next.
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
  const int64_t threads =
      std::max<int64_t>(1, std::min(max_threads(), tokens * columns * depth / kGrain));
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
    if (product.bias != nullptr) sum += load_float(product.bias, product.out_type, n);
    if (product.accumulate) sum += load_float(product.out, product.out_type, at);
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
        if (bias != nullptr) sum += load_float(bias, kType, n + i);
        if (accumulate) sum += load_float(out, kType, at);
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
    Simd::store(sums + i, Simd::masked(Simd::load(sums + i), keep + i, keep_scale));
  }
  for (; i < count; ++i) sums[i] = keep[i] ? sums[i] * keep_scale : 0.0f;
}

// Whether left2 right2 is all there is, and so shallow that it is done at once.
template <typename A>
bool is_low_rank(const Product& product) {
  const int64_t rank = product.left2.columns;
  return product.left.columns == 0 && rank > 0 && rank <= A::kDepth;
}

// Does such a product. The output, read and written once, is most of the work: whole rows of it are
// done one after the other.
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
        A::pack_panel_of_rows(from_right2, n, columns, kWidth, to);
      } else {
        A::pack_panels(from_right2, 0, rank, n, columns, kWidth * padded_rank, to);
      }
    }
  });
  const Output output = {product, product.keep == nullptr ? product.alpha2 : 1.0f};
  const int64_t groups = divide_up(product.rows, kRows);
  const int64_t grain = divide_up(kGrain, kRows * rank * product.columns);
  parallel_for(groups, grain, [&](int64_t first, int64_t last) {
    [[maybe_unused]] const typename A::ThreadState state = {};
    Scratch left(sizeof(Element) * kRows * A::kRowStride);
    std::fill(left.as<Element>(), left.as<Element>() + kRows * A::kRowStride, Element(0));
    // two, so that the next sums are begun before these are written
    alignas(64) float sums[2][kRows * kWidth];
    for (int64_t group = first; group < last; ++group) {
      const int64_t m = group * kRows, rows = std::min<int64_t>(kRows, product.rows - m);
      A::pack_rows(from_left2, m, rows, 0, rank, left.as<Element>());
      for (int64_t panel = 0; panel <= panels; ++panel) {
        if (panel < panels) {
          A::template tile<true, kRows, 2>(padded_rank / A::kPair, left.as<Element>(),
                                           right.as<Element>() + panel * kWidth * padded_rank,
                                           sums[panel % 2]);
        }
        if (panel == 0) continue;
        float* const done = sums[(panel - 1) % 2];
        const int64_t n = (panel - 1) * kWidth, columns = std::min(kWidth, product.columns - n);
        for (int64_t r = 0; r < rows && product.keep != nullptr; ++r) {
          scale_sums<Simd>(done + r * kWidth, kWidth, product.alpha2);
          keep_sums<Simd>(done + r * kWidth, columns, product.keep + (m + r) * product.columns + n,
                          product.keep_scale);
        }
        output.template rows<Simd>(m, rows, n, columns, done, kWidth);
      }
    }
  });
}

// How far rows of transposed sums are apart: not by a power of two, which would fall on few cache
// sets.
template <typename A>
constexpr int64_t kTransposedStride = kBlockRows + A::kTileRows + A::kLanes;

// Writes kLanes lanes of `rows` rows of sums, `width` apart, as rows.
template <typename A>
void transpose_lanes(const float* sums, int64_t rows, int64_t width, float* to) {
  constexpr int64_t kLanes = A::kLanes;
  int64_t r = 0;
  for (; r + kLanes <= rows; r += kLanes) {
    A::Vectors::transpose(sums + r * width, width, to + r, kTransposedStride<A>);
  }
  for (; r < rows; ++r) {
    for (int64_t lane = 0; lane < kLanes; ++lane)
      to[lane * kTransposedStride<A> + r] = sums[r * width + lane];
  }
}

// Whether so few tokens are multiplied by a function of their own, which some arithmetics have.
template <typename A>
bool adds_few_tokens(int64_t tokens, [[maybe_unused]] const typename A::From& right) {
  if constexpr (A::kFew > 0) {
    return tokens <= A::kFew && right.grouped();
  } else {
    return false;
  }
}

// How wide their panel is: it is read anew for each block of rows, so zeros are left out.
template <typename A>
int64_t lanes_of_few(int64_t tokens) {
  int64_t lanes = 4;
  while (lanes < tokens) lanes *= 2;
  return lanes;
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
  A::agree_on_order(from_left, from_right);
  const typename A::From from_left2(product.left2), from_right2(product.right2);
  const int64_t padded_depth = round_up(depth, A::kUnit), padded_rank = round_up(rank, A::kUnit);
  Scratch left(sizeof(Element) * tokens.panels() * kWidth * padded_depth);
  Scratch left2(sizeof(Element) * tokens.panels() * kWidth * padded_rank);
  const bool few = adds_few_tokens<A>(product.rows, from_right);
  parallel_for(tokens.panels(), divide_up(kGrain / 4, kWidth * std::max<int64_t>(depth, 1)),
               [&](int64_t first, int64_t last) {
                 for (int64_t i = first; i < last; ++i) {
                   const int64_t m = i * kWidth, used = tokens.used(i), width = tokens.width(i);
                   A::pack_panel_of_rows(from_left, m, used, few ? lanes_of_few<A>(used) : width,
                                         left.as<Element>() + m * padded_depth);
                   if (rank > 0) {
                     A::pack_panel_of_rows(from_left2, m, used, width,
                                           left2.as<Element>() + m * padded_rank);
                   }
                 }
               });

  const int64_t max_rows = product.rows > kTokensOfFewRows ? kBlockRows : kFewBlockRows;
  const int64_t rows_of_block = round_up(max_rows, A::kTileRows);
  // add_few_tokens takes as long for part of a block as for a whole one
  const int64_t unit = few ? rows_of_block : A::kTileRows;
  const int64_t block_depth = depth_of_blocks<A>(depth, kRowsUnit);
  const Grid grid =
      make_grid(product.rows, product.columns, depth + rank, kWidth, unit, rows_of_block);
  parallel_for(grid.count(), grid.grain(depth + rank), [&](int64_t first, int64_t last) {
    [[maybe_unused]] const typename A::ThreadState state = {};
    // add_few_tokens takes room for a whole block however few rows there are
    Scratch block(sizeof(Element) * rows_of_block * A::kRowStride);
    Scratch sums_of_block(sizeof(float) * rows_of_block * round_up(grid.tokens, kWidth));
    Scratch scales(sizeof(float) * Scales<Simd>::count(product.right, rows_of_block));
    typename A::From rows_from = from_right;
    bool begun = false;
    grid.each(first, last, [&](int64_t token_block, int64_t n, int64_t columns) {
      const int64_t rows = std::min(columns, product.columns - n);
      if (few && !begun) {  // each block prefetches the next one, and nobody the first
        for (int64_t r = 0; r < rows; ++r) rows_from.prefetch(n + r, 0, depth);
      }
      begun = true;
      if (depth > 0) rows_from.hold_scales(n, rows, scales.as<float>());
      const int64_t token = token_block * grid.tokens;
      const int64_t first_panel = token / kWidth;
      const int64_t last_panel = divide_up(std::min(token + grid.tokens, product.rows), kWidth);
      const auto sums_at = [&](int64_t i) {
        return sums_of_block.as<float>() + (i - first_panel) * kWidth * rows_of_block;
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
        A::pack_rows(from_right2, n, rows, p, count, block.as<Element>());
        add_block(p == 0, p, count, left2.as<Element>(), padded_rank);
      }
      for (int64_t i = first_panel; i < last_panel; ++i) {
        if (rank > 0) scale_sums<Simd>(sums_at(i), rows * tokens.width(i), product.alpha2);
      }
      bool fresh = rank == 0 && depth > 0 && !few;
      if (rank == 0 && !fresh) std::fill(sums_at(first_panel), sums_at(last_panel), 0.0f);
      if constexpr (A::kFew > 0) {
        if (few) {
          A::add_few_tokens(rows_from, n, rows, lanes_of_few<A>(product.rows), left.as<Element>(),
                            block.as<Element>(), sums_at(first_panel));
        }
      }
      for (int64_t p = 0; p < depth && !few; p += block_depth) {
        const int64_t count = std::min<int64_t>(block_depth, depth - p);
        A::pack_rows(rows_from, n, rows, p, count, block.as<Element>());
        add_block(fresh, p, count, left.as<Element>(), padded_depth);
        fresh = false;
      }
      const Output output = {product, rank == 0 ? product.alpha : 1.0f};
      alignas(64) float transposed[A::kLanes * kTransposedStride<A>];
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
          transpose_lanes<A>(sums_at(i) + lane, rows, width, transposed);
          output.template rows<Simd>(i * kWidth + lane, lanes, n, rows, transposed,
                                     kTransposedStride<A>);
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
  const int64_t blocks = divide_up(depth, block_of(depth)),
                blocks2 = divide_up(rank, block_of(rank));
  // [block of the depth][token][kRowStride]
  Scratch left(sizeof(Element) * blocks * tokens * A::kRowStride);
  Scratch left2(sizeof(Element) * blocks2 * tokens * A::kRowStride);
  parallel_for(tokens, divide_up(kGrain / 4, std::max<int64_t>(depth, 1)),
               [&](int64_t first, int64_t last) {
                 const auto pack = [&](const auto& from, int64_t columns, Element* to) {
                   const int64_t size = block_of(columns);
                   for (int64_t p = 0; p < columns; p += size) {
                     A::pack_rows(from, first, last - first, p, std::min(size, columns - p),
                                  to + (p / size * tokens + first) * A::kRowStride);
                   }
                 };
                 pack(from_left, depth, left.as<Element>());
                 pack(from_left2, rank, left2.as<Element>());
               });

  const Grid grid =
      make_grid(tokens, product.columns, depth + rank, A::kTileRows, kWidth, kBlockColumns);
  constexpr int64_t panel_stride = kWidth * A::kDepth;  // kDepth is a multiple of kUnit
  parallel_for(grid.count(), grid.grain(depth + rank), [&](int64_t first, int64_t last) {
    [[maybe_unused]] const typename A::ThreadState state = {};
    Scratch block(sizeof(Element) * grid.columns() * A::kDepth);
    Scratch sums_of_block(sizeof(float) * grid.columns() * grid.tokens);
    grid.each(first, last, [&](int64_t token_block, int64_t n, int64_t max_columns) {
      const int64_t columns = std::min(max_columns, product.columns - n);
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
          A::pack_panels(from, p, count, n, columns, panel_stride, block.as<Element>());
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
                                   std::min(kWidth, columns - panel * kWidth), sums_at(panel),
                                   kWidth);
      }
    });
  });
}

}  // namespace
}  // namespace tunesmith
