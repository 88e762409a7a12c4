// Numbers in plain C++ that the compiler turns into the vectors of the file that includes this: as they
// are kept in memory, and e to the power of one.
#pragma once

#include <cstdint>
#include <cstring>

#include "../nf4.h"

namespace tunesmith {
namespace {

// e to the power of x, within 2 units in the last place from -87 to 87 and held at either end of that;
// NaN stays NaN. The polynomial is the Taylor series on [-ln 2 / 2, ln 2 / 2].
inline float exp_of(float x) {
  // compared as integers: a choice between floats keeps GCC from vectors
  uint32_t held;
  std::memcpy(&held, &x, sizeof held);
  const uint32_t sign = held & 0x80000000u, size = held & 0x7FFFFFFFu;
  constexpr uint32_t kMost = 0x42AE0000u, kInfinity = 0x7F800000u;  // 87
  held = sign | (size > kMost && size <= kInfinity ? kMost : size);
  std::memcpy(&x, &held, sizeof x);
  constexpr float kLog2E = 1.44269504f, kRound = 12582912.0f;  // 1.5 * 2^23
  const float rounded = x * kLog2E + kRound;
  const float n = rounded - kRound;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float sum = 1.0f / 5040.0f;
  sum = sum * r + 1.0f / 720.0f;
  sum = sum * r + 1.0f / 120.0f;
  sum = sum * r + 1.0f / 24.0f;
  sum = sum * r + 1.0f / 6.0f;
  sum = sum * r + 0.5f;
  sum = sum * r + 1.0f;
  sum = sum * r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  bits = (bits + 127u) << 23;  // the low bits of `rounded` are n
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

// How a type is kept: `of` rounds to it, `to` is the fp32 that it stands for.
struct AsFloat {
  using Storage = float;
  static float of(float value) { return value; }
  static float to(float kept) { return kept; }
};
struct AsBFloat16 {
  using Storage = uint16_t;
  // float_to_bfloat16 without a branch. A NaN that comes of bf16 or of arithmetic has the bits that
  // stay NaN.
  static uint16_t of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
  }
  static float to(uint16_t kept) {
    const uint32_t bits = uint32_t(kept) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};
struct AsFloat16 {
  using Storage = uint16_t;
  static uint16_t of(float value) { return float_to_float16(value); }
  static float to(uint16_t kept) { return float16_to_float(kept); }
};

// Calls use(As()) for the type.
template <typename Use>
inline void as_kept(int type, Use use) {
  switch (type) {
    case TUNESMITH_FLOAT16: return use(AsFloat16());
    case TUNESMITH_BFLOAT16: return use(AsBFloat16());
    default: use(AsFloat());
  }
}

}  // namespace
}  // namespace tunesmith
