// Products of few rows, for which packing as product.h does it is not worth their while.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../kernels.h"
#include "matrix.h"
#include "parallel.h"
#include "pool.h"
#include "product.h"
#include "source.h"

namespace tunesmith {
namespace {

// Few rows of `left` are multiplied without a block: dequantizing is then most of the work, and
// each value is used as it leaves the register, by up to 4 rows.
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

// Whether a product of few rows with a plain factor is too small to pack either.
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

// Rows [row, row + kRows) of the product. Simd dequantizes a group of codes at a time, in an order
// that suits it; left is reordered likewise.
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
    constexpr int kMax = 2;  // rows of right at a time, which share what is loaded of left
    Scratch row2(sizeof(float) * rank);
    Scratch scales(sizeof(float) * kMax * groups * kBlocks);
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
          Simd::dequantize_group(at, blocks, codes, [&](int i, typename Simd::V dequantized) {
            for (int m = 0; m < kRows; ++m) {
              const auto lanes = Simd::load(values + m * groups * kGroup + i * kLanes);
              sums[m][i % 2] = Simd::fma(dequantized, lanes, sums[m][i % 2]);
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
    for (; n + kMax <= last; n += kMax) {
      multiply_columns(n, std::integral_constant<int, kMax>());
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
