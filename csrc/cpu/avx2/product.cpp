// Products with AVX2, FMA and F16C: 8 fp32 at a time.
#include "vectors.h"
#include "../product.h"
#include "../product_few.h"
#include "../product_fp32.h"
#include "../isa.h"

namespace tunesmith {
namespace {

struct Avx2 {
  using V = __m256;
  static constexpr int kLanes = 8;
  // 6 x 2 sums, 2 vectors of a panel and a broadcast fill 15 of the 16 registers
  static constexpr int kTileRows = 6;
  // a panel of 16 KiB stays in the first-level cache, with the rows beside it
  static constexpr int kDepth = 256;

  using Codes = BytePlanes;

  static V set(float value) { return _mm256_set1_ps(value); }
  static V broadcast(const float* at) { return _mm256_broadcast_ss(at); }
  static V load(const float* at) { return _mm256_loadu_ps(at); }
  static void store(float* at, V values) { _mm256_storeu_ps(at, values); }
  static V add(V a, V b) { return _mm256_add_ps(a, b); }
  static V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }

  static float sum(V values) {
    const __m128 four =
        _mm_add_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  static V load(const void* data, int type, int64_t at) {
    switch (type) {
      case TUNESMITH_FLOAT16: return Float16::load(static_cast<const uint16_t*>(data) + at);
      case TUNESMITH_BFLOAT16: return BFloat16::load(static_cast<const uint16_t*>(data) + at);
      default: return load(static_cast<const float*>(data) + at);
    }
  }

  static void store(void* data, int type, int64_t at, V values) {
    if (type == TUNESMITH_FLOAT32) return store(static_cast<float*>(data) + at, values);
    const __m128i halves =
        type == TUNESMITH_FLOAT16 ? Float16::narrow(values) : BFloat16::narrow(values);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(data) + at), halves);
  }

  // Writes the transpose of kLanes x kLanes floats; the rows are as far apart as the strides say.
  static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    V rows[8], pairs[8];
    for (int i = 0; i < 8; ++i) rows[i] = load(from + i * stride);
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    // fours[4 i + j] holds of columns j and j + 4 the rows from 4 i on
    V fours[8];
    constexpr int kLow = 0x44, kHigh = 0xEE;
    for (int i = 0; i < 8; i += 4) {
      fours[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], kLow);
      fours[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], kHigh);
      fours[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], kLow);
      fours[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], kHigh);
    }
    for (int j = 0; j < 4; ++j) {
      store(to + j * to_stride, _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x20));
      store(to + (4 + j) * to_stride, _mm256_permute2f128_ps(fours[j], fours[4 + j], 0x31));
    }
  }

  static V masked(V values, const uint8_t* keep, float keep_scale) {
    int64_t bytes;
    memcpy(&bytes, keep, sizeof bytes);
    const __m256i words = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(bytes));
    const __m256 dropped = _mm256_castsi256_ps(_mm256_cmpeq_epi32(words, _mm256_setzero_si256()));
    return _mm256_andnot_ps(dropped, _mm256_mul_ps(values, _mm256_set1_ps(keep_scale)));
  }

  // a gather would be no faster
  static void fetch_scales(const Matrix& matrix, int64_t first, int64_t count, float* out) {
    tunesmith::fetch_scales(matrix, first, count, out);
  }

  template <typename At>
  static void dequantize64(const uint8_t* packed, const Codes& codes, float scale, At at) {
    tunesmith::dequantize64(packed, codes, set(scale),
                            [&](int64_t j, V eight) { store(at(j), eight); });
  }

  // A group is 64 codes: those in the high nibbles first, as the shuffles leave them.
  static constexpr int64_t kGroup = 64;
  static int64_t source(int64_t at) {
    const int64_t vector = at % 32 / 8, lane = at % 8;
    return 2 * (4 * vector + lane % 4 + lane / 4 * 16) + at / 32;
  }
  template <typename Use>
  static void dequantize_group(const uint8_t* packed, int64_t, const Codes& codes, Use use) {
    const __m256i pairs = load_bits(packed), nibble = _mm256_set1_epi8(0xF);
    __m256 values[4];
    codes(_mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble), values);
    for (int i = 0; i < 4; ++i) use(i, values[i]);
    codes(_mm256_and_si256(pairs, nibble), values);
    for (int i = 0; i < 4; ++i) use(4 + i, values[i]);
  }
  static V spread(const float* scales) { return _mm256_broadcast_ss(scales); }
};

}  // namespace

void multiply_avx2(const Product& product) {
  if (is_small(product)) return multiply_small<Avx2>(product);
  if (has_few_tokens(product) && !has_extreme_values(product.left, product.rows)) {
    return multiply_few<Avx2>(product);
  }
  if (product.transposed) return multiply_transposed<Fp32Arithmetic<Avx2>>(product);
  multiply_plain<Fp32Arithmetic<Avx2>>(product);
}

}  // namespace tunesmith
