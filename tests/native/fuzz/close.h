// Whether a kernel's number is what fp32 arithmetic and a rounding may make of the exact one.
#pragma once

#include <cmath>
#include <initializer_list>

#include "check.h"
#include "memory.h"
#include "numbers.h"

namespace fuzz {

// The unit in which fp32 arithmetic is off.
constexpr double kUnit = 0x1p-24;

// The largest magnitude in some tensors; infinite if there is an Inf or a NaN.
inline double largest(std::initializer_list<const Tensor*> tensors) {
  double most = 0;
  for (const Tensor* tensor : tensors) {
    for (int64_t i = 0; i < tensor->count(); ++i) {
      const double size = std::fabs((*tensor)[i]);
      if (!(size < INFINITY)) return INFINITY;
      most = std::max(most, size);
    }
  }
  return most;
}

// Fails unless `actual` is `exact` within `slack`, and then rounded to `type`.
inline void check_close(const char* what, int64_t at, double actual, double exact, double slack,
                        int type) {
  const double limit = slack + half_unit(std::fabs(exact) + slack, type);
  if (std::fabs(actual - exact) <= limit || is_overflow(actual, exact, limit, type)) return;
  fail("%s[%lld] is %.9g, not %.9g within %.3g", what, static_cast<long long>(at), actual, exact,
       limit);
}

}  // namespace fuzz
