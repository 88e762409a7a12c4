// The three float types in double precision, worked out apart from csrc/four_bit.h, and sums with
// what they may be off by.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "../../../csrc/kernels.h"

namespace fuzz {

struct Format {
  int precision;    // bits, with the one that is not stored
  int least, most;  // exponents of the smallest and the largest normal number
};

inline Format format_of(int dtype) {
  if (dtype == TUNESMITH_FLOAT16) return {11, -14, 15};
  return {dtype == TUNESMITH_BFLOAT16 ? 8 : 24, -126, 127};
}

inline double read(const uint8_t* data, int dtype, int64_t at) {
  if (dtype == TUNESMITH_FLOAT32) {
    float value;
    std::memcpy(&value, data + 4 * at, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, data + 2 * at, 2);
  const Format format = format_of(dtype);
  const int mantissa_bits = format.precision - 1;
  const int mantissa = bits & ((1 << mantissa_bits) - 1);
  const int exponent = (bits & 0x7FFF) >> mantissa_bits;
  const double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << (15 - mantissa_bits)) - 1) return mantissa ? NAN : sign * INFINITY;
  const int implied = exponent == 0 ? 0 : 1 << mantissa_bits;
  return sign *
         std::ldexp(implied + mantissa, format.least - mantissa_bits + std::max(exponent - 1, 0));
}

// To nearest, ties to even; too large becomes Inf.
inline double rounded(double value, int dtype) {
  if (value == 0 || !std::isfinite(value)) return value;
  const Format format = format_of(dtype);
  const int exponent = std::max(std::ilogb(value), format.least);
  const double unit = std::ldexp(1.0, exponent - format.precision + 1);
  const double out = std::nearbyint(value / unit) * unit;
  return std::fabs(out) < std::ldexp(1.0, format.most + 1) ? out : std::copysign(INFINITY, out);
}

// By how much rounding to a dtype may change a number of that size.
inline double half_unit(double size, int dtype) {
  const Format format = format_of(dtype);
  return std::ldexp(size, -format.precision) + std::ldexp(0.5, format.least - format.precision + 1);
}

// Whether a number is the infinity that one within `limit` of `exact` is rounded to in fp16.
inline bool is_overflow(double actual, double exact, double limit, int dtype) {
  return dtype == TUNESMITH_FLOAT16 && std::isinf(actual) &&
         actual == rounded(exact + std::copysign(limit, exact), dtype);
}

// A sum, and the sum of its terms' magnitudes: what its rounding errors are in proportion to.
struct Sum {
  double value = 0, size = 0;

  void add(double term) {
    value += term;
    size += std::fabs(term);
  }
  // A sum that is itself as far off as its size.
  void add(const Sum& term, double factor) {
    value += factor * term.value;
    size += std::fabs(factor) * term.size;
  }
};

// The same bits but for the kind of NaN.
inline bool same(double a, double b) {
  if (std::isnan(a) || std::isnan(b)) return std::isnan(a) && std::isnan(b);
  return a == b && std::signbit(a) == std::signbit(b);
}

}  // namespace fuzz
