// How 16-bit floats are read and written, one number at a time: bf16 and fp16, to and from fp32.
// For the host and for CUDA devices.
//
// Everything here, and in the headers that include it, has internal linkage: each object of an
// instruction set is compiled with its own flags, and the linker must not hand one object's copy to
// another.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define TUNESMITH_HD static __host__ __device__ inline
#else
#define TUNESMITH_HD static inline
#endif

namespace tunesmith {
namespace {

TUNESMITH_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

TUNESMITH_HD float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

TUNESMITH_HD float bfloat16_to_float(uint16_t half) { return float_of(uint32_t(half) << 16); }

// To nearest, ties to even; NaN becomes the quiet NaN that torch writes.
TUNESMITH_HD uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FC0u;
  return uint16_t((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

TUNESMITH_HD float float16_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7FFFu;
  if (magnitude >= 0x7C00u) {  // Inf, NaN
    return float_of(sign | 0x7F800000u | ((magnitude & 0x3FFu) << 13));
  }
  if (magnitude < 0x400u) {  // a subnormal is that many times 2^-24, exactly
    const float value = float(magnitude) * 5.9604644775390625e-8f;
    return float_of(sign | bits_of(value));
  }
  return float_of(sign | ((magnitude + 0x1C000u) << 13));  // exponent bias 15 to 127
}

// To nearest, ties to even; too large becomes Inf.
TUNESMITH_HD uint16_t float_to_float16(float value) {
  const uint32_t bits = bits_of(value);
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return uint16_t(sign | 0x7E00u);
  if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // 65520 and up
  if (magnitude < 0x38800000u) {
    // subnormal in fp16: adding 0.5 leaves its 10 bits, rounded by the FPU, at the mantissa's end
    const float shifted = float_of(magnitude) + 0.5f;
    return uint16_t(sign | (bits_of(shifted) - 0x3F000000u));
  }
  const uint32_t odd = (magnitude >> 13) & 1u;
  return uint16_t(sign | ((magnitude - 0x38000000u + 0xFFFu + odd) >> 13));
}

}  // namespace
}  // namespace tunesmith
