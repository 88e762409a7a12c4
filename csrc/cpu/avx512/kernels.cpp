// The kernels with AVX-512: 64 elements at a time. A short last block goes to scalar.cpp.
//
// Compiled with its own flags; nothing here may run, nor be linked from elsewhere, on a CPU
// without.
#include "vectors.h"

#include "../quantize_blocks.h"
#include "../isa_table.h"

namespace tunesmith {
namespace {

// As integers magnitudes sort alike, and NaN and Inf above the rest: nothing is lost.
float absmax_of(const float* weight, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi32(0x7FFFFFFF);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    largest = _mm512_max_epu32(largest, _mm512_and_si512(load_bits(weight + i), magnitude));
  }
  return float_of(_mm512_reduce_max_epu32(largest));
}

template <typename T>
float absmax_of_halves(const uint16_t* weight, int64_t count) {
  const __m512i magnitude = _mm512_set1_epi16(0x7FFF);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 32) {
    largest = _mm512_max_epu16(largest, _mm512_and_si512(load_bits(weight + i), magnitude));
  }
  const __m512i even = _mm512_and_si512(largest, _mm512_set1_epi32(0xFFFF));
  const __m512i odd = _mm512_srli_epi32(largest, 16);
  return T::widen(uint16_t(_mm512_reduce_max_epu32(_mm512_max_epu32(even, odd))));
}

template <typename T>
float absmax_of_block(const typename T::Storage* weight, int64_t count) {
  if constexpr (sizeof(typename T::Storage) == 4) {
    return absmax_of(weight, count);
  } else {
    return absmax_of_halves<T>(weight, count);
  }
}

// The code search of four_bit.h for 16 numbers: four comparisons, each with the midpoint in the
// middle of what is left.
__m128i ranks_of(__m512 scaled, __m512 midpoints) {
  __m512i at = _mm512_set1_epi32(7);
  for (int step = 4; step > 0; step /= 2) {
    const __m512 midpoint = _mm512_permutexvar_ps(at, midpoints);
    const __mmask16 above = _mm512_cmp_ps_mask(scaled, midpoint, _CMP_GT_OQ);
    const __m512i lower = _mm512_sub_epi32(at, _mm512_set1_epi32(step));
    at = _mm512_mask_add_epi32(lower, above, at, _mm512_set1_epi32(step));
  }
  const __m512 midpoint = _mm512_permutexvar_ps(at, midpoints);
  const __mmask16 above = _mm512_cmp_ps_mask(scaled, midpoint, _CMP_GT_OQ);
  return _mm512_cvtepi32_epi8(_mm512_mask_add_epi32(at, above, at, _mm512_set1_epi32(1)));
}

template <typename T>
void quantize_blocks(const QuantizeJob& job, int64_t first, int64_t last) {
  // the sixteenth is never looked up
  const __m512 midpoints = _mm512_maskz_loadu_ps(0x7FFF, job.table->midpoints);
  const __m256i codes_by_rank = _mm256_broadcastsi128_si256(
      _mm_loadu_si128(reinterpret_cast<const __m128i*>(job.table->codes)));
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * job.blocksize;
    const auto* weight = static_cast<const typename T::Storage*>(job.weight) + begin;
    uint8_t* packed = job.packed + begin / 2;
    const float absmax = absmax_of_block<T>(weight, job.blocksize);
    job.absmax[block] = absmax;
    const __m512 inverse = _mm512_set1_ps(inverse_of(absmax));
    for (int64_t i = 0; i < job.blocksize; i += 32) {
      const __m128i low = ranks_of(_mm512_mul_ps(T::load(weight + i), inverse), midpoints);
      const __m128i high = ranks_of(_mm512_mul_ps(T::load(weight + i + 16), inverse), midpoints);
      const __m256i codes = _mm256_shuffle_epi8(codes_by_rank, _mm256_set_m128i(high, low));
      const __m256i pairs = _mm256_maddubs_epi16(codes, _mm256_set1_epi16(0x0110));  // 16 x + y
      _mm_storeu_si128(reinterpret_cast<__m128i*>(packed + i / 2), _mm256_cvtepi16_epi8(pairs));
    }
  }
}

// What the 16 codes of one block stand for; adding 0 as in times_scale().
__m512 block_values(const FourBitTable& table, float scale) {
  return _mm512_add_ps(scaled_values(table, scale), _mm512_setzero_ps());
}

// Stores a vector, with kStreaming past the caches: `at` is then aligned.
template <bool kStreaming>
void put(float* at, __m512 values) {
  if (kStreaming) {
    _mm512_stream_ps(at, values);
  } else {
    _mm512_storeu_ps(at, values);
  }
}
template <bool kStreaming>
void put(uint16_t* at, __m512i values) {
  if (kStreaming) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(at), values);
  } else {
    store_bits(at, values);
  }
}

template <typename T, bool kStreaming>
void dequantize_block(const uint8_t* packed, int64_t count, const FourBitTable& table, float scale,
                      float* out) {
  const __m512 values = block_values(table, scale);
  for (int64_t i = 0; i < count; i += 16) {
    put<kStreaming>(out + i, _mm512_permutexvar_ps(codes_of(packed + i / 2), values));
  }
}

template <typename T, bool kStreaming>
void dequantize_block(const uint8_t* packed, int64_t count, const FourBitTable& table, float scale,
                      uint16_t* out) {
  const __m512i values = twice(T::narrow(block_values(table, scale)));
  for (int64_t i = 0; i < count; i += 32) {
    put<kStreaming>(out + i, _mm512_permutexvar_epi16(short_codes_of(packed + i / 2), values));
  }
}

struct Avx512Blocks {
  static constexpr size_t kAlignment = sizeof(__m512);
  template <typename T>
  using Lookup = const FourBitTable&;

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

constexpr Isa with_amx_attention(Isa isa) {
  isa.attention_forward = attention_forward_amx;
  isa.attention_backward = attention_backward_amx;
  return isa;
}

}  // namespace

const Isa avx512_isa =
    make_isa("avx512", quantize<Avx512Blocks>, dequantize<Avx512Blocks>, multiply_avx512);
// the multiplications are what it is for
const Isa avx512_bf16_isa =
    make_isa("avx512_bf16", quantize<Avx512Blocks>, dequantize<Avx512Blocks>, multiply_avx512_bf16);
const Isa amx_bf16_isa = with_amx_attention(
    make_isa("amx_bf16", quantize<Avx512Blocks>, dequantize<Avx512Blocks>, multiply_amx_bf16));

}  // namespace tunesmith
