// What the files for AVX-512 (F, BW, DQ, VL) share. Only they may include it: it compiles with
// their flags.
#pragma once

#ifdef TUNESMITH_EMULATED_AVX512
#include TUNESMITH_EMULATED_AVX512  // the tests' stand-in for a CPU that has it
#else
#include <immintrin.h>
#endif

#include "../../kernels.h"
#include "../../four_bit.h"

namespace tunesmith {
namespace {

inline __m512i load_bits(const void* at) { return _mm512_loadu_si512(at); }

inline void store_bits(void* at, __m512i bits) { _mm512_storeu_si512(at, bits); }

inline __m256i load_half_bits(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}

struct Float32 {
  using Storage = float;
  static __m512 load(const float* at) { return _mm512_loadu_ps(at); }
};
struct Float16 {
  using Storage = uint16_t;
  static __m512 load(const uint16_t* at) { return _mm512_cvtph_ps(load_half_bits(at)); }
  static float widen(uint16_t value) { return float16_to_float(value); }
  static __m256i narrow(__m512 values) {
    return _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};
struct BFloat16 {
  using Storage = uint16_t;
  static __m512 load(const uint16_t* at) {
    const __m512i wide = _mm512_cvtepu16_epi32(load_half_bits(at));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  static float widen(uint16_t value) { return bfloat16_to_float(value); }
  static __m256i narrow(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, bias), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7FC0)));
  }
};

// What 16 codes stand for in fp32, times a scale.
inline __m512 scaled_values(const FourBitTable& table, float scale) {
  return _mm512_mul_ps(_mm512_loadu_ps(table.values), _mm512_set1_ps(scale));
}

// The codes of 8 bytes as int32, in order; the bits above the fourth are not cleared.
inline __m512i codes_of(const uint8_t* packed) {
  const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed));
  const __m512i bytes = _mm512_cvtepu8_epi64(eight);
  return _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
}

// The codes of 16 bytes as int16, in order; the bits above the fourth are not cleared.
inline __m512i short_codes_of(const uint8_t* packed) {
  const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
  const __m512i bytes = _mm512_cvtepu8_epi32(sixteen);
  return _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
}

// 16 halves twice, so that a lookup by 5 bits finds the fourfold code whatever the fifth bit is.
inline __m512i twice(__m256i halves) { return _mm512_broadcast_i64x4(halves); }

// Calls use(i, row) for the rows of the transpose of 16 x 16 words that lie `stride` words apart.
template <typename Use>
inline void transpose(const void* from, int64_t stride, Use use) {
  __m512i rows[16], pairs[16], fours[16];
  for (int i = 0; i < 16; ++i) rows[i] = load_bits(static_cast<const uint32_t*>(from) + i * stride);
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  // fours[4 i + j] holds of columns j, j + 4, j + 8 and j + 12 the rows from 4 i on
  for (int i = 0; i < 16; i += 4) {
    fours[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    fours[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    fours[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    fours[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  constexpr int kEven = 0x88, kOdd = 0xDD;  // lanes 0 and 2, or 1 and 3, of both
  for (int j = 0; j < 4; ++j) {
    const __m512i even_low = _mm512_shuffle_i32x4(fours[j], fours[4 + j], kEven);
    const __m512i even_high = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], kEven);
    const __m512i odd_low = _mm512_shuffle_i32x4(fours[j], fours[4 + j], kOdd);
    const __m512i odd_high = _mm512_shuffle_i32x4(fours[8 + j], fours[12 + j], kOdd);
    use(j, _mm512_shuffle_i32x4(even_low, even_high, kEven));
    use(4 + j, _mm512_shuffle_i32x4(odd_low, odd_high, kEven));
    use(8 + j, _mm512_shuffle_i32x4(even_low, even_high, kOdd));
    use(12 + j, _mm512_shuffle_i32x4(odd_low, odd_high, kOdd));
  }
}

}  // namespace
}  // namespace tunesmith
