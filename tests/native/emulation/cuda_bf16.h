// bf16 as in CUDA, whose NaN is 0x7FFF.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};

inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7FFF};
  uint32_t bits;
  memcpy(&bits, &value, 4);
  const uint32_t below = bits & 0xFFFFu, kept = bits >> 16;
  const bool up = below > 0x8000u || (below == 0x8000u && kept % 2 == 1);
  return {static_cast<uint16_t>(kept + up)};
}

inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}
