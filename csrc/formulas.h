// What stands between the products of a layer, one element at a time: norms, gated units, rotary
// embedding. For the host, whose compiler turns it into vectors, and for CUDA devices.
//
// `Element` is a type in memory: Element::narrow rounds to it, Element::widen is the fp32 that it
// stands for. Everything rounds where the same in PyTorch would leave a tensor in 16 bits, so that
// it is rounded to the same values.
#pragma once

#include "floats.h"

namespace tunesmith {
namespace {

// e to the power of x, within 2 units in the last place from -87 to 87 and held at either end of
// that; NaN stays NaN. The polynomial is the Taylor series on [-ln 2 / 2, ln 2 / 2].
TUNESMITH_HD float exp_of(float x) {
  // compared as integers: a choice between floats keeps GCC from vectors
  const uint32_t bits = bits_of(x), sign = bits & 0x80000000u, size = bits & 0x7FFFFFFFu;
  constexpr uint32_t kMax = 0x42AE0000u, kInfinity = 0x7F800000u;  // 87
  x = float_of(sign | (size > kMax && size <= kInfinity ? kMax : size));
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
  // the low bits of `rounded` are n
  return sum * float_of((bits_of(rounded) + 127u) << 23);
}

template <typename Element>
TUNESMITH_HD float rounded_to(float value) {
  return Element::widen(Element::narrow(value));
}

// The weight of a norm as it is, times what has been rounded, and one that counts from one.
struct Plain {
  template <typename Element>
  TUNESMITH_HD float times(float value, float weight) {
    return rounded_to<Element>(value) * weight;
  }
  template <typename Element>
  TUNESMITH_HD float back(float grad, float weight) {
    return rounded_to<Element>(grad * weight);
  }
};
struct FromOne {
  template <typename Element>
  TUNESMITH_HD float times(float value, float weight) {
    return value * (1.0f + weight);
  }
  template <typename Element>
  TUNESMITH_HD float back(float grad, float weight) {
    return grad * (1.0f + weight);
  }
};

// Both activations are x sigmoid(inner(x)): SiLU with inner(x) = x, and GELU's approximation by
// tanh (arXiv:1606.08415) since (1 + tanh u) / 2 = sigmoid(2 u).
struct Silu {
  TUNESMITH_HD float inner(float x) { return x; }
  TUNESMITH_HD float slope(float) { return 1.0f; }
};
struct GeluTanh {
  static constexpr float kLinear = 1.59576912f,
                         kCubic = 0.0713548163f;  // 2 sqrt(2 / pi) (1, 0.044715)
  TUNESMITH_HD float inner(float x) { return x * (kLinear + kCubic * x * x); }
  TUNESMITH_HD float slope(float x) { return kLinear + 3.0f * kCubic * x * x; }
};

// activation(gate) up
template <typename Element, typename Activation>
TUNESMITH_HD float gated_of(float gate, float up) {
  return rounded_to<Element>(gate * (1.0f / (1.0f + exp_of(-Activation::inner(gate))))) * up;
}

// Functions of numbers and not of pairs of them: a struct keeps GCC from vectors.

// The gradient of gate, and that of up.
template <typename Element, typename Activation>
TUNESMITH_HD float gated_back(float grad, float gate, float up) {
  const float e = exp_of(-Activation::inner(gate));
  const float sigmoid = 1.0f / (1.0f + e), rest = e * sigmoid;  // 1 - sigmoid would cancel
  const float slope = sigmoid * (1.0f + gate * rest * Activation::slope(gate));
  return rounded_to<Element>(grad * up) * slope;
}
template <typename Element, typename Activation>
TUNESMITH_HD float gated_back_up(float grad, float gate) {
  return grad * rounded_to<Element>(gate * (1.0f / (1.0f + exp_of(-Activation::inner(gate)))));
}

// A pair of a head rotated by an angle (RoFormer, arXiv:2104.09864), each number by a cosine and a
// sine.
template <typename Element>
TUNESMITH_HD float rotated_first(float first, float second, float cos, float sin) {
  return rounded_to<Element>(first * cos) - rounded_to<Element>(second * sin);
}
template <typename Element>
TUNESMITH_HD float rotated_second(float first, float second, float cos, float sin) {
  return rounded_to<Element>(second * cos) + rounded_to<Element>(first * sin);
}

}  // namespace
}  // namespace tunesmith
