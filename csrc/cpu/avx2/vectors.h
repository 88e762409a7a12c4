// What the files for AVX2, FMA and F16C share. Only they may include it: it compiles with their
// flags.
#pragma once

#include <immintrin.h>

#include "../../four_bit.h"

namespace tunesmith {
namespace {

inline __m256i load_bits(const void* at) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(at));
}

inline void store_bits(void* at, __m256i bits) {
  _mm256_storeu_si256(static_cast<__m256i*>(at), bits);
}

inline __m128i load_half_bits(const void* at) {
  return _mm_loadu_si128(static_cast<const __m128i*>(at));
}

struct Float32 {
  using Storage = float;
  static __m256 load(const float* at) { return _mm256_loadu_ps(at); }
};
struct Float16 {
  using Storage = uint16_t;
  static __m256 load(const uint16_t* at) { return _mm256_cvtph_ps(load_half_bits(at)); }
  static float widen(uint16_t value) { return float16_to_float(value); }
  static __m128i narrow(__m256 values) {
    return _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
};
struct BFloat16 {
  using Storage = uint16_t;
  static __m256 load(const uint16_t* at) {
    const __m256i wide = _mm256_cvtepu16_epi32(load_half_bits(at));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  static float widen(uint16_t value) { return bfloat16_to_float(value); }
  static __m128i narrow(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
    const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, bias), 16);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(values, values, _CMP_UNORD_Q));
    const __m256i words = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
    return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
  }
};

// What the 16 codes of one block stand for, in fp32.
struct BlockValues {
  __m256 low, high;

  BlockValues(const FourBitTable& table, float scale) {
    const __m256 scales = _mm256_set1_ps(scale);
    // adding 0 as in times_scale()
    const __m256 zero = _mm256_setzero_ps();
    low = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(table.values), scales), zero);
    high = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(table.values + 8), scales), zero);
  }
};

// Splits 32 bytes into 64 codes: `a` holds elements 0-15 and 32-47, `b` 16-31 and 48-63.
inline void split(__m256i pairs, __m256i& a, __m256i& b) {
  const __m256i nibble = _mm256_set1_epi8(0xF);
  const __m256i even = _mm256_and_si256(_mm256_srli_epi16(pairs, 4), nibble);
  const __m256i odd = _mm256_and_si256(pairs, nibble);
  a = _mm256_unpacklo_epi8(even, odd);
  b = _mm256_unpackhi_epi8(even, odd);
}

// What 16 codes stand for in fp32, a byte of each float in each plane: a byte shuffle looks up 32
// codes at a time, where a shuffle of floats takes two and a blend for 8.
struct BytePlanes {
  __m256i planes[4];

  explicit BytePlanes(const FourBitTable& table) {
    for (int plane = 0; plane < 4; ++plane) {
      alignas(16) uint8_t bytes[16];
      for (int code = 0; code < 16; ++code) {
        bytes[code] = uint8_t(bits_of(table.values[code]) >> (8 * plane));
      }
      planes[plane] = _mm256_broadcastsi128_si256(load_half_bits(bytes));
    }
  }

  // The floats of 32 codes. Vector i has those of bytes 4 i to 4 i + 3 of either half.
  void operator()(__m256i codes, __m256 values[4]) const {
    const __m256i byte0 = _mm256_shuffle_epi8(planes[0], codes);
    const __m256i byte1 = _mm256_shuffle_epi8(planes[1], codes);
    const __m256i byte2 = _mm256_shuffle_epi8(planes[2], codes);
    const __m256i byte3 = _mm256_shuffle_epi8(planes[3], codes);
    const __m256i low0 = _mm256_unpacklo_epi8(byte0, byte1);
    const __m256i high0 = _mm256_unpackhi_epi8(byte0, byte1);
    const __m256i low1 = _mm256_unpacklo_epi8(byte2, byte3);
    const __m256i high1 = _mm256_unpackhi_epi8(byte2, byte3);
    values[0] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(low0, low1));
    values[1] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(low0, low1));
    values[2] = _mm256_castsi256_ps(_mm256_unpacklo_epi16(high0, high1));
    values[3] = _mm256_castsi256_ps(_mm256_unpackhi_epi16(high0, high1));
  }
};

// Calls store(j, vector) for the 64 values of 32 bytes of codes times `scale`, each for the 8
// elements from j on.
template <typename Store>
inline void dequantize64(const uint8_t* packed, const BytePlanes& planes, __m256 scale,
                         Store store) {
  __m256i halves[2];
  split(load_bits(packed), halves[0], halves[1]);
  // so that the halves of a vector are neighbours
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  for (int half = 0; half < 2; ++half) {
    __m256 values[4];
    planes(_mm256_permutevar8x32_epi32(halves[half], order), values);
    store(16 * half, _mm256_mul_ps(values[0], scale));
    store(16 * half + 8, _mm256_mul_ps(values[1], scale));
    store(16 * half + 32, _mm256_mul_ps(values[2], scale));
    store(16 * half + 40, _mm256_mul_ps(values[3], scale));
  }
}

}  // namespace
}  // namespace tunesmith
