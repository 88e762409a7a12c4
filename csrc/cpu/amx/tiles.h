// AMX: the shape of its tiles, and setting them up (Intel 64 and IA-32 Architectures Software
// Developer's Manual, volume 1, chapter 18).
#pragma once

#include "../avx512/vectors.h"

namespace tunesmith {
namespace {

constexpr int kTile = 16;          // rows of a tile, and its columns of 32 bits
constexpr int kTilePairs = kTile;  // pairs of bf16 that a row of a tile holds
constexpr int kRowBytes = 4 * kTile;

// What _tile_loadconfig reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3, of sums, get so many rows and lanes; 4 and 5, left factors, the rows; 6 and 7,
// right factors, the lanes.
inline void set_up_tiles(int rows, int lanes) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = uint16_t(tile == 4 || tile == 5 ? kRowBytes : 4 * lanes);
    config.rows[tile] = uint8_t(tile < 6 ? rows : kTile);
  }
  _tile_loadconfig(&config);
}

}  // namespace
}  // namespace tunesmith
