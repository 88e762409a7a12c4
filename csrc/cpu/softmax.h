// What attention does between its products, in plain C++ that the compiler turns into the vectors of
// the file that includes this.
#pragma once

#include <cstring>

#include "../nf4.h"
#include "isa.h"

namespace tunesmith {
namespace {

// e to the power of x, within 2 units in the last place from -87 to 88 and held at either end of that;
// NaN stays NaN. The polynomial is the Taylor series on [-ln 2 / 2, ln 2 / 2].
inline float exp_of(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
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

struct AsFloat {
  using Storage = float;
  static float of(float value) { return value; }
};
struct AsBFloat16 {
  using Storage = uint16_t;
  // float_to_bfloat16 without a branch; the sums' NaN has the bits that stay NaN
  static uint16_t of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return uint16_t((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
  }
};
struct AsFloat16 {
  using Storage = uint16_t;
  static uint16_t of(float value) { return float_to_float16(value); }
};

template <typename As>
void softmax_backward_as(const SoftmaxJob& job) {
  using Storage = typename As::Storage;
  for (int64_t k = 0; k < job.keys; ++k) {
    const int64_t row = k * job.queries;
    auto* const probabilities = static_cast<Storage*>(job.probabilities) + row;
    auto* const score_grads = static_cast<Storage*>(job.score_grads) + row;
    const float* const scores = job.scores + row;
    const float* const grads = job.grads + row;
    const int64_t hidden = k + job.offset;  // queries before the first that sees this key
    const int64_t first = hidden < 0 ? 0 : hidden < job.queries ? hidden : job.queries;
    for (int64_t i = 0; i < first; ++i) probabilities[i] = score_grads[i] = Storage(0);
    for (int64_t i = first; i < job.queries; ++i) {
      const float p = exp_of(scores[i] - job.lse[i]);
      probabilities[i] = As::of(p);
      score_grads[i] = As::of(p * (grads[i] - job.delta[i]) * job.scale);
    }
  }
}

void softmax_backward(const SoftmaxJob& job) {
  switch (job.dtype) {
    case TUNESMITH_FLOAT16: return softmax_backward_as<AsFloat16>(job);
    case TUNESMITH_BFLOAT16: return softmax_backward_as<AsBFloat16>(job);
    default: softmax_backward_as<AsFloat>(job);
  }
}

}  // namespace
}  // namespace tunesmith
