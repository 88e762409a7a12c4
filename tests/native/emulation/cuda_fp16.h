// fp16 as in CUDA, worked out by arithmetic, so that it is not the product's bit tricks over again.
#pragma once

#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};

inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half half) { return half.bits; }

inline float __half2float(__half half) {
  const int exponent = half.bits >> 10 & 31, mantissa = half.bits & 1023;
  double value = std::ldexp(1024 + mantissa, exponent - 25);
  if (exponent == 0) value = std::ldexp(mantissa, -24);
  if (exponent == 31) value = mantissa == 0 ? INFINITY : NAN;
  return static_cast<float>(half.bits >> 15 ? -value : value);
}

inline __half __float2half_rn(float value) {
  if (std::isnan(value)) return {0x7FFF};
  const unsigned sign = std::signbit(value) ? 0x8000u : 0u;
  const double magnitude = std::fabs(value);
  if (magnitude >= 65520) return {static_cast<uint16_t>(sign | 0x7C00u)};
  int exponent = magnitude == 0 ? -14 : std::ilogb(magnitude);
  if (exponent < -14) exponent = -14;
  // how many units in the last place: 1024 and more unless it is subnormal
  const auto units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  const unsigned bits = units < 1024 ? units : (exponent + 15) * 1024 + units - 1024;
  return {static_cast<uint16_t>(sign | bits)};
}

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
