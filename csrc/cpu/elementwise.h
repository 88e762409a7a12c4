// What stands between the products of a layer, each in one pass over its tensors, in plain C++ that the
// compiler turns into the vectors of the file that includes this.
//
// Everything rounds where the same in PyTorch would leave a tensor in 16 bits, so that it is rounded to
// the same values.
#pragma once

#include <cmath>

#include "isa.h"
#include "values.h"

namespace tunesmith {
namespace {

template <typename As>
const typename As::Storage* kept_at(const void* data, int64_t element) {
  return static_cast<const typename As::Storage*>(data) + element;
}

template <typename As>
typename As::Storage* kept_at(void* data, int64_t element) {
  return static_cast<typename As::Storage*>(data) + element;
}

// The weight of a norm as it is, times what has been rounded, and one that counts from one.
struct Plain {
  template <typename As>
  static float times(float value, typename As::Storage weight) {
    return As::to(As::of(value)) * As::to(weight);
  }
  template <typename As>
  static float back(float grad, typename As::Storage weight) {
    return As::to(As::of(grad * As::to(weight)));
  }
};
struct FromOne {
  template <typename As>
  static float times(float value, typename As::Storage weight) {
    return value * (1.0f + As::to(weight));
  }
  template <typename As>
  static float back(float grad, typename As::Storage weight) {
    return grad * (1.0f + As::to(weight));
  }
};

template <typename As, typename Weight>
void norm_as(const NormJob& job, int64_t row) {
  const int64_t columns = job.columns;
  const auto* const x = kept_at<As>(job.x, row * columns);
  const auto* const weight = kept_at<As>(job.weight, 0);
  auto* const out = kept_at<As>(job.out, row * columns);
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < columns; ++i) squares += As::to(x[i]) * As::to(x[i]);
  const float scale = 1.0f / std::sqrt(squares / float(columns) + job.eps);
  job.scale[row] = scale;
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) {
    out[i] = As::of(Weight::template times<As>(As::to(x[i]) * scale, weight[i]));
  }
}

template <typename As, typename Weight>
void norm_backward_as(const NormJob& job, int64_t row) {
  const int64_t columns = job.columns;
  const auto* const x = kept_at<As>(job.x, row * columns);
  const auto* const grad = kept_at<As>(job.grad_out, row * columns);
  const auto* const weight = kept_at<As>(job.weight, 0);
  auto* const out = kept_at<As>(job.out, row * columns);
  const float scale = job.scale[row];
  float along = 0.0f;  // the part of the gradient that only changes the length of x
#pragma omp simd reduction(+ : along)
  for (int64_t i = 0; i < columns; ++i) {
    along += Weight::template back<As>(As::to(grad[i]), weight[i]) * As::to(x[i]);
  }
  along *= scale * scale / float(columns);
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) {
    const float inflow = Weight::template back<As>(As::to(grad[i]), weight[i]);
    out[i] = As::of(scale * (inflow - As::to(x[i]) * along));
  }
}

template <typename As, typename Weight>
void norm_with(const NormJob& job, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    if (job.grad_out == nullptr) {
      norm_as<As, Weight>(job, row);
    } else {
      norm_backward_as<As, Weight>(job, row);
    }
  }
}

inline void norm(const NormJob& job, int64_t first, int64_t last) {
  as_kept(job.dtype, [&](auto as) {
    using As = decltype(as);
    (job.from_one ? norm_with<As, FromOne> : norm_with<As, Plain>)(job, first, last);
  });
}

// Both activations are x sigmoid(inner(x)): SiLU with inner(x) = x, and GELU's approximation by tanh
// (arXiv:1606.08415) since (1 + tanh u) / 2 = sigmoid(2 u).
struct Silu {
  static float inner(float x) { return x; }
  static float slope(float) { return 1.0f; }
};
struct GeluTanh {
  static constexpr float kLinear = 1.59576912f, kCubic = 0.0713548163f;  // 2 sqrt(2 / pi) (1, 0.044715)
  static float inner(float x) { return x * (kLinear + kCubic * x * x); }
  static float slope(float x) { return kLinear + 3.0f * kCubic * x * x; }
};

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

template <typename As, typename Activation>
void gated_as(const GatedJob& job, int64_t first, int64_t last) {
  const auto* const gate = kept_at<As>(job.gate, 0);
  const auto* const up = kept_at<As>(job.up, 0);
  auto* const out = kept_at<As>(job.out, 0);
#pragma omp simd
  for (int64_t i = first; i < last; ++i) {
    const float x = As::to(gate[i]);
    out[i] = As::of(As::to(As::of(x * sigmoid(Activation::inner(x)))) * As::to(up[i]));
  }
}

template <typename As, typename Activation>
void gated_backward_as(const GatedJob& job, int64_t first, int64_t last) {
  const auto* const gate = kept_at<As>(job.gate, 0);
  const auto* const up = kept_at<As>(job.up, 0);
  const auto* const grad = kept_at<As>(job.grad_out, 0);
  auto* const grad_gate = kept_at<As>(job.grad_gate, 0);
  auto* const grad_up = kept_at<As>(job.grad_up, 0);
#pragma omp simd
  for (int64_t i = first; i < last; ++i) {
    const float x = As::to(gate[i]), inflow = As::to(grad[i]);
    const float e = exp_of(-Activation::inner(x));
    const float share = 1.0f / (1.0f + e), rest = e * share;  // 1 - share would cancel
    const float slope = share * (1.0f + x * rest * Activation::slope(x));
    grad_up[i] = As::of(inflow * As::to(As::of(x * share)));
    grad_gate[i] = As::of(As::to(As::of(inflow * As::to(up[i]))) * slope);
  }
}

inline void gated(const GatedJob& job, int64_t first, int64_t last) {
  as_kept(job.dtype, [&](auto as) {
    using As = decltype(as);
    const bool silu = job.activation == TUNESMITH_SILU;
    if (job.grad_out == nullptr) {
      (silu ? gated_as<As, Silu> : gated_as<As, GeluTanh>)(job, first, last);
    } else {
      (silu ? gated_backward_as<As, Silu> : gated_backward_as<As, GeluTanh>)(job, first, last);
    }
  });
}

// Turns the pairs (x[i], x[i + size / 2]) of each head by an angle (RoFormer, arXiv:2104.09864), or back.
template <typename As>
void rotary_as(const RotaryJob& job, int64_t token) {
  const int64_t half = job.size / 2, width = job.heads * job.size;
  const auto* const cos = kept_at<As>(job.cos, token * job.size);
  const auto* const sin = kept_at<As>(job.sin, token * job.size);
  const auto product = [](typename As::Storage a, float b) { return As::to(As::of(As::to(a) * b)); };
  for (int64_t at = token * width; at < (token + 1) * width; at += job.size) {
    const auto* const low = kept_at<As>(job.x, at);
    const auto* const high = low + half;
    auto* const out = kept_at<As>(job.out, at);
    if (job.backward) {
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        out[i] = As::of(product(low[i], As::to(cos[i])) + product(high[i], As::to(sin[half + i])));
        out[half + i] =
            As::of(product(high[i], As::to(cos[half + i])) - product(low[i], As::to(sin[i])));
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        out[i] = As::of(product(low[i], As::to(cos[i])) - product(high[i], As::to(sin[i])));
        out[half + i] =
            As::of(product(high[i], As::to(cos[half + i])) + product(low[i], As::to(sin[half + i])));
      }
    }
  }
}

inline void rotary(const RotaryJob& job, int64_t first, int64_t last) {
  as_kept(job.dtype, [&](auto as) {
    for (int64_t token = first; token < last; ++token) rotary_as<decltype(as)>(job, token);
  });
}

}  // namespace
}  // namespace tunesmith
