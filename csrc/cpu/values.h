// Numbers as they are kept in memory, in plain C++ that the compiler turns into the vectors of the file
// that includes this.
#pragma once

#include <cstdint>
#include <cstring>

#include "../formulas.h"

namespace tunesmith {
namespace {

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

// So many sum up in fp32 without losing what is small.
constexpr int64_t kSummedAtOnce = 1024;

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
