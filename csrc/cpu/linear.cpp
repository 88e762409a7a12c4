// The linear layer of kernels.h, forward and backward, as a few products.
#include "../kernels.h"
#include "../four_bit.h"
#include "dispatch.h"
#include "elements.h"
#include "matrix.h"
#include "pool.h"

namespace tunesmith {
namespace {

// What the layer is made of, as the products take it.
struct Parts {
  const tunesmith_linear& linear;

  int64_t tokens() const { return linear.tokens; }
  int64_t in() const { return linear.in_features; }
  int64_t out() const { return linear.out_features; }
  int64_t rank() const { return linear.rank; }

  // [out, in]
  Matrix weight() const {
    Matrix matrix = plain_matrix(linear.weight, linear.type, in());
    matrix.table = table_of(linear.type);
    matrix.absmax = linear.absmax;
    matrix.nested_absmax = linear.nested_absmax;
    matrix.nested_offset = linear.nested_offset == nullptr ? 0.0f : *linear.nested_offset;
    matrix.blocksize = linear.blocksize;
    return matrix;
  }

  // [tokens, in], as the adapter sees it
  Matrix dropped(const void* x) const {
    Matrix matrix = plain_matrix(x, linear.dtype, in());
    matrix.keep = linear.keep;
    matrix.keep_scale = linear.keep_scale;
    return matrix;
  }

  Matrix lora_a() const { return plain_matrix(linear.lora_a, linear.adapter_dtype, in()); }
  Matrix lora_b() const { return plain_matrix(linear.lora_b, linear.adapter_dtype, rank()); }

  Product product_of(const Matrix& left, const Matrix& right, void* out, int out_type, int64_t rows,
                     int64_t columns) const {
    Product product = tunesmith::product_of(left, right, rows, columns, out, out_type);
    // where x is bf16 the adapter may be rounded to it, as it is under PyTorch's autocast
    product.exact = linear.dtype != TUNESMITH_BFLOAT16;
    return product;
  }

  // Does out [tokens, rank] = alpha x smallᵀ for a small [rank, P]. The small factor is what is
  // packed into panels as a whole; x, the large one, is read once, some tokens at a time. Few
  // tokens are not worth a panel.
  void project(const Matrix& x, const Matrix& small, float alpha, float* out) const {
    const bool few = tokens() <= kFewTokens;
    Product product = few ? product_of(x, small, out, TUNESMITH_FLOAT32, tokens(), rank())
                          : product_of(small, x, out, TUNESMITH_FLOAT32, rank(), tokens());
    product.transposed = true;
    if (few) {
      product.exact = true;
    } else {
      product.row_stride = 1;
      product.column_stride = rank();
    }
    product.alpha = alpha;
    multiply(product);
  }
};

typedef float Float4 __attribute__((vector_size(16)));

inline Float4 load_four(const float* from) {
  Float4 four;
  __builtin_memcpy(&four, from, sizeof four);
  return four;
}

// Four rows of 4, `stride` apart, to four columns, `to_stride` apart.
inline void transpose_four(const float* from, int64_t stride, float* to, int64_t to_stride) {
  const Float4 a = load_four(from), b = load_four(from + stride);
  const Float4 c = load_four(from + 2 * stride), d = load_four(from + 3 * stride);
  const Float4 ab = __builtin_shufflevector(a, b, 0, 4, 1, 5),
               cd = __builtin_shufflevector(c, d, 0, 4, 1, 5);
  const Float4 ef = __builtin_shufflevector(a, b, 2, 6, 3, 7),
               gh = __builtin_shufflevector(c, d, 2, 6, 3, 7);
  const Float4 columns[4] = {
      __builtin_shufflevector(ab, cd, 0, 1, 4, 5), __builtin_shufflevector(ab, cd, 2, 3, 6, 7),
      __builtin_shufflevector(ef, gh, 0, 1, 4, 5), __builtin_shufflevector(ef, gh, 2, 3, 6, 7)};
  for (int64_t i = 0; i < 4; ++i)
    __builtin_memcpy(to + i * to_stride, &columns[i], sizeof columns[i]);
}

// [rows, columns] of any plain type to [columns, rows] fp32.
void transpose(const void* from, int type, int64_t rows, int64_t columns, float* to) {
  constexpr int64_t kLine = 16;  // so that whole cache lines are written
  const auto convert = [&](int64_t first_column, auto value_at) {
    for (int64_t first = 0; first < rows; first += kLine) {
      const int64_t last = first + kLine < rows ? first + kLine : rows;
      for (int64_t c = first_column; c < columns; ++c) {
        for (int64_t r = first; r < last; ++r) to[c * rows + r] = value_at(r * columns + c);
      }
    }
  };
  if (type != TUNESMITH_FLOAT32) {
    return with_element(type, [&](auto element) {
      using Element = decltype(element);
      const auto* elements = static_cast<const typename Element::Storage*>(from);
      convert(0, [=](int64_t i) { return Element::widen(elements[i]); });
    });
  }
  const auto* floats = static_cast<const float*>(from);
  const int64_t in_fours = rows % 4 == 0 ? columns / 4 * 4 : 0;
  for (int64_t first = 0; first < rows; first += kLine) {
    for (int64_t c = 0; c < in_fours; c += 4) {
      for (int64_t r = first; r < first + kLine && r < rows; r += 4) {
        transpose_four(floats + r * columns + c, columns, to + c * rows + r, rows);
      }
    }
  }
  convert(in_fours, [=](int64_t i) { return floats[i]; });
}

// B [out, rank] as [rank, out] fp32, which `to` has room for.
Matrix transposed_b(const Parts& parts, float* to) {
  const tunesmith_linear& linear = parts.linear;
  transpose(linear.lora_b, linear.adapter_dtype, parts.out(), parts.rank(), to);
  return plain_matrix(to, TUNESMITH_FLOAT32, parts.out());
}

}  // namespace
}  // namespace tunesmith

using namespace tunesmith;

void tunesmith_linear_project_cpu(const tunesmith_linear* linear, const void* x, float* s) {
  const Parts parts = {*linear};
  if (parts.rank() > 0) parts.project(parts.dropped(x), parts.lora_a(), 1.0f, s);
}

void tunesmith_linear_cpu(const tunesmith_linear* linear, const void* x, float* s, void* y,
                          bool accumulate) {
  const Parts parts = {*linear};
  const int64_t tokens = parts.tokens(), rank = parts.rank();
  tunesmith_linear_project_cpu(linear, x, s);
  Matrix input = plain_matrix(x, linear->dtype, parts.in());
  Matrix weight = parts.weight();
  if (linear->weight == nullptr) input.columns = weight.columns = 0;
  Product product = parts.product_of(input, weight, y, linear->dtype, tokens, parts.out());
  product.transposed = true;
  product.bias = linear->bias;
  product.accumulate = accumulate;
  if (rank > 0) {
    product.left2 = plain_matrix(s, TUNESMITH_FLOAT32, rank);
    product.right2 = parts.lora_b();
    product.alpha2 = linear->scaling;
  }
  multiply(product);
}

void tunesmith_linear_backward_cpu(const tunesmith_linear* linear, const void* x, const float* s,
                                   const void* grad_y, void* grad_x, void* grad_a, void* grad_b,
                                   bool accumulate) {
  const Parts parts = {*linear};
  const int64_t tokens = parts.tokens(), rank = parts.rank();
  const Matrix grad_out = plain_matrix(grad_y, linear->dtype, parts.out());
  // what flows into s, worked out once for both grad_x and grad_a
  Scratch grad_s(sizeof(float) * tokens * rank);
  if (rank > 0 && (grad_x != nullptr || grad_a != nullptr)) {
    Scratch lora_b(sizeof(float) * parts.out() * rank);
    parts.project(grad_out, transposed_b(parts, lora_b.as<float>()), linear->scaling,
                  grad_s.as<float>());
  }
  if (grad_x != nullptr) {
    Matrix left = grad_out;
    if (linear->weight == nullptr) left.columns = 0;
    Product product =
        parts.product_of(left, parts.weight(), grad_x, linear->dtype, tokens, parts.in());
    product.accumulate = accumulate;
    if (rank > 0) {
      product.left2 = plain_matrix(grad_s.as<float>(), TUNESMITH_FLOAT32, rank);
      product.right2 = parts.lora_a();
      product.keep = linear->keep;
      product.keep_scale = linear->keep_scale;
    }
    multiply(product);
  }
  if (rank == 0) return;
  Scratch transposed(sizeof(float) * tokens * rank);
  const Matrix left = plain_matrix(transposed.as<float>(), TUNESMITH_FLOAT32, tokens);
  if (grad_a != nullptr) {
    transpose(grad_s.as<float>(), TUNESMITH_FLOAT32, tokens, rank, transposed.as<float>());
    Product product =
        parts.product_of(left, parts.dropped(x), grad_a, linear->adapter_dtype, rank, parts.in());
    multiply(product);
  }
  if (grad_b != nullptr) {
    transpose(s, TUNESMITH_FLOAT32, tokens, rank, transposed.as<float>());
    // rank rows are few: it is the transpose of grad_b that comes out, and is written as grad_b
    Product product =
        parts.product_of(left, grad_out, grad_b, linear->adapter_dtype, rank, parts.out());
    product.row_stride = 1;
    product.column_stride = rank;
    product.alpha = linear->scaling;
    multiply(product);
  }
}
