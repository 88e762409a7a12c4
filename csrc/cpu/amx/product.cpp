// Products with AMX: tiles of 16 x 16 sums, 8192 products of bf16 each time, where x is bf16.
//
// Everything else is that of AVX-512. Rows and panels are those of product_bf16.h, which happen to
// be what the tiles are loaded from.
#include "../avx512/product_bf16.h"
#include "../isa.h"
#include "tiles.h"

namespace tunesmith {
namespace {

// How this thread's tiles are set up; 0 while they are not.
thread_local int configured_rows = 0, configured_lanes = 0;

// 0 to 3 are sums and 4 and 5 rows of the left factor; 6 and 7 are panels.
void configure(int rows, int lanes) {
  if (configured_rows == rows && configured_lanes == lanes) return;
  set_up_tiles(rows, lanes);
  configured_rows = rows;
  configured_lanes = lanes;
}

// A macro, for tiles are named by literals.
#define TUNESMITH_EACH_TILE_OF_SUMS(load_or_store) \
  load_or_store(0, sums_of(0), kPanelStride);      \
  if constexpr (Blocks * Count > 1) {              \
    load_or_store(1, sums_of(1), kPanelStride);    \
  }                                                \
  if constexpr (Blocks * Count > 2) {              \
    load_or_store(2, sums_of(2), kPanelStride);    \
    load_or_store(3, sums_of(3), kPanelStride);    \
  }

using Base = BFloat16Arithmetic<2 * kTilePairs>;

// Adds Blocks times the configured rows, and Count panels of 16 lanes: four tiles of sums at the
// most, and four are wanted, for a product takes as long as three others can be started.
template <int Blocks, int Count, bool kFresh>
void add_products(int64_t steps, const uint16_t* rows, const uint16_t* panel, float* sums) {
  static_assert(Blocks * Count <= 4);
  constexpr int64_t kRowStride = 2 * Base::kRowStride;  // in bytes
  constexpr int64_t kPanelStride = Count * kRowBytes;
  const auto rows_of = [&](int block) { return rows + block * kTile * Base::kRowStride; };
  // tile t is of block t / Count and panel t % Count
  const auto sums_of = [&](int t) {
    return sums + (t / Count * kTile * Count + t % Count) * kTile;
  };
  if constexpr (kFresh) {
    // also those that are not used, which does no harm
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    TUNESMITH_EACH_TILE_OF_SUMS(_tile_loadd)
  }
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t at = step * 2 * kTilePairs;
    const uint16_t* const lanes = panel + at * Count * kTile;
    _tile_loadd(6, lanes, kPanelStride);
    if constexpr (Count == 2) _tile_loadd(7, lanes + 2 * kTile, kPanelStride);
    _tile_loadd(4, rows + at, kRowStride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Count == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (Blocks >= 2) {
      _tile_loadd(5, rows_of(1) + at, kRowStride);
      if constexpr (Count == 2) {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      } else {
        _tile_dpbf16ps(1, 5, 6);
      }
    }
    if constexpr (Blocks == 4) {
      _tile_loadd(4, rows_of(2) + at, kRowStride);
      _tile_dpbf16ps(2, 4, 6);
      _tile_loadd(5, rows_of(3) + at, kRowStride);
      _tile_dpbf16ps(3, 5, 6);
    }
  }
  TUNESMITH_EACH_TILE_OF_SUMS(_tile_stored)
}

// How few tokens are multiplied: a vector of each of kFewRows rows after the other, so that the
// tiles follow one another, and a gap so that the vectors of one row do not fall on one cache set.
constexpr int kFewRows = 4 * kTile;
constexpr int64_t kTileSize = kTile * 2 * kTilePairs;
constexpr int64_t kVectorStride = 4 * kTileSize + 2 * kTilePairs;

// Adds `vectors` vectors of codes of those rows times one panel of so many lanes to the tiles of
// sums.
inline void add_vectors(const uint16_t* dequantized, int64_t vectors, const uint16_t* panel,
                        int64_t lanes) {
  for (int64_t v = 0; v < vectors; ++v) {
    const uint16_t* const rows = dequantized + v * kVectorStride;
    _tile_loadd(6, panel + v * 2 * kTilePairs * lanes, 4 * lanes);
    _tile_loadd(4, rows, kRowBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(5, rows + kTileSize, kRowBytes);
    _tile_dpbf16ps(1, 5, 6);
    _tile_loadd(4, rows + 2 * kTileSize, kRowBytes);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(5, rows + 3 * kTileSize, kRowBytes);
    _tile_dpbf16ps(3, 5, 6);
  }
}

struct AmxArithmetic : Base {
  static_assert(kLanes == kTile);
  static constexpr int kTileRows = 2 * kTile;
  static constexpr int kFew = kTile;

  // Leaves the tiles as they were found: the next to use them sets them up anew.
  struct ThreadState {
    ThreadState() { configured_rows = 0; }
    ~ThreadState() {
      if (configured_rows != 0) _tile_release();
      configured_rows = 0;
    }
  };

  // Adds rows [row, row + rows) times one panel to sums [rows][kTile]; `block` is room.
  //
  // Dequantizing is most of the work. One line of codes of all rows is dequantized and then
  // multiplied, from the first row on: tiles cannot be loaded from what has only just been stored.
  static void add_few_tokens(const From& from, int64_t row, int64_t rows, int64_t lanes,
                             const uint16_t* panel, uint16_t* block, float* sums) {
    constexpr int64_t kDequantized = kLineGroups * kGroupVectors * kVectorStride;
    static_assert(kDequantized <= kFewBlockRows * kRowStride && kFewBlockRows <= kFewRows);
    configure(kTile, int(lanes));
    for (int64_t i = 0; i < kDequantized && rows < kFewRows; ++i) block[i] = 0;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    // the rows that come next are prefetched line by line, as they lie
    const uint8_t* next = from.codes_at(row + rows, 0);
    const int64_t lines = divide_up(from.columns(), kLine);
    const auto layout = [=](int64_t r, int v) {
      return block + v * kVectorStride + r * 2 * kTilePairs;
    };
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t groups =
          std::min<int64_t>(kLineGroups, from.columns() / kGroup - line * kLineGroups);
      if (groups == kLineGroups) {
        from.fetch_groups<kLineGroups>(row, rows, line * kLine, next, kLine / 2, layout);
      } else {
        from.fetch_groups<1>(row, rows, line * kLine, next, kGroup / 2, layout);
      }
      next += rows * kLine / 2;
      add_vectors(block, groups * kGroupVectors, panel + line * kLine * lanes, lanes);
    }
    alignas(64) float found[kFewRows * kTile] = {};
    _tile_stored(0, found, kRowBytes);
    _tile_stored(1, found + kTile * kTile, kRowBytes);
    _tile_stored(2, found + 2 * kTile * kTile, kRowBytes);
    _tile_stored(3, found + 3 * kTile * kTile, kRowBytes);
    for (int64_t i = 0; i < rows * kTile; ++i) sums[i] += found[i];
  }

  // R is what add_panel takes at once, or what is left of that: 64 and 32 for one panel and two,
  // then a power of two or three.
  template <bool kFresh, int R, int Count>
  static void tile(int64_t pairs, const uint16_t* rows, const uint16_t* panel, float* sums) {
    configure(R < kTile ? R : kTile, kTile);
    add_products<(R < kTile ? 1 : R / kTile), Count, kFresh>(pairs / kTilePairs, rows, panel, sums);
  }
};

}  // namespace

void multiply_amx_bf16(const Product& product) {
  // dequantizing into blocks is more work than two rows are
  const bool few = has_few_tokens(product) && product.rows <= 2;
  if (few || !multiplies_pairs(product)) return multiply_avx512(product);
  if (product.transposed) return multiply_transposed<AmxArithmetic>(product);
  multiply_plain<AmxArithmetic>(product);
}

}  // namespace tunesmith
