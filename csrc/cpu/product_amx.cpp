// Products with AMX: tiles of 16 x 16 sums, 8192 products of bf16 each time, where x is bf16.
//
// Everything else is that of AVX-512. Rows and panels are those of product_bf16.h, which happen to be
// what the tiles are loaded from (Intel 64 and IA-32 Architectures Software Developer's Manual,
// volume 1, chapter 18).
#include "product_bf16.h"
#include "products.h"

namespace tunesmith {
namespace {

constexpr int kTile = 16;              // rows of a tile, and its columns of 32 bits
constexpr int kTilePairs = kTile;      // pairs of bf16 that a row of a tile holds
constexpr int kRowBytes = 4 * kTile;

// What _tile_loadconfig reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The rows that this thread's tiles 0 to 5 have; 0 while they are not set up.
thread_local int configured_rows = 0;

// 0 to 3 are sums and 4 to 5 rows of the left factor; 6 and 7 are panels.
void configure(int rows) {
  if (configured_rows == rows) return;
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = kRowBytes;
    config.rows[tile] = uint8_t(tile < 6 ? rows : kTile);
  }
  _tile_loadconfig(&config);
  configured_rows = rows;
}

// Adds Rows rows, times two if Twice, and Count panels of 16 lanes.
template <bool Twice, int Count>
void add_products(int64_t steps, const uint16_t* rows, const uint16_t* panel, float* sums) {
  constexpr int64_t kRowStride = 2 * BFloat16Arithmetic::kRowStride;  // in bytes
  constexpr int64_t kPanelStride = Count * kRowBytes;
  const uint16_t* const below = rows + kTile * BFloat16Arithmetic::kRowStride;
  float* const sums_below = sums + kTile * Count * kTile;
  _tile_loadd(0, sums, kPanelStride);
  if constexpr (Count == 2) _tile_loadd(1, sums + kTile, kPanelStride);
  if constexpr (Twice) {
    _tile_loadd(2, sums_below, kPanelStride);
    if constexpr (Count == 2) _tile_loadd(3, sums_below + kTile, kPanelStride);
  }
  for (int64_t step = 0; step < steps; ++step) {
    const int64_t at = step * 2 * kTilePairs;
    const uint16_t* const lanes = panel + at * Count * kTile;
    _tile_loadd(6, lanes, kPanelStride);
    if constexpr (Count == 2) _tile_loadd(7, lanes + 2 * kTile, kPanelStride);
    _tile_loadd(4, rows + at, kRowStride);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (Count == 2) _tile_dpbf16ps(1, 4, 7);
    if constexpr (Twice) {
      _tile_loadd(5, below + at, kRowStride);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (Count == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, kPanelStride);
  if constexpr (Count == 2) _tile_stored(1, sums + kTile, kPanelStride);
  if constexpr (Twice) {
    _tile_stored(2, sums_below, kPanelStride);
    if constexpr (Count == 2) _tile_stored(3, sums_below + kTile, kPanelStride);
  }
}

struct AmxArithmetic : BFloat16Arithmetic {
  static_assert(kLanes == kTile);
  static constexpr int kTileRows = 2 * kTile;

  // Leaves the tiles as they were found: the next to use them sets them up anew.
  struct Session {
    Session() { configured_rows = 0; }
    ~Session() {
      if (configured_rows != 0) _tile_release();
      configured_rows = 0;
    }
  };

  template <int R, int Count>
  static void tile(int64_t pairs, const uint16_t* rows, const uint16_t* panel, float* sums) {
    constexpr int kMost = R < kTileRows ? R : kTileRows;
    const int64_t steps = pairs / kTilePairs, done = steps * kTilePairs;
    for (int r = 0; r < R; r += kMost) {
      const uint16_t* const from = rows + r * kRowStride;
      float* const to = sums + r * Count * kTile;
      if (steps > 0) {
        configure(kMost < kTile ? kMost : kTile);
        add_products<(kMost > kTile), Count>(steps, from, panel, to);
      }
      // what fills no tile
      if (done == pairs) continue;
      constexpr int kAtOnce = kMost < 8 ? kMost : 8;
      for (int i = 0; i < kMost; i += kAtOnce) {
        BFloat16Arithmetic::tile<kAtOnce, Count>(pairs - done, from + i * kRowStride + 2 * done,
                                                 panel + done * Count * 2 * kTile,
                                                 to + i * Count * kTile);
      }
    }
  }
};

}  // namespace

void multiply_amx_bf16(const Product& product) {
  // decoding into blocks is more work than a row or two are
  const bool few = has_few_tokens(product) && product.rows <= 2;
  if (few || product.exact || product.left.type != TUNESMITH_BFLOAT16 || product.left.keep != nullptr) {
    return multiply_avx512(product);
  }
  if (product.transposed) return multiply_transposed<AmxArithmetic>(product);
  multiply_plain<AmxArithmetic>(product);
}

}  // namespace tunesmith
