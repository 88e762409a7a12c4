// The formulas of ../formulas.h over whole tensors, one pass each, in plain C++ that the compiler
// turns into the vectors of the file that includes this.
#pragma once

#include <algorithm>
#include <cmath>

#include "jobs.h"
#include "../formulas.h"
#include "elements.h"

namespace tunesmith {
namespace {

template <typename Element>
const typename Element::Storage* elements_at(const void* data, int64_t element) {
  return static_cast<const typename Element::Storage*>(data) + element;
}

template <typename Element>
typename Element::Storage* elements_at(void* data, int64_t element) {
  return static_cast<typename Element::Storage*>(data) + element;
}

template <typename Element, typename Weight>
void norm_as(const NormJob& job, int64_t row) {
  const int64_t columns = job.columns;
  const auto* const x = elements_at<Element>(job.x, row * columns);
  const auto* const weight = elements_at<Element>(job.weight, 0);
  auto* const out = elements_at<Element>(job.out, row * columns);
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < columns; ++i) squares += Element::widen(x[i]) * Element::widen(x[i]);
  const float scale = 1.0f / std::sqrt(squares / float(columns) + job.eps);
  job.scale[row] = scale;
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) {
    out[i] = Element::narrow(
        Weight::template times<Element>(Element::widen(x[i]) * scale, Element::widen(weight[i])));
  }
}

template <typename Element, typename Weight>
void norm_backward_as(const NormJob& job, int64_t row) {
  const int64_t columns = job.columns;
  const auto* const x = elements_at<Element>(job.x, row * columns);
  const auto* const grad = elements_at<Element>(job.grad_out, row * columns);
  const auto* const weight = elements_at<Element>(job.weight, 0);
  auto* const out = elements_at<Element>(job.out, row * columns);
  const float scale = job.scale[row];
  float along = 0.0f;  // the part of the gradient that only changes the length of x
#pragma omp simd reduction(+ : along)
  for (int64_t i = 0; i < columns; ++i) {
    along += Weight::template back<Element>(Element::widen(grad[i]), Element::widen(weight[i])) *
             Element::widen(x[i]);
  }
  along *= scale * scale / float(columns);
  const auto grad_at = [&](int64_t i) {
    const float inflow =
        Weight::template back<Element>(Element::widen(grad[i]), Element::widen(weight[i]));
    return scale * (inflow - Element::widen(x[i]) * along);
  };
  if (job.plus == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) out[i] = Element::narrow(grad_at(i));
    return;
  }
  const auto* const plus = elements_at<Element>(job.plus, row * columns);
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i)
    out[i] = Element::narrow(grad_at(i) + Element::widen(plus[i]));
}

template <typename Element, typename Weight>
void norm_with(const NormJob& job, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    if (job.grad_out == nullptr) {
      norm_as<Element, Weight>(job, row);
    } else {
      norm_backward_as<Element, Weight>(job, row);
    }
  }
}

inline void norm(const NormJob& job, int64_t first, int64_t last) {
  with_element(job.dtype, [&](auto element) {
    using Element = decltype(element);
    (job.from_one ? norm_with<Element, FromOne> : norm_with<Element, Plain>)(job, first, last);
  });
}

// Large tensors are gone from the caches when they are read again.
constexpr int64_t kChunk = 128, kAhead = 1024;

template <typename Storage>
void prefetch(const Storage* data, int64_t begin, int64_t last) {
  const Storage* const end = data + std::min(last, begin + kAhead + kChunk);
  for (const Storage* at = data + begin + kAhead; at < end; at += 64 / sizeof(Storage))
    __builtin_prefetch(at);
}

// Calls use(begin, end) for some elements after another, and prefetches those of the tensors that
// come next.
template <typename Use, typename... Storage>
void each_chunk(int64_t first, int64_t last, Use use, const Storage*... tensors) {
  for (int64_t begin = first; begin < last; begin += kChunk) {
    (prefetch(tensors, begin, last), ...);
    use(begin, begin + kChunk < last ? begin + kChunk : last);
  }
}

template <typename Element, typename Activation>
void gated_as(const GatedJob& job, int64_t first, int64_t last) {
  const auto* const gate = elements_at<Element>(job.gate, 0);
  const auto* const up = elements_at<Element>(job.up, 0);
  auto* const out = elements_at<Element>(job.out, 0);
  const auto some = [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      out[i] = Element::narrow(
          gated_of<Element, Activation>(Element::widen(gate[i]), Element::widen(up[i])));
    }
  };
  each_chunk(first, last, some, gate, up);
}

template <typename Element, typename Activation>
void gated_backward_as(const GatedJob& job, int64_t first, int64_t last) {
  const auto* const gate = elements_at<Element>(job.gate, 0);
  const auto* const up = elements_at<Element>(job.up, 0);
  const auto* const grad = elements_at<Element>(job.grad_out, 0);
  auto* const grad_gate = elements_at<Element>(job.grad_gate, 0);
  auto* const grad_up = elements_at<Element>(job.grad_up, 0);
  const auto some = [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const float inflow = Element::widen(grad[i]), of_gate = Element::widen(gate[i]);
      grad_gate[i] =
          Element::narrow(gated_back<Element, Activation>(inflow, of_gate, Element::widen(up[i])));
      grad_up[i] = Element::narrow(gated_back_up<Element, Activation>(inflow, of_gate));
    }
  };
  each_chunk(first, last, some, gate, up, grad);
}

inline void gated(const GatedJob& job, int64_t first, int64_t last) {
  with_element(job.dtype, [&](auto element) {
    using Element = decltype(element);
    const bool silu = job.activation == TUNESMITH_SILU;
    if (job.grad_out == nullptr) {
      (silu ? gated_as<Element, Silu> : gated_as<Element, GeluTanh>)(job, first, last);
    } else {
      (silu ? gated_backward_as<Element, Silu> : gated_backward_as<Element, GeluTanh>)(job, first,
                                                                                       last);
    }
  });
}

// The pairs of a head are (x[i], x[i + size / 2]).
template <typename Element, bool Backward>
void rotary_as(const RotaryJob& job, int64_t token) {
  const int64_t half = job.head_size / 2, width = job.heads * job.head_size;
  const auto* const cos = elements_at<Element>(job.cos, token % job.positions * job.head_size);
  const auto* const sin = elements_at<Element>(job.sin, token % job.positions * job.head_size);
  for (int64_t at = token * width; at < (token + 1) * width; at += job.head_size) {
    const auto* const x = elements_at<Element>(job.x, at);
    auto* const out = elements_at<Element>(job.out, at);
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float first = Element::widen(x[i]), second = Element::widen(x[half + i]);
      const float sin_first = Element::widen(sin[i]), sin_second = Element::widen(sin[half + i]);
      // back is by the other's sine, and the other way round
      const float into_first = Backward ? -sin_second : sin_first;
      const float into_second = Backward ? -sin_first : sin_second;
      out[i] = Element::narrow(
          rotated_first<Element>(first, second, Element::widen(cos[i]), into_first));
      out[half + i] = Element::narrow(
          rotated_second<Element>(first, second, Element::widen(cos[half + i]), into_second));
    }
  }
}

inline void rotary(const RotaryJob& job, int64_t first, int64_t last) {
  with_element(job.dtype, [&](auto element) {
    using Element = decltype(element);
    for (int64_t token = first; token < last; ++token) {
      (job.backward ? rotary_as<Element, true> : rotary_as<Element, false>)(job, token);
    }
  });
}

}  // namespace
}  // namespace tunesmith
