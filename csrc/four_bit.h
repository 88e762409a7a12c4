// NF4 and FP4 one number at a time: tables, code search, scales. For the host and for CUDA devices.
//
// NF4 and double quantization are those of QLoRA (arXiv:2305.14314), FP4 is that of bitsandbytes,
// the dynamic 8-bit type that of arXiv:1511.04561.
#pragma once

#include <cstdint>

#include "floats.h"

namespace tunesmith {

// A 4-bit type. The 16 values are ranked from the lowest to the highest; what lies above the first
// r midpoints, and not above the next, has rank r.
struct FourBitTable {
  float values[16];  // by code
  float midpoints[15];
  uint8_t codes[16];  // by rank
  uint8_t zero;       // the code that stands beside an odd last element
};

namespace {

constexpr int kNestedBlocksize = 256;
// below this an absmax would have an infinite inverse
constexpr float kSmallestAbsmax = 1e-38f;

struct DynamicTable {
  float values[256];
  float midpoints[255];
};

constexpr FourBitTable make_nf4_table() {
  FourBitTable table = {
      {-1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
       -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
       0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
       0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f},
      {},
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
      7};
  for (int i = 0; i < 15; ++i) {
    table.midpoints[i] = (table.values[i] + table.values[i + 1]) / 2.0f;
  }
  return table;
}

// Sign and magnitude, in twelfths but for the smallest. Code 8 is a second zero: as in bitsandbytes
// on the CPU, what rounds to zero from above is code 8, from below code 0.
constexpr FourBitTable make_fp4_table() {
  const float magnitudes[8] = {0.0f,
                               0.0052083334885537624f,
                               0.6666666865348816f,
                               1.0f,
                               0.3333333432674408f,
                               0.5f,
                               0.1666666716337204f,
                               0.25f};
  FourBitTable table = {{}, {}, {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3}, 0};
  for (int code = 0; code < 8; ++code) {
    table.values[code] = magnitudes[code];
    table.values[code + 8] = 0.0f - magnitudes[code];
  }
  for (int i = 0; i < 15; ++i) {
    const float low = table.values[table.codes[i]], high = table.values[table.codes[i + 1]];
    table.midpoints[i] = (low + high) / 2.0f;
  }
  return table;
}

// Seven decades hold 1, 2, 4, ... 64 values each: the middles of as many equal steps from 0.1 to 1,
// times the decade. Worked out in double and rounded where bitsandbytes rounds, so that the map has
// the same bits on every machine.
constexpr DynamicTable make_dynamic_table() {
  DynamicTable table = {};
  const float decades[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1e0f};
  const double first = 0.1f;
  int index = 128;  // 127 is zero
  for (int exponent = 0; exponent < 7; ++exponent) {
    const int steps = 1 << exponent;
    const double step = static_cast<float>(static_cast<float>(1.0 - first) / double(steps));
    float low = 0.1f;
    for (int k = 1; k <= steps; ++k) {
      // counted from the nearer end
      const double edge = k < (steps + 1) / 2 ? first + step * k : 1.0 - step * (steps - k);
      const float high = static_cast<float>(edge);
      const float magnitude = decades[exponent] * ((low + high) / 2.0f);
      table.values[index] = magnitude;
      table.values[254 - index] = -magnitude;
      ++index;
      low = high;
    }
  }
  table.values[255] = 1.0f;
  for (int i = 0; i < 255; ++i) {
    table.midpoints[i] = (table.values[i] + table.values[i + 1]) / 2.0f;
  }
  return table;
}

// The inverse that a block's values are multiplied by.
TUNESMITH_HD float inverse_of(float absmax) {
  return 1.0f / (absmax > kSmallestAbsmax ? absmax : kSmallestAbsmax);
}

// How many of the 2^bits - 1 ascending midpoints lie strictly below: the code of the nearest value,
// the lower one of a tie.
template <int Bits>
TUNESMITH_HD unsigned encode(float scaled, const float* midpoints) {
  unsigned code = 0;
  for (int bit = Bits - 1; bit >= 0; --bit) {
    // arithmetic, not a branch: which way it goes is anyone's guess
    const unsigned above = scaled > midpoints[code + (1u << bit) - 1];
    code += above << bit;
  }
  return code;
}

TUNESMITH_HD unsigned encode_4bit(float scaled, const FourBitTable& table) {
  return table.codes[encode<4>(scaled, table.midpoints)];
}

TUNESMITH_HD unsigned encode_dynamic(float scaled, const DynamicTable& table) {
  return encode<8>(scaled, table.midpoints);
}

// A nested scale can come out a little below zero, and 0 times that is -0: adding 0 mends it, and
// changes nothing else.
TUNESMITH_HD float times_scale(float value, float scale) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(value, scale), 0.0f);
#else
  return value * scale + 0.0f;
#endif
}

// The scale of one block; `nested_absmax` is null when absmax is plain fp32.
TUNESMITH_HD float scale_of(int64_t block, const void* absmax, const float* nested_absmax,
                            float nested_offset, const DynamicTable& table) {
  if (nested_absmax == nullptr) return static_cast<const float*>(absmax)[block];
  const float value = table.values[static_cast<const uint8_t*>(absmax)[block]];
  const float scale = nested_absmax[block / kNestedBlocksize];
#ifdef __CUDA_ARCH__
  return __fadd_rn(__fmul_rn(value, scale), nested_offset);
#else
  return value * scale + nested_offset;
#endif
}

}  // namespace
}  // namespace tunesmith
