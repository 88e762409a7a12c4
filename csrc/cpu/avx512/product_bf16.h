// Products in pairs of bf16, summed in fp32, for the files of AVX512-BF16 and AMX.
//
// A 4-bit weight is rounded to bf16 as dequantizing rounds it.
#pragma once

#include "simd.h"

namespace tunesmith {
namespace {

// Adds the products of 16 pairs of bf16 to 16 sums.
inline __m512 add_pairs(__m512 sums, __m512i a, __m512i b) {
#ifdef TUNESMITH_EMULATED_AVX512
  return emulated_dpbf16_ps(sums, a, b);
#else
  return _mm512_dpbf16_ps(sums, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
#endif
}

// Rounds as BFloat16::narrow does, but that subnormal values become 0.
inline __m256i rounded(__m512 values) {
#ifdef TUNESMITH_EMULATED_AVX512
  return BFloat16::narrow(values);
#else
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(values));
#endif
}

// What the 16 codes of a block stand for in bf16.
inline __m256i rounded_values(const FourBitTable& table, float scale) {
  return rounded(scaled_values(table, scale));
}

// Rounds in one instruction.
struct Avx512Bf16 : Avx512 {
  using Avx512::store;
  static void store(void* data, int type, int64_t at, V values) {
    if (type != TUNESMITH_BFLOAT16) return Avx512::store(data, type, at, values);
    auto* const to = static_cast<uint16_t*>(data) + at;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded(values));
  }
};

// Whether a product is one of bf16: a factor is, and the other is to be rounded to it.
inline bool multiplies_pairs(const Product& product) {
  const bool narrow =
      product.left.type == TUNESMITH_BFLOAT16 || product.right.type == TUNESMITH_BFLOAT16;
  return narrow && !product.exact;
}

// A group is 64 codes, 4 in each of 16 words: vector 0 holds the first of every word and then the
// second of every word, vector 1 the third and the fourth. Dequantizing into that order saves the
// shuffles that the natural one takes; the other factor is brought into it once.
constexpr int64_t kGroup = 64;
constexpr int kGroupVectors = 2;

// As many groups as a cache line holds are dequantized together.
constexpr int kLineGroups = 2;
constexpr int64_t kLine = kLineGroups * kGroup;

constexpr int64_t source(int64_t at) { return at % 16 * 4 + at / 16; }

// Calls use(i, vector) for the two vectors of a group.
template <typename Use>
inline void dequantize_group(const uint8_t* packed, const FourBitTable& table, float scale,
                             Use use) {
  const __m512i words = twice(load_half_bits(packed));
  const __m512i values = twice(rounded_values(table, scale));
  const auto shifts = [](int first, int second) {
    return _mm512_inserti64x4(_mm512_set1_epi16(int16_t(first)), _mm256_set1_epi16(int16_t(second)),
                              1);
  };
  // the high nibble comes first
  use(0, _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, shifts(4, 0)), values));
  use(1, _mm512_permutexvar_epi16(_mm512_srlv_epi16(words, shifts(12, 8)), values));
}

// What vectors of 32 words are read from: one number for each.
template <int64_t kCount>
struct Indices {
  alignas(64) uint16_t at[kCount];
};

template <int64_t kCount, typename Layout>
constexpr Indices<kCount> indices_of(Layout layout) {
  Indices<kCount> indices = {};
  for (int64_t i = 0; i < kCount; ++i) indices.at[i] = uint16_t(layout(i));
  return indices;
}

// The codes of two rows' groups, and what they stand for side by side.
class PairsOfGroups {
 public:
  // `both` is what rounded_values gives of the first row and, in the upper half, of the second.
  PairsOfGroups(const uint8_t* first, const uint8_t* second, __m512i both)
      : words_(_mm512_inserti64x4(_mm512_zextsi256_si512(load_half_bits(first)),
                                  load_half_bits(second), 1)),
        both_(both) {}

  // Those of 16 codes of each row.
  __m512i quarter(int q) const {
    // a word holds 4 codes; those of the second row go to every other place
    static constexpr auto kWords =
        indices_of<4 * 32>([](int64_t i) { return i % 2 * 16 + i / 32 * 4 + i % 32 / 8; });
    // the high nibble comes first
    static constexpr auto kShifts =
        indices_of<32>([](int64_t i) { return i % 8 / 4 * 8 + (i % 4 < 2 ? 4 : 0); });
    const __m512i words = _mm512_permutexvar_epi16(load_bits(kWords.at + 32 * q), words_);
    const __m512i codes = _mm512_srlv_epi16(words, load_bits(kShifts.at));
    // the fifth bit of an index says which row it is of
    const __m512i indices = _mm512_or_si512(_mm512_and_si512(codes, _mm512_set1_epi32(~0x100010)),
                                            _mm512_set1_epi32(0x10 << 16));
    return _mm512_permutexvar_epi16(indices, both_);
  }

 private:
  __m512i words_, both_;
};

// A matrix, ready to be read as bf16.
class BFloat16Source {
 public:
  explicit BFloat16Source(const Matrix& matrix) : matrix_(matrix), scales_(matrix) {}

  int64_t columns() const { return matrix_.columns; }
  bool grouped() const { return grouped_; }
  [[gnu::always_inline]] void prefetch(int64_t row, int64_t column, int64_t count) const {
    tunesmith::prefetch(matrix_, row, column, count);
  }
  void set_grouped(bool grouped) { grouped_ = grouped; }
  bool can_be_grouped() const { return is_4bit(matrix_.type) && matrix_.columns % kGroup == 0; }

  // Whether the elements lie in memory as they are multiplied, and where.
  bool lies_ready() const { return matrix_.type == TUNESMITH_BFLOAT16 && matrix_.keep == nullptr; }
  const uint16_t* at(int64_t row, int64_t column) const {
    return static_cast<const uint16_t*>(matrix_.data) + row * matrix_.columns + column;
  }

  // Fetches elements [column, column + count) of one row.
  void fetch(int64_t row, int64_t column, int64_t count, uint16_t* out) const {
    const int64_t begin = row * matrix_.columns + column;
    if (is_4bit(matrix_.type)) {
      dequantize(begin, count, out);
    } else if (lies_ready()) {
      memcpy(out, at(row, column), size_t(count) * 2);
    } else {
      convert(begin, count, out);
    }
  }

  // Calls use(i, pairs) for every 16 of columns [column, column + columns), of rows `row` and `row`
  // + 1; without `second` zeros are in that one's place. For what can be grouped, and multiples
  // of 16.
  template <typename Use>
  void fetch_pairs(int64_t row, bool second, int64_t column, int64_t columns, Use use) const {
    const int64_t begin = row * matrix_.columns + column;
    const auto values_at = [&](int64_t at) {
      return rounded_values(*matrix_.table, scales_(scales_.block_of(at)));
    };
    for (int64_t i = 0; i < columns;) {
      const int64_t skipped = (column + i) % kGroup, at = begin + i;
      const uint8_t* const codes = codes_at(row, column + i - skipped);
      __m512i both = _mm512_zextsi256_si512(values_at(at));
      if (second) both = _mm512_inserti64x4(both, values_at(at + matrix_.columns), 1);
      const PairsOfGroups groups(codes, second ? codes + matrix_.columns / 2 : codes, both);
      if (skipped == 0 && i + kGroup <= columns) {
#pragma GCC unroll 4
        for (int q = 0; q < 4; ++q) use(i + 16 * q, groups.quarter(q));
        i += kGroup;
        continue;
      }
      for (int q = int(skipped / 16); q < 4 && i < columns; ++q, i += 16) use(i, groups.quarter(q));
    }
  }

  // Fetches the scales of rows [row, row + rows) to `to`, which has to live as long as they are
  // read.
  void hold_scales(int64_t row, int64_t rows, float* to) {
    if (!grouped_) return scales_.hold(row, rows, to);
    fetch_scales<Avx512>(matrix_, row, rows, to);
    first_row_ = row;
    of_groups_ = to;
  }

  void hold_all_scales(int64_t rows, float* to) { scales_.hold_all(rows, to); }

  // Where the codes of an element lie.
  const uint8_t* codes_at(int64_t row, int64_t column) const {
    return static_cast<const uint8_t*>(matrix_.data) + (row * matrix_.columns + column) / 2;
  }

  // Fetches kGroups groups from `column` on of rows [row, row + rows), whose scales are held:
  // vector v of row r goes to layout(r, v). On the way what lies at `next` is prefetched, and
  // `stride` further for each row.
  //
  // A function of its own, for in the midst of a product the compiler runs out of registers.
  template <int kGroups, typename Layout>
  [[gnu::noinline]] void fetch_groups(int64_t row, int64_t rows, int64_t column,
                                      const uint8_t* next, int64_t stride, Layout layout) const {
    const FourBitTable& table = *matrix_.table;
    const int64_t columns = matrix_.columns;
    const uint8_t* packed = codes_at(row, column);
    const float* scales = of_groups_ + ((row - first_row_) * columns + column) / kGroup;
    for (int64_t r = 0; r < rows; ++r) {
      __builtin_prefetch(next, 0, 2);
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        dequantize_group(packed + g * (kGroup / 2), table, scales[g], [&](int v, __m512i values) {
          store_bits(layout(r, g * kGroupVectors + v), values);
        });
      }
      packed += columns / 2;
      next += stride;
      scales += columns / kGroup;
    }
  }

 private:
  void convert(int64_t begin, int64_t count, uint16_t* out) const {
    constexpr int64_t kLanes = Avx512::kLanes;
    const uint8_t* const keep = matrix_.keep == nullptr ? nullptr : matrix_.keep + begin;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      __m512 values = Avx512::load(matrix_.data, matrix_.type, begin + i);
      if (keep != nullptr) values = Avx512::masked(values, keep + i, matrix_.keep_scale);
      Avx512Bf16::store(out, TUNESMITH_BFLOAT16, i, values);
    }
    for (; i < count; ++i) {
      float value = load_float(matrix_.data, matrix_.type, begin + i);
      if (keep != nullptr) value = keep[i] ? value * matrix_.keep_scale : 0.0f;
      out[i] = float_to_bfloat16(value);
    }
  }

  void dequantize(int64_t begin, int64_t count, uint16_t* out) const {
    const auto* packed = static_cast<const uint8_t*>(matrix_.data);
    for (int64_t i = 0; i < count;) {
      const int64_t block = scales_.block_of(begin + i);
      const int64_t end = std::min(count, scales_.end_of(block) - begin);
      const float scale = scales_(block);
      const __m512i values = twice(rounded_values(*matrix_.table, scale));
      while (i < end) {
        const int64_t at = begin + i;
        if (at % 2 == 0 && i + 32 <= end) {
          const __m512i codes = short_codes_of(packed + at / 2);
          store_bits(out + i, _mm512_permutexvar_epi16(codes, values));
          i += 32;
          continue;
        }
        const uint8_t pair = packed[at / 2];
        const unsigned code = at % 2 == 0 ? pair >> 4 : pair & 0xF;
        out[i++] = float_to_bfloat16(matrix_.table->values[code] * scale);
      }
    }
  }

  const Matrix& matrix_;
  Scales<Avx512> scales_;
  bool grouped_ = false;
  int64_t first_row_ = 0;
  const float* of_groups_ = nullptr;  // of every group, from the first row on
};

// Multiplies pairs, kUnit elements of the depth at once.
template <int kUnit_>
struct BFloat16Arithmetic {
  using Element = uint16_t;
  using Vectors = Avx512Bf16;
  using From = BFloat16Source;
  static constexpr int kPair = 2;
  static constexpr int kUnit = kUnit_;
  static constexpr int kFew = 0;
  static constexpr int kLanes = Avx512::kLanes;
  static constexpr int kTileRows = Avx512::kTileRows;
  // a panel of 16 KiB stays in the first-level cache, with the rows of a tile beside it
  static constexpr int kDepth = 256;
  static constexpr int kRowStride = kDepth + 32;

  struct ThreadState {};

  // The depth of a transposed product may run in any order that both factors have.
  static void agree_on_order(From& left, From& right) {
    left.set_grouped(right.can_be_grouped());
    right.set_grouped(right.can_be_grouped());
  }

  static void pack_rows(const From& source, int64_t row, int64_t rows, int64_t p, int64_t depth,
                        uint16_t* out) {
    if (source.grouped()) {
      const auto fetch = [&](int64_t i, auto groups) {
        const uint8_t* const next = source.codes_at(row, p + i + kDepth);
        source.template fetch_groups<decltype(groups)::value>(
            row, rows, p + i, next, source.columns() / 2,
            [=](int64_t r, int v) { return out + r * kRowStride + i + 32 * v; });
      };
      int64_t i = 0;
      for (; i + kLine <= depth; i += kLine) fetch(i, std::integral_constant<int, kLineGroups>());
      if (i < depth) fetch(i, std::integral_constant<int, 1>());
      return;
    }
    const int64_t next = std::min<int64_t>(kDepth, source.columns() - p - depth);
    for (int64_t r = 0; r < rows; ++r) {
      uint16_t* to = out + r * kRowStride;
      source.prefetch(row + r, p + depth, next);
      source.fetch(row + r, p, depth, to);
      std::fill(to + depth, to + round_up(depth, kUnit), uint16_t(0));
    }
  }

  static void pack_panels(const From& source, int64_t p, int64_t depth, int64_t column,
                          int64_t columns, int64_t stride, uint16_t* out) {
    constexpr int64_t kWidth = 2 * kLanes;
    alignas(64) uint16_t even[kMaxColumns], odd[kMaxColumns];
    const int64_t padded = round_up(columns, kWidth);
    std::fill(even + columns, even + padded, uint16_t(0));
    std::fill(odd + columns, odd + padded, uint16_t(0));
    const auto pair = [&](int64_t d, int64_t i, const uint16_t* first, const uint16_t* second) {
      const __m512i low = _mm512_cvtepu16_epi32(load_half_bits(first));
      const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(load_half_bits(second)), 16);
      const int64_t panel = i / kWidth * stride;
      store_bits(out + panel + d * kWidth + i % kWidth * 2, _mm512_or_si512(low, high));
    };
    for (int64_t d = 0; d < depth; d += 2) {
      for (int64_t ahead = d + kRowsAhead; ahead < std::min(depth, d + kRowsAhead + 2); ++ahead) {
        source.prefetch(p + ahead, column, columns);
      }
      int64_t i = 0;
      if (source.can_be_grouped() && column % kLanes == 0 && columns % kLanes == 0) {
        source.fetch_pairs(p + d, d + 1 < depth, column, columns, [&](int64_t at, __m512i pairs) {
          store_bits(out + at / kWidth * stride + d * kWidth + at % kWidth * 2, pairs);
        });
        i = columns;
        if (i == padded) continue;
      } else if (source.lies_ready() && d + 1 < depth) {
        const uint16_t* const first = source.at(p + d, column);
        const uint16_t* const second = first + source.columns();
        for (; i + kWidth <= columns; i += kWidth) {
          uint16_t* const to = out + i / kWidth * stride + d * kWidth;
          interleave(load_bits(first + i), load_bits(second + i), to);
        }
        for (; i + kLanes <= columns; i += kLanes) pair(d, i, first + i, second + i);
        if (i == padded) continue;
      }
      if (i < columns) source.fetch(p + d, column + i, columns - i, even + i);
      if (i < columns && d + 1 < depth) {
        source.fetch(p + d + 1, column + i, columns - i, odd + i);
      } else {
        std::fill(odd + i, odd + padded, uint16_t(0));
      }
      for (; i < padded; i += kLanes) pair(d, i, even + i, odd + i);
    }
    const int64_t begin = round_up(depth, kPair) * kWidth, end = round_up(depth, kUnit) * kWidth;
    for (int64_t panel = 0; panel < padded / kWidth && begin < end; ++panel) {
      std::fill(out + panel * stride + begin, out + panel * stride + end, uint16_t(0));
    }
  }

  static void pack_panel_of_rows(const From& from, int64_t row, int64_t rows, int64_t width,
                                 uint16_t* out) {
    constexpr int64_t kVector = 2 * kLanes;
    alignas(64) uint16_t values[2 * kLanes][kGroup];
    for (int64_t r = rows; r < round_up(width, kLanes); ++r) {
      std::fill(values[r], values[r] + kGroup, uint16_t(0));
    }
    for (int64_t p = 0; p < from.columns(); p += kGroup) {
      const int64_t count = std::min(kGroup, from.columns() - p), padded = round_up(count, kUnit);
      for (int64_t r = 0; r < rows; ++r) {
        from.fetch(row + r, p, count, values[r]);
        std::fill(values[r] + count, values[r] + padded, uint16_t(0));
        if (from.grouped()) regroup(values[r]);
      }
      for (int64_t r = 0; r < width; r += kLanes) {
        const auto used = __mmask16((1u << std::min<int64_t>(width - r, kLanes)) - 1);
        for (int64_t i = 0; i < padded; i += kVector) {
          transpose(&values[r][i], kGroup / 2, [&](int64_t pair, __m512i lanes) {
            if (i + 2 * pair >= padded) return;
            _mm512_mask_storeu_epi32(out + (p + i + 2 * pair) * width + 2 * r, used, lanes);
          });
        }
      }
    }
  }

  template <bool kFresh, int R, int Count>
  static void tile(int64_t pairs, const uint16_t* rows, const uint16_t* panel, float* sums) {
    __m512 total[R][Count];
    // unrolled in full, or the sums would live in memory
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < Count; ++v) {
        total[r][v] = kFresh ? Avx512::set(0.0f) : Avx512::load(sums + (r * Count + v) * kLanes);
      }
    }
    for (int64_t p = 0; p < pairs; ++p) {
      __m512i lanes[Count];
      for (int v = 0; v < Count; ++v) lanes[v] = load_bits(panel + (p * Count + v) * 2 * kLanes);
#pragma GCC unroll 32
      for (int r = 0; r < R; ++r) {
        int32_t pair;
        memcpy(&pair, rows + r * kRowStride + 2 * p, sizeof pair);
        const __m512i value = _mm512_set1_epi32(pair);
        for (int v = 0; v < Count; ++v) total[r][v] = add_pairs(total[r][v], value, lanes[v]);
      }
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < Count; ++v) Avx512::store(sums + (r * Count + v) * kLanes, total[r][v]);
    }
  }

 private:
  // Writes 64 values, each from a place in two vectors of 32.
  static void store_from(const Indices<kGroup>& indices, __m512i first, __m512i second,
                         uint16_t* to) {
    constexpr int64_t kHalf = kGroup / 2;
    store_bits(to, _mm512_permutex2var_epi16(first, load_bits(indices.at), second));
    store_bits(to + kHalf, _mm512_permutex2var_epi16(first, load_bits(indices.at + kHalf), second));
  }

  // Brings a group from its natural order into that in which dequantize_group leaves it.
  static void regroup(uint16_t* group) {
    static constexpr auto kIndices = indices_of<kGroup>(source);
    store_from(kIndices, load_bits(group), load_bits(group + kGroup / 2), group);
  }

  // Writes 32 pairs: of each element of one vector and of the other.
  static void interleave(__m512i first, __m512i second, uint16_t* to) {
    static constexpr auto kIndices =
        indices_of<kGroup>([](int64_t i) { return i / 2 + i % 2 * (kGroup / 2); });
    store_from(kIndices, first, second, to);
  }

  static constexpr int64_t kMaxColumns = kBlockColumns;
  static_assert(kMaxColumns % (2 * kLanes) == 0);
};

}  // namespace
}  // namespace tunesmith
