// The plain types in memory, one number at a time: the one place of csrc/cpu where a float is read
// or written, but for the vectors of each instruction set. In plain C++ that the compiler turns
// into the vectors of the file that includes this.
#pragma once

#include <cstdint>

#include "../floats.h"
#include "../kernels.h"

namespace tunesmith {
namespace {

// `widen` is the fp32 that an element stands for, `narrow` rounds to it.
struct Float32Element {
  using Storage = float;
  static float widen(float element) { return element; }
  static float narrow(float value) { return value; }
};
struct Float16Element {
  using Storage = uint16_t;
  static float widen(uint16_t element) { return float16_to_float(element); }
  static uint16_t narrow(float value) { return float_to_float16(value); }
};
struct BFloat16Element {
  using Storage = uint16_t;
  static float widen(uint16_t element) { return bfloat16_to_float(element); }
  // float_to_bfloat16 without a branch. A NaN that comes of bf16 or of arithmetic has the bits that
  // stay NaN.
  static uint16_t narrow(float value) {
    const uint32_t bits = bits_of(value);
    return uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
  }
};
// The same for any NaN, which becomes the one that torch writes.
struct AnyBFloat16Element : BFloat16Element {
  static uint16_t narrow(float value) { return float_to_bfloat16(value); }
};

// Calls use(Element()) for a type.
template <typename Use>
inline void with_element(int type, Use use) {
  switch (type) {
    case TUNESMITH_FLOAT16: return use(Float16Element());
    case TUNESMITH_BFLOAT16: return use(BFloat16Element());
    default: use(Float32Element());
  }
}

// Element `at` of data of that type.
inline float load_float(const void* data, int type, int64_t at) {
  switch (type) {
    case TUNESMITH_FLOAT16: return float16_to_float(static_cast<const uint16_t*>(data)[at]);
    case TUNESMITH_BFLOAT16: return bfloat16_to_float(static_cast<const uint16_t*>(data)[at]);
    default: return static_cast<const float*>(data)[at];
  }
}

inline void store_float(void* data, int type, int64_t at, float value) {
  switch (type) {
    case TUNESMITH_FLOAT16: static_cast<uint16_t*>(data)[at] = float_to_float16(value); break;
    case TUNESMITH_BFLOAT16: static_cast<uint16_t*>(data)[at] = float_to_bfloat16(value); break;
    default: static_cast<float*>(data)[at] = value;
  }
}

// So many sum up in fp32 without losing what is small.
constexpr int64_t kSummedAtOnce = 1024;

}  // namespace
}  // namespace tunesmith
