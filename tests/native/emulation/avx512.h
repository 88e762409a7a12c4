// The AVX-512 instructions that csrc/cpu uses, one element at a time, so that the tests run its
// AVX-512 files on a CPU that has none. Each follows the pseudo code of the Intel Intrinsics Guide.
//
// Named by TUNESMITH_EMULATED_AVX512 when those files are compiled; everything up to AVX2 is real.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#pragma GCC diagnostic ignored "-Wpsabi"

namespace emulated {
namespace {

template <typename T>
struct Lanes {
  T at[64 / sizeof(T)];
};

template <typename T, typename V>
Lanes<T> lanes(V vector) {
  static_assert(sizeof(V) == 64, "a 512-bit vector");
  Lanes<T> out;
  memcpy(&out, &vector, sizeof out);
  return out;
}

template <typename V, typename T>
V vector(const Lanes<T>& from) {
  V out;
  memcpy(&out, &from, sizeof out);
  return out;
}

// V of T made of f(i).
template <typename V, typename T, typename F>
V make(F f) {
  Lanes<T> out;
  for (int i = 0; i < int(64 / sizeof(T)); ++i) out.at[i] = f(i);
  return vector<V>(out);
}

template <typename T, typename F>
__m512i map(__m512i a, F f) {
  const auto x = lanes<T>(a);
  return make<__m512i, T>([&](int i) { return T(f(x.at[i])); });
}

template <typename T, typename F>
__m512i map(__m512i a, __m512i b, F f) {
  const auto x = lanes<T>(a), y = lanes<T>(b);
  return make<__m512i, T>([&](int i) { return T(f(x.at[i], y.at[i])); });
}

template <typename F>
__m512 map_ps(__m512 a, __m512 b, F f) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return make<__m512, float>([&](int i) { return f(x.at[i], y.at[i]); });
}

// Wide numbers from as many narrow ones.
template <typename From, typename To, typename V>
__m512i widen(V narrow) {
  From from[sizeof(V) / sizeof(From)];
  memcpy(from, &narrow, sizeof from);
  return make<__m512i, To>([&](int i) { return To(from[i]); });
}

template <typename From, typename To, typename V>
V narrow(__m512i wide) {
  const auto x = lanes<From>(wide);
  To to[sizeof(V) / sizeof(To)];
  for (size_t i = 0; i < sizeof(V) / sizeof(To); ++i) to[i] = To(x.at[i]);
  V out;
  memcpy(&out, to, sizeof out);
  return out;
}

inline __m512i loadu_si512(const void* at) {
  __m512i out;
  memcpy(&out, at, sizeof out);
  return out;
}
inline void storeu_si512(void* at, __m512i a) { memcpy(at, &a, sizeof a); }
inline __m512 loadu_ps(const void* at) {
  __m512 out;
  memcpy(&out, at, sizeof out);
  return out;
}
inline void storeu_ps(void* at, __m512 a) { memcpy(at, &a, sizeof a); }
// a store past the caches must be aligned
inline void stream_ps(float* at, __m512 a) {
  if (reinterpret_cast<uintptr_t>(at) % 64 != 0) __builtin_trap();
  storeu_ps(at, a);
}
inline void stream_si512(__m512i* at, __m512i a) {
  if (reinterpret_cast<uintptr_t>(at) % 64 != 0) __builtin_trap();
  storeu_si512(at, a);
}
inline __m512 maskz_loadu_ps(uint16_t mask, const float* at) {
  return make<__m512, float>([&](int i) { return mask >> i & 1 ? at[i] : 0.0f; });
}

inline __m512i set1_epi16(int16_t value) {
  return make<__m512i, int16_t>([&](int) { return value; });
}
inline __m512i set1_epi32(int32_t value) {
  return make<__m512i, int32_t>([&](int) { return value; });
}
inline __m512 set1_ps(float value) {
  return make<__m512, float>([&](int) { return value; });
}
inline __m512i castps_si512(__m512 a) { return loadu_si512(&a); }
inline __m512 castsi512_ps(__m512i a) { return loadu_ps(&a); }
inline __m512i zextsi256_si512(__m256i a) {
  Lanes<uint8_t> out = {};
  memcpy(&out, &a, sizeof a);
  return vector<__m512i>(out);
}
inline __m512i castsi256_si512(__m256i a) {
  // the upper half is undefined: nothing may depend on it
  Lanes<uint8_t> out;
  memset(&out, 0xA5, sizeof out);
  memcpy(&out, &a, sizeof a);
  return vector<__m512i>(out);
}
inline __m512i inserti64x4(__m512i a, __m256i b, int half) {
  auto out = lanes<uint8_t>(a);
  memcpy(out.at + 32 * half, &b, sizeof b);
  return vector<__m512i>(out);
}
inline __m512i broadcast_i64x4(__m256i a) { return inserti64x4(zextsi256_si512(a), a, 1); }

inline __m512i add_epi32(__m512i a, __m512i b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; });
}
inline __m512i sub_epi32(__m512i a, __m512i b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x - y; });
}
inline __m512i and_si512(__m512i a, __m512i b) {
  return map<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x & y; });
}
inline __m512i or_si512(__m512i a, __m512i b) {
  return map<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x | y; });
}
inline __m512i ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b), z = lanes<uint32_t>(c);
  return make<__m512i, uint32_t>([&](int i) {
    uint32_t out = 0;
    for (int bit = 0; bit < 32; ++bit) {
      const unsigned row =
          (x.at[i] >> bit & 1) << 2 | (y.at[i] >> bit & 1) << 1 | (z.at[i] >> bit & 1);
      out |= uint32_t(table >> row & 1) << bit;
    }
    return out;
  });
}
inline __m512i max_epu16(__m512i a, __m512i b) {
  return map<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x > y ? x : y; });
}
inline __m512i max_epu32(__m512i a, __m512i b) {
  return map<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x > y ? x : y; });
}
inline __m512i slli_epi32(__m512i a, unsigned by) {
  return map<uint32_t>(a, [&](uint32_t x) { return by > 31 ? 0 : x << by; });
}
inline __m512i srli_epi32(__m512i a, unsigned by) {
  return map<uint32_t>(a, [&](uint32_t x) { return by > 31 ? 0 : x >> by; });
}
inline __m512i slli_epi64(__m512i a, unsigned by) {
  return map<uint64_t>(a, [&](uint64_t x) { return by > 63 ? 0 : x << by; });
}
inline __m512i srli_epi64(__m512i a, unsigned by) {
  return map<uint64_t>(a, [&](uint64_t x) { return by > 63 ? 0 : x >> by; });
}
inline __m512i srli_epi16(__m512i a, unsigned by) {
  return map<uint16_t>(a, [&](uint16_t x) { return by > 15 ? 0 : x >> by; });
}
inline __m512i srlv_epi16(__m512i a, __m512i by) {
  return map<uint16_t>(a, by, [](uint16_t x, uint16_t y) { return y > 15 ? 0 : x >> y; });
}
inline __m512i mask_add_epi32(__m512i otherwise, uint16_t mask, __m512i a, __m512i b) {
  const auto o = lanes<uint32_t>(otherwise), x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  return make<__m512i, uint32_t>(
      [&](int i) { return mask >> i & 1 ? x.at[i] + y.at[i] : o.at[i]; });
}
inline __m512i mask_mov_epi32(__m512i otherwise, uint16_t mask, __m512i a) {
  const auto o = lanes<uint32_t>(otherwise), x = lanes<uint32_t>(a);
  return make<__m512i, uint32_t>([&](int i) { return mask >> i & 1 ? x.at[i] : o.at[i]; });
}
inline __m512 mask_mov_ps(__m512 otherwise, uint16_t mask, __m512 a) {
  return castsi512_ps(mask_mov_epi32(castps_si512(otherwise), mask, castps_si512(a)));
}
inline uint16_t test_epi32_mask(__m512i a, __m512i b) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  uint16_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= uint16_t(((x.at[i] & y.at[i]) != 0) << i);
  return mask;
}
inline uint16_t cmp_ps_mask(__m512 a, __m512 b, int how) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  uint16_t mask = 0;
  for (int i = 0; i < 16; ++i) {
    const bool unordered = std::isnan(x.at[i]) || std::isnan(y.at[i]);
    bool holds = false;
    if (how == _CMP_GT_OQ) {
      holds = x.at[i] > y.at[i];
    } else if (how == _CMP_UNORD_Q) {
      holds = unordered;
    } else {
      __builtin_trap();  // not emulated
    }
    mask |= uint16_t(holds << i);
  }
  return mask;
}
inline __m512i permutexvar_epi16(__m512i index, __m512i a) {
  const auto x = lanes<uint16_t>(a);
  return map<uint16_t>(index, [&](uint16_t i) { return x.at[i & 31]; });
}
// of two vectors, one after the other
inline __m512i permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
  const auto x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
  return map<uint16_t>(index, [&](uint16_t i) { return (i & 32 ? y : x).at[i & 31]; });
}
inline __m512 permutexvar_ps(__m512i index, __m512 a) {
  const auto x = lanes<float>(a);
  const auto at = lanes<uint32_t>(index);
  return make<__m512, float>([&](int i) { return x.at[at.at[i] & 15]; });
}

inline __m512 add_ps(__m512 a, __m512 b) {
  return map_ps(a, b, [](float x, float y) { return x + y; });
}
inline __m512 mul_ps(__m512 a, __m512 b) {
  return map_ps(a, b, [](float x, float y) { return x * y; });
}
inline __m512 maskz_mul_ps(uint16_t mask, __m512 a, __m512 b) {
  return mask_mov_ps(set1_ps(0.0f), mask, mul_ps(a, b));
}
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const auto x = lanes<float>(a), y = lanes<float>(b), z = lanes<float>(c);
  return make<__m512, float>([&](int i) { return std::fma(x.at[i], y.at[i], z.at[i]); });
}
inline __m512 sub_ps(__m512 a, __m512 b) {
  return map_ps(a, b, [](float x, float y) { return x - y; });
}
// the second where either is NaN
inline __m512 max_ps(__m512 a, __m512 b) {
  return map_ps(a, b, [](float x, float y) { return x > y ? x : y; });
}
inline __m512 scalef_ps(__m512 a, __m512 b) {
  return map_ps(a, b, [](float x, float y) {
    if (std::isnan(x) || std::isnan(y)) return x + y;
    return y > 1000.0f ? x * INFINITY : std::ldexp(x, y < -1000.0f ? -1000 : int(std::floor(y)));
  });
}

// Within each lane of 128 bits, elements of a and b by turns, from the lower or the upper half of
// it.
template <typename T>
__m512i unpack(__m512i a, __m512i b, int half) {
  constexpr int kOfLane = 16 / sizeof(T);
  const auto x = lanes<T>(a), y = lanes<T>(b);
  return make<__m512i, T>([&](int i) {
    const int from = i / kOfLane * kOfLane + half * kOfLane / 2 + i % kOfLane / 2;
    return i % 2 == 0 ? x.at[from] : y.at[from];
  });
}
inline __m512i unpacklo_epi32(__m512i a, __m512i b) { return unpack<uint32_t>(a, b, 0); }
inline __m512i unpackhi_epi32(__m512i a, __m512i b) { return unpack<uint32_t>(a, b, 1); }
inline __m512i unpacklo_epi64(__m512i a, __m512i b) { return unpack<uint64_t>(a, b, 0); }
inline __m512i unpackhi_epi64(__m512i a, __m512i b) { return unpack<uint64_t>(a, b, 1); }
// Four lanes of 128 bits: two of a, two of b, each chosen by two bits.
inline __m512i shuffle_i32x4(__m512i a, __m512i b, int from) {
  const auto x = lanes<uint32_t>(a), y = lanes<uint32_t>(b);
  return make<__m512i, uint32_t>([&](int i) {
    const int lane = i / 4, chosen = from >> 2 * lane & 3;
    return (lane < 2 ? x : y).at[4 * chosen + i % 4];
  });
}

inline float reduce_add_ps(__m512 a) {
  auto x = lanes<float>(a);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x.at[i] += x.at[i + half];
  }
  return x.at[0];
}
inline uint32_t reduce_max_epu32(__m512i a) {
  const auto x = lanes<uint32_t>(a);
  uint32_t out = 0;
  for (uint32_t value : x.at) out = value > out ? value : out;
  return out;
}

inline __m512 i32gather_ps(__m512i places, const float* from, int size) {
  const auto x = lanes<int32_t>(places);
  return make<__m512, float>([&](int i) {
    float out;
    memcpy(&out, reinterpret_cast<const uint8_t*>(from) + int64_t(x.at[i]) * size, sizeof out);
    return out;
  });
}

inline __m128i maskz_loadu_epi8(uint16_t mask, const uint8_t* from) {
  alignas(16) uint8_t out[16] = {};
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) out[i] = from[i];  // the others are not touched
  }
  return _mm_load_si128(reinterpret_cast<const __m128i*>(out));
}
inline void mask_storeu_epi32(void* to, uint16_t mask, __m512i a) {
  const auto x = lanes<uint32_t>(a);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) memcpy(static_cast<uint8_t*>(to) + 4 * i, &x.at[i], 4);
  }
}
inline void mask_storeu_ps(float* to, uint16_t mask, __m512 a) {
  const auto x = lanes<float>(a);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) to[i] = x.at[i];
  }
}

inline __m512i cvtepu8_epi32(__m128i a) { return widen<uint8_t, uint32_t>(a); }
inline __m512i cvtepu16_epi32(__m256i a) { return widen<uint16_t, uint32_t>(a); }
inline __m512i cvtepu8_epi64(__m128i a) { return widen<uint8_t, uint64_t>(a); }
inline __m128i cvtepi32_epi8(__m512i a) { return narrow<uint32_t, uint8_t, __m128i>(a); }
inline __m256i cvtepi32_epi16(__m512i a) { return narrow<uint32_t, uint16_t, __m256i>(a); }
inline __m128i cvtepi16_epi8(__m256i a) {
  return narrow<uint16_t, uint8_t, __m128i>(zextsi256_si512(a));
}
// F16C does the two halves
inline __m512 cvtph_ps(__m256i a) {
  const __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)),
                            _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))};
  return loadu_ps(halves);
}
inline __m256i cvtps_ph(__m512 a, int) {
  __m256 halves[2];
  memcpy(halves, &a, sizeof halves);
  return _mm256_set_m128i(_mm256_cvtps_ph(halves[1], _MM_FROUND_TO_NEAREST_INT),
                          _mm256_cvtps_ph(halves[0], _MM_FROUND_TO_NEAREST_INT));
}

}  // namespace
}  // namespace emulated

// The odd product of a pair first, each with a single rounding; subnormal bf16 are zero.
static inline __m512 emulated_dpbf16_ps(__m512 sums, __m512i a, __m512i b) {
  using namespace emulated;
  const auto s = lanes<float>(sums);
  const auto x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
  const auto value = [](uint16_t bits) {
    const uint32_t wide =
        (bits & 0x7F80) == 0 ? uint32_t(bits & 0x8000) << 16 : uint32_t(bits) << 16;
    float out;
    memcpy(&out, &wide, sizeof out);
    return out;
  };
  return make<__m512, float>([&](int i) {
    const float odd = std::fma(value(x.at[2 * i + 1]), value(y.at[2 * i + 1]), s.at[i]);
    return std::fma(value(x.at[2 * i]), value(y.at[2 * i]), odd);
  });
}

// AMX: eight tiles of 16 rows of 64 bytes. A load or store touches the configured part alone, and
// what lies outside reads as zero, as on a CPU. Products are those of dpbf16, a pair of each row at
// a time.
namespace emulated {
namespace {

struct Tiles {
  bool configured;
  uint16_t row_bytes[8];
  uint8_t rows[8];
  uint8_t data[8][16][64];
};
thread_local Tiles tiles;

inline void require_tiles() {
  if (!tiles.configured) __builtin_trap();  // #UD on a CPU
}
inline void tile_loadconfig(const void* from) {
  const auto* bytes = static_cast<const uint8_t*>(from);
  if (bytes[0] != 1) __builtin_trap();
  tiles = {};
  tiles.configured = true;
  memcpy(tiles.row_bytes, bytes + 16, sizeof tiles.row_bytes);
  memcpy(tiles.rows, bytes + 48, sizeof tiles.rows);
}
inline void tile_release() { tiles = {}; }
inline void tile_zero(int tile) {
  require_tiles();
  memset(tiles.data[tile], 0, sizeof tiles.data[tile]);
}
inline void tile_loadd(int tile, const void* from, int64_t stride) {
  tile_zero(tile);
  for (int r = 0; r < tiles.rows[tile]; ++r) {
    memcpy(tiles.data[tile][r], static_cast<const uint8_t*>(from) + r * stride,
           tiles.row_bytes[tile]);
  }
}
inline void tile_stored(int tile, void* to, int64_t stride) {
  require_tiles();
  for (int r = 0; r < tiles.rows[tile]; ++r) {
    memcpy(static_cast<uint8_t*>(to) + r * stride, tiles.data[tile][r], tiles.row_bytes[tile]);
  }
}
inline void tile_dpbf16ps(int sums, int left, int right) {
  require_tiles();
  if (tiles.rows[sums] != tiles.rows[left] || tiles.row_bytes[sums] != tiles.row_bytes[right] ||
      tiles.row_bytes[left] != 4 * tiles.rows[right]) {
    __builtin_trap();  // #UD as well
  }
  for (int r = 0; r < tiles.rows[sums]; ++r) {
    __m512 total = loadu_ps(tiles.data[sums][r]);
    for (int k = 0; k < tiles.row_bytes[left] / 4; ++k) {
      uint32_t pair;
      memcpy(&pair, tiles.data[left][r] + 4 * k, sizeof pair);
      total = emulated_dpbf16_ps(total, set1_epi32(int(pair)), loadu_si512(tiles.data[right][k]));
    }
    memcpy(tiles.data[sums][r], &total, tiles.row_bytes[sums]);
  }
}

}  // namespace
}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig ::emulated::tile_loadconfig
#define _tile_release ::emulated::tile_release
#define _tile_zero ::emulated::tile_zero
#define _tile_loadd ::emulated::tile_loadd
#define _tile_stored ::emulated::tile_stored
#define _tile_dpbf16ps ::emulated::tile_dpbf16ps

#define _mm256_cvtepi16_epi8 ::emulated::cvtepi16_epi8
#define _mm512_add_epi32 ::emulated::add_epi32
#define _mm512_add_ps ::emulated::add_ps
#define _mm512_and_si512 ::emulated::and_si512
#define _mm512_broadcast_i64x4 ::emulated::broadcast_i64x4
#define _mm512_castps_si512 ::emulated::castps_si512
#define _mm512_castsi256_si512 ::emulated::castsi256_si512
#define _mm512_castsi512_ps ::emulated::castsi512_ps
#define _mm512_cmp_ps_mask ::emulated::cmp_ps_mask
#define _mm512_cvtepi32_epi16 ::emulated::cvtepi32_epi16
#define _mm512_cvtepi32_epi8 ::emulated::cvtepi32_epi8
#define _mm512_cvtepu16_epi32 ::emulated::cvtepu16_epi32
#define _mm512_cvtepu8_epi32 ::emulated::cvtepu8_epi32
#define _mm512_cvtepu8_epi64 ::emulated::cvtepu8_epi64
#define _mm512_cvtph_ps ::emulated::cvtph_ps
#define _mm512_cvtps_ph ::emulated::cvtps_ph
#define _mm512_fmadd_ps ::emulated::fmadd_ps
#define _mm512_inserti64x4 ::emulated::inserti64x4
#define _mm512_loadu_ps ::emulated::loadu_ps
#define _mm512_loadu_si512 ::emulated::loadu_si512
#define _mm512_mask_add_epi32 ::emulated::mask_add_epi32
#define _mm512_mask_mov_epi32 ::emulated::mask_mov_epi32
#define _mm512_mask_mov_ps ::emulated::mask_mov_ps
#define _mm512_maskz_loadu_ps ::emulated::maskz_loadu_ps
#define _mm512_maskz_mul_ps ::emulated::maskz_mul_ps
#define _mm512_max_epu16 ::emulated::max_epu16
#define _mm512_max_epu32 ::emulated::max_epu32
#define _mm512_max_ps ::emulated::max_ps
#define _mm512_mul_ps ::emulated::mul_ps
#define _mm512_or_si512 ::emulated::or_si512
#define _mm512_permutex2var_epi16 ::emulated::permutex2var_epi16
#define _mm512_permutexvar_epi16 ::emulated::permutexvar_epi16
#define _mm512_permutexvar_ps ::emulated::permutexvar_ps
#define _mm512_reduce_add_ps ::emulated::reduce_add_ps
#define _mm512_reduce_max_epu32 ::emulated::reduce_max_epu32
#define _mm512_set1_epi16 ::emulated::set1_epi16
#define _mm512_set1_epi32 ::emulated::set1_epi32
#define _mm512_set1_ps ::emulated::set1_ps
#define _mm_maskz_loadu_epi8 ::emulated::maskz_loadu_epi8
#define _mm512_mask_storeu_epi32 ::emulated::mask_storeu_epi32
#define _mm512_mask_storeu_ps ::emulated::mask_storeu_ps
#define _mm512_i32gather_ps ::emulated::i32gather_ps
#define _mm512_setzero_ps() ::emulated::set1_ps(0.0f)
#define _mm512_setzero_si512() ::emulated::set1_epi32(0)
#define _mm512_slli_epi32 ::emulated::slli_epi32
#define _mm512_slli_epi64 ::emulated::slli_epi64
#define _mm512_srli_epi16 ::emulated::srli_epi16
#define _mm512_srlv_epi16 ::emulated::srlv_epi16
#define _mm512_srli_epi32 ::emulated::srli_epi32
#define _mm512_srli_epi64 ::emulated::srli_epi64
#define _mm512_storeu_ps ::emulated::storeu_ps
#define _mm512_storeu_si512 ::emulated::storeu_si512
#define _mm512_scalef_ps ::emulated::scalef_ps
#define _mm512_shuffle_i32x4 ::emulated::shuffle_i32x4
#define _mm512_sub_epi32 ::emulated::sub_epi32
#define _mm512_sub_ps ::emulated::sub_ps
#define _mm512_unpackhi_epi32 ::emulated::unpackhi_epi32
#define _mm512_unpackhi_epi64 ::emulated::unpackhi_epi64
#define _mm512_unpacklo_epi32 ::emulated::unpacklo_epi32
#define _mm512_unpacklo_epi64 ::emulated::unpacklo_epi64
#define _mm512_ternarylogic_epi32 ::emulated::ternarylogic_epi32
#define _mm512_test_epi32_mask ::emulated::test_epi32_mask
#define _mm512_zextsi256_si512 ::emulated::zextsi256_si512
#define _mm512_stream_ps ::emulated::stream_ps
#define _mm512_stream_si512 ::emulated::stream_si512
