// What a product is asked for: its factors, plain or in 4 bits, and where its sums go.
#pragma once

#include <cstdint>

#include "../four_bit.h"
#include "../kernels.h"

namespace tunesmith {

// Bytes of an element of a plain type.
inline int64_t size_of(int type) { return type == TUNESMITH_FLOAT32 ? 4 : 2; }

// Rows of `columns` elements without gaps: plain values, some of which a mask may drop, or 4-bit
// codes.
struct Matrix {
  const void* data;
  int type;
  int64_t columns;
  // 4-bit only
  const FourBitTable* table;
  const void* absmax;
  const float* nested_absmax;
  float nested_offset;
  int64_t blocksize;
  // plain only; null keeps all
  const uint8_t* keep;
  float keep_scale;
};

// out = alpha left right + bias + alpha2 left2 right2, left [M, P] and left2 [M, R] plain. `right`
// is [P, N], or [N, P] and used transposed; right2 [R, N] or [N, R] likewise. A factor without data
// is left out with its product.
struct Product {
  Matrix left;
  Matrix right;
  bool transposed;
  float alpha;
  const void* bias;  // [N], of type out_type
  Matrix left2;
  Matrix right2;
  float alpha2;
  // drops elements of left2 right2; only where right is not transposed
  const uint8_t* keep;
  float keep_scale;
  // element (m, n) is out[m * row_stride + n * column_stride]
  void* out;
  int out_type;
  int64_t row_stride;
  int64_t column_stride;
  int64_t rows;     // M
  int64_t columns;  // N
  bool accumulate;
  bool exact;  // multiply in fp32 even where bf16 would do
};

inline Matrix plain_matrix(const void* data, int type, int64_t columns) {
  Matrix matrix = {};
  matrix.data = data;
  matrix.type = type;
  matrix.columns = columns;
  return matrix;
}

// out [rows, columns] = left right.
inline Product product_of(const Matrix& left, const Matrix& right, int64_t rows, int64_t columns,
                          void* out, int out_type) {
  Product product = {};
  product.left = left;
  product.right = right;
  product.alpha = 1.0f;
  product.alpha2 = 1.0f;
  product.out = out;
  product.out_type = out_type;
  product.row_stride = columns;
  product.column_stride = 1;
  product.rows = rows;
  product.columns = columns;
  return product;
}

// Up to this many rows a product need not pack its factors, and a linear layer's tokens are
// projected into the low rank one by one.
constexpr int64_t kFewTokens = 8;

}  // namespace tunesmith
