// 16 fp32 at a time, for the products of both AVX-512 files.
#pragma once

#include "vectors.h"
#include "../product.h"
#include "../product_few.h"
#include "../product_fp32.h"

namespace tunesmith {
namespace {

struct Avx512 {
  using V = __m512;
  static constexpr int kLanes = 16;
  // 12 x 2 sums and 2 vectors of a panel; a broadcast comes with the multiplication
  static constexpr int kTileRows = 12;
  // a panel of 32 KiB stays in the first-level cache, with the rows of a tile beside it
  static constexpr int kDepth = 256;

  using Codes = const FourBitTable&;

  static V set(float value) { return _mm512_set1_ps(value); }
  static V broadcast(const float* at) { return _mm512_set1_ps(*at); }
  static V load(const float* at) { return _mm512_loadu_ps(at); }
  static void store(float* at, V values) { _mm512_storeu_ps(at, values); }
  static V add(V a, V b) { return _mm512_add_ps(a, b); }
  static V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(V values) { return _mm512_reduce_add_ps(values); }

  static V load(const void* data, int type, int64_t at) {
    switch (type) {
      case TUNESMITH_FLOAT16: return Float16::load(static_cast<const uint16_t*>(data) + at);
      case TUNESMITH_BFLOAT16: return BFloat16::load(static_cast<const uint16_t*>(data) + at);
      default: return load(static_cast<const float*>(data) + at);
    }
  }

  static void store(void* data, int type, int64_t at, V values) {
    if (type == TUNESMITH_FLOAT32) return store(static_cast<float*>(data) + at, values);
    const __m256i halves =
        type == TUNESMITH_FLOAT16 ? Float16::narrow(values) : BFloat16::narrow(values);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(data) + at), halves);
  }

  // Writes the transpose of kLanes x kLanes floats; the rows are as far apart as the strides say.
  static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    tunesmith::transpose(from, stride,
                         [&](int64_t i, __m512i row) { store_bits(to + i * to_stride, row); });
  }

  static V masked(V values, const uint8_t* keep, float keep_scale) {
    const __m512i words =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(keep)));
    return _mm512_maskz_mul_ps(_mm512_test_epi32_mask(words, words), values, set(keep_scale));
  }

  static void fetch_scales(const Matrix& matrix, int64_t first, int64_t count, float* out) {
    if (matrix.nested_absmax == nullptr) return tunesmith::fetch_scales(matrix, first, count, out);
    const auto* codes = static_cast<const uint8_t*>(matrix.absmax);
    for (int64_t i = 0; i < count;) {
      // those that share one nested scale
      const int64_t group = (first + i) / kNestedBlocksize;
      const int64_t left = std::min(count, (group + 1) * kNestedBlocksize - first) - i;
      const auto mask = uint16_t(left < kLanes ? (1u << left) - 1u : 0xFFFFu);
      const __m512i places = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, codes + first + i));
      const V values = _mm512_i32gather_ps(places, kScales.values, sizeof(float));
      const V scaled = mul(values, set(matrix.nested_absmax[group]));
      _mm512_mask_storeu_ps(out + i, mask, add(scaled, set(matrix.nested_offset)));
      i += std::min<int64_t>(left, kLanes);
    }
  }

  template <typename At>
  static void dequantize64(const uint8_t* packed, const FourBitTable& table, float scale, At at) {
    const V values = scaled_values(table, scale);
    for (int j = 0; j < 64; j += 16) {
      store(at(j), _mm512_permutexvar_ps(codes_of(packed + j / 2), values));
    }
  }

  // A group is 128 codes, 8 in each of 16 words: vector i holds the i-th of every word.
  static constexpr int64_t kGroup = 128;
  static int64_t source(int64_t at) { return at % 16 * 8 + at / 16; }
  template <typename Use>
  static void dequantize_group(const uint8_t* packed, int64_t blocks, const FourBitTable& table,
                               Use use) {
    const V values = _mm512_loadu_ps(table.values);
    // a row may end after half a group
    const __m512i words =
        blocks == 2 ? load_bits(packed) : _mm512_zextsi256_si512(load_half_bits(packed));
    for (int i = 0; i < 8; ++i) {
      const int shift = i / 2 * 8 + (i % 2 == 0 ? 4 : 0);  // the high nibble comes first
      use(i, _mm512_permutexvar_ps(_mm512_srli_epi32(words, shift), values));
    }
  }
  static V spread(const float* scales) {
    return _mm512_mask_mov_ps(set(scales[0]), 0xFF00, set(scales[1]));
  }
};

}  // namespace
}  // namespace tunesmith
