// The kernels with AVX2 and F16C: 64 elements at a time. A short last block goes to scalar.cpp.
//
// Compiled with its own flags; nothing here may run, nor be linked from elsewhere, on a CPU
// without.
#include "vectors.h"

#include <type_traits>

#include "../quantize_blocks.h"
#include "../isa_table.h"

namespace tunesmith {
namespace {

// As integers magnitudes sort alike, and NaN and Inf above the rest: nothing is lost.
float absmax_of(const float* weight, int64_t count) {
  const __m256i magnitude = _mm256_set1_epi32(0x7FFFFFFF);
  __m256i largest = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 8) {
    largest = _mm256_max_epu32(largest, _mm256_and_si256(load_bits(weight + i), magnitude));
  }
  __m128i four =
      _mm_max_epu32(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(1, 0, 3, 2)));
  four = _mm_max_epu32(four, _mm_shuffle_epi32(four, _MM_SHUFFLE(2, 3, 0, 1)));
  return float_of(uint32_t(_mm_cvtsi128_si32(four)));
}

template <typename T>
float absmax_of_halves(const uint16_t* weight, int64_t count) {
  const __m256i magnitude = _mm256_set1_epi16(0x7FFF);
  __m256i largest = _mm256_setzero_si256();
  for (int64_t i = 0; i < count; i += 16) {
    largest = _mm256_max_epu16(largest, _mm256_and_si256(load_bits(weight + i), magnitude));
  }
  const __m128i eight =
      _mm_max_epu16(_mm256_castsi256_si128(largest), _mm256_extracti128_si256(largest, 1));
  // the instruction finds the smallest, so it is given the complements
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(eight, _mm_set1_epi16(-1)));
  return T::widen(uint16_t(~_mm_cvtsi128_si32(least)));
}

template <typename T>
float absmax_of_block(const typename T::Storage* weight, int64_t count) {
  if constexpr (sizeof(typename T::Storage) == 4) {
    return absmax_of(weight, count);
  } else {
    return absmax_of_halves<T>(weight, count);
  }
}

// The code search of four_bit.h for 8 numbers: four comparisons, each with the midpoint in the
// middle of what is left. A comparison gives 0 or -1, so what is found of a code is kept negated,
// and the tables lie in the order in which a negated prefix, taken modulo 8, looks them up.
struct CodeSearch {
  __m256 half, quarter_low, quarter_high, eighths, sixteenths;

  explicit CodeSearch(const FourBitTable& table) {
    const float* m = table.midpoints;
    half = _mm256_set1_ps(m[7]);
    quarter_low = _mm256_set1_ps(m[3]);
    quarter_high = _mm256_set1_ps(m[11]);
    eighths = _mm256_setr_ps(m[1], 0, 0, 0, 0, m[13], m[9], m[5]);
    sixteenths = _mm256_setr_ps(m[0], m[14], m[12], m[10], m[8], m[6], m[4], m[2]);
  }

  // Returns the 8 ranks as int32, negated.
  __m256i operator()(__m256 scaled) const {
    const __m256 first = _mm256_cmp_ps(scaled, half, _CMP_GT_OQ);
    const __m256 quarter = _mm256_blendv_ps(quarter_low, quarter_high, first);
    __m256i code = twice_plus(_mm256_castps_si256(first), scaled, quarter);
    code = twice_plus(code, scaled, _mm256_permutevar8x32_ps(eighths, code));
    return twice_plus(code, scaled, _mm256_permutevar8x32_ps(sixteenths, code));
  }

  static __m256i twice_plus(__m256i code, __m256 scaled, __m256 midpoint) {
    const __m256i above = _mm256_castps_si256(_mm256_cmp_ps(scaled, midpoint, _CMP_GT_OQ));
    return _mm256_add_epi32(_mm256_add_epi32(code, code), above);
  }
};

// Packs the codes of 32 negated ranks to 16 bytes.
__m128i pack(__m256i a, __m256i b, __m256i c, __m256i d, __m256i codes_by_rank) {
  const __m256i words = _mm256_packs_epi32(a, b);
  const __m256i more = _mm256_packs_epi32(c, d);
  const __m256i negated = _mm256_packs_epi16(words, more);  // fours of a b c d | a b c d
  const __m256i ranks = _mm256_sub_epi8(_mm256_setzero_si256(), negated);
  const __m256i codes = _mm256_shuffle_epi8(codes_by_rank, ranks);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i in_order = _mm256_permutevar8x32_epi32(codes, order);
  const __m256i pairs = _mm256_maddubs_epi16(in_order, _mm256_set1_epi16(0x0110));  // 16 x + y
  return _mm_packus_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}

template <typename T>
void quantize_blocks(const QuantizeJob& job, int64_t first, int64_t last) {
  const CodeSearch search(*job.table);
  const __m256i codes = _mm256_broadcastsi128_si256(load_half_bits(job.table->codes));
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * job.blocksize;
    const auto* weight = static_cast<const typename T::Storage*>(job.weight) + begin;
    uint8_t* packed = job.packed + begin / 2;
    const float absmax = absmax_of_block<T>(weight, job.blocksize);
    job.absmax[block] = absmax;
    const __m256 inverse = _mm256_set1_ps(inverse_of(absmax));
    for (int64_t i = 0; i < job.blocksize; i += 32) {
      const __m256i a = search(_mm256_mul_ps(T::load(weight + i), inverse));
      const __m256i b = search(_mm256_mul_ps(T::load(weight + i + 8), inverse));
      const __m256i c = search(_mm256_mul_ps(T::load(weight + i + 16), inverse));
      const __m256i d = search(_mm256_mul_ps(T::load(weight + i + 24), inverse));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), pack(a, b, c, d, codes));
    }
  }
}

// Stores a vector, with kStreaming past the caches: `at` is then aligned.
template <bool kStreaming>
void put(float* at, __m256 values) {
  if (kStreaming) {
    _mm256_stream_ps(at, values);
  } else {
    _mm256_storeu_ps(at, values);
  }
}
template <bool kStreaming>
void put(uint16_t* at, __m256i values) {
  if (kStreaming) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(at), values);
  } else {
    store_bits(at, values);
  }
}

template <typename T, bool kStreaming>
void dequantize_block(const uint8_t* packed, int64_t count, const BytePlanes& planes, float scale,
                      float* out) {
  const __m256 scales = _mm256_set1_ps(scale);
  for (int64_t i = 0; i < count; i += 64) {
    dequantize64(packed + i / 2, planes, scales, [&](int64_t j, __m256 eight) {
      // adding 0 as in times_scale()
      put<kStreaming>(out + i + j, _mm256_add_ps(eight, _mm256_setzero_ps()));
    });
  }
}

// 16-bit values are looked up a byte at a time, already rounded.
template <typename T, bool kStreaming>
void dequantize_block(const uint8_t* packed, int64_t count, const FourBitTable& table, float scale,
                      uint16_t* out) {
  const BlockValues values(table, scale);
  const __m128i first = T::narrow(values.low), second = T::narrow(values.high);
  const __m128i byte = _mm_set1_epi16(0xFF);
  const __m256i low_bytes = _mm256_broadcastsi128_si256(
      _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte)));
  const __m256i high_bytes = _mm256_broadcastsi128_si256(
      _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8)));
  for (int64_t i = 0; i < count; i += 64) {
    __m256i a, b;
    split(load_bits(packed + i / 2), a, b);
    const __m256i a_low = _mm256_shuffle_epi8(low_bytes, a);
    const __m256i a_high = _mm256_shuffle_epi8(high_bytes, a);
    const __m256i b_low = _mm256_shuffle_epi8(low_bytes, b);
    const __m256i b_high = _mm256_shuffle_epi8(high_bytes, b);
    const __m256i a0 = _mm256_unpacklo_epi8(a_low, a_high);  // elements 0-7, 32-39
    const __m256i a1 = _mm256_unpackhi_epi8(a_low, a_high);  // 8-15, 40-47
    const __m256i b0 = _mm256_unpacklo_epi8(b_low, b_high);  // 16-23, 48-55
    const __m256i b1 = _mm256_unpackhi_epi8(b_low, b_high);  // 24-31, 56-63
    put<kStreaming>(out + i, _mm256_permute2x128_si256(a0, a1, 0x20));
    put<kStreaming>(out + i + 16, _mm256_permute2x128_si256(b0, b1, 0x20));
    put<kStreaming>(out + i + 32, _mm256_permute2x128_si256(a0, a1, 0x31));
    put<kStreaming>(out + i + 48, _mm256_permute2x128_si256(b0, b1, 0x31));
  }
}

struct Avx2Blocks {
  static constexpr size_t kAlignment = sizeof(__m256);
  template <typename T>
  using Lookup = std::conditional_t<std::is_same_v<T, Float32>, BytePlanes, const FourBitTable&>;

  template <typename T>
  static void quantize(const QuantizeJob& job, int64_t first, int64_t end) {
    quantize_blocks<T>(job, first, end);
  }

  template <typename T, bool kStreaming>
  static void dequantize(const uint8_t* packed, int64_t count, const Lookup<T>& lookup, float scale,
                         typename T::Storage* out) {
    dequantize_block<T, kStreaming>(packed, count, lookup, scale, out);
  }

  static void fence() { _mm_sfence(); }
};

}  // namespace

const Isa avx2_isa = make_isa("avx2", quantize<Avx2Blocks>, dequantize<Avx2Blocks>, multiply_avx2);

}  // namespace tunesmith
