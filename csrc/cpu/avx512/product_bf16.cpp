// Products with AVX512-BF16: 32 products of bf16 pairs at a time, summed in fp32, where x is bf16.
//
// Everything else is that of AVX-512.
#include "product_bf16.h"
#include "../isa.h"

namespace tunesmith {
namespace {

// multiply_few_rows of product_few.h in pairs of bf16. Two rows of right share each load of left.
template <int kRows>
void multiply_few_pairs(const Product& product, int64_t row) {
  const Matrix& right = product.right;
  const int64_t depth = product.left.columns, groups = depth / kGroup;
  const int64_t rank = product.left2.columns;
  const Source<Avx512> from_left2(product.left2), from_right2(product.right2);
  Scratch left(sizeof(uint16_t) * kRows * depth);
  Scratch left2(sizeof(float) * kRows * rank);
  for (int64_t m = 0; m < kRows; ++m) {
    const auto* from = static_cast<const uint16_t*>(product.left.data) + (row + m) * depth;
    uint16_t* to = left.as<uint16_t>() + m * depth;
    for (int64_t at = 0; at < depth; ++at) {
      to[at] = from[at / kGroup * kGroup + source(at % kGroup)];
    }
    if (rank > 0) from_left2.fetch(row + m, 0, rank, left2.as<float>() + m * rank, InOrder());
  }
  const auto* packed = static_cast<const uint8_t*>(right.data);
  const Output output = {product};
  parallel_for(product.columns, divide_up(kGrain, depth), [&](int64_t first, int64_t last) {
    Scratch row2(sizeof(float) * rank);
    Scratch scales(sizeof(float) * 2 * groups);
    const auto multiply_columns = [&](int64_t n, auto together) {
      constexpr int kTogether = decltype(together)::value;
      __m512 total[kTogether][kRows];
      for (auto& sums : total) {
        for (auto& sum : sums) sum = _mm512_setzero_ps();
      }
      fetch_scales<Avx512>(right, n, kTogether, scales.as<float>());
      for (int64_t g = 0; g < groups; ++g) {
        __m512i dequantized[kTogether][kGroupVectors];
        for (int c = 0; c < kTogether; ++c) {
          const int64_t begin = (n + c) * depth + g * kGroup;
          __builtin_prefetch(packed + (begin + kTogether * depth) / 2);
          dequantize_group(packed + begin / 2, *right.table, scales.as<float>()[c * groups + g],
                           [&](int i, __m512i values) { dequantized[c][i] = values; });
        }
        const uint16_t* values = left.as<uint16_t>() + g * kGroup;
        for (int i = 0; i < kGroupVectors; ++i) {
          for (int m = 0; m < kRows; ++m) {
            const __m512i lanes = load_bits(values + m * depth + 32 * i);
            for (int c = 0; c < kTogether; ++c) {
              total[c][m] = add_pairs(total[c][m], dequantized[c][i], lanes);
            }
          }
        }
      }
      for (int c = 0; c < kTogether; ++c) {
        if (rank > 0) from_right2.fetch(n + c, 0, rank, row2.as<float>(), InOrder());
        for (int64_t m = 0; m < kRows; ++m) {
          float sum = product.alpha * Avx512::sum(total[c][m]);
          if (rank > 0) {
            sum +=
                product.alpha2 * dot<Avx512>(left2.as<float>() + m * rank, row2.as<float>(), rank);
          }
          output(row + m, n + c, sum);
        }
      }
    };
    int64_t n = first;
    for (; n + 2 <= last; n += 2) multiply_columns(n, std::integral_constant<int, 2>());
    if (n < last) multiply_columns(n, std::integral_constant<int, 1>());
  });
}

void multiply_few_pairs(const Product& product) {
  for_few_rows(product, [&](auto count, int64_t row) {
    multiply_few_pairs<decltype(count)::value>(product, row);
  });
}

}  // namespace

void multiply_avx512_bf16(const Product& product) {
  if (!multiplies_pairs(product)) return multiply_avx512(product);
  if (has_few_tokens(product)) return multiply_few_pairs(product);
  if (product.transposed) return multiply_transposed<BFloat16Arithmetic<2>>(product);
  multiply_plain<BFloat16Arithmetic<2>>(product);
}

}  // namespace tunesmith
