// The formulas of ../formulas.h over whole tensors, one pass each, in plain C++ that the compiler turns
// into the vectors of the file that includes this.
#pragma once

#include <algorithm>
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
    out[i] = As::of(Weight::template times<As>(As::to(x[i]) * scale, As::to(weight[i])));
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
    along += Weight::template back<As>(As::to(grad[i]), As::to(weight[i])) * As::to(x[i]);
  }
  along *= scale * scale / float(columns);
  const auto grad_at = [&](int64_t i) {
    const float inflow = Weight::template back<As>(As::to(grad[i]), As::to(weight[i]));
    return scale * (inflow - As::to(x[i]) * along);
  };
  if (job.plus == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < columns; ++i) out[i] = As::of(grad_at(i));
    return;
  }
  const auto* const plus = kept_at<As>(job.plus, row * columns);
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) out[i] = As::of(grad_at(i) + As::to(plus[i]));
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

// Large tensors are gone from the caches when they are asked for again.
constexpr int64_t kChunk = 128, kAhead = 1024;

template <typename Storage>
void ask_for(const Storage* data, int64_t begin, int64_t last) {
  const Storage* const end = data + std::min(last, begin + kAhead + kChunk);
  for (const Storage* at = data + begin + kAhead; at < end; at += 64 / sizeof(Storage)) __builtin_prefetch(at);
}

// Calls use(begin, end) for some elements after another, and asks for those of the tensors that come next.
template <typename Use, typename... Storage>
void each_chunk(int64_t first, int64_t last, Use use, const Storage*... tensors) {
  for (int64_t begin = first; begin < last; begin += kChunk) {
    (ask_for(tensors, begin, last), ...);
    use(begin, begin + kChunk < last ? begin + kChunk : last);
  }
}

template <typename As, typename Activation>
void gated_as(const GatedJob& job, int64_t first, int64_t last) {
  const auto* const gate = kept_at<As>(job.gate, 0);
  const auto* const up = kept_at<As>(job.up, 0);
  auto* const out = kept_at<As>(job.out, 0);
  const auto some = [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      out[i] = As::of(gated_of<As, Activation>(As::to(gate[i]), As::to(up[i])));
    }
  };
  each_chunk(first, last, some, gate, up);
}

template <typename As, typename Activation>
void gated_backward_as(const GatedJob& job, int64_t first, int64_t last) {
  const auto* const gate = kept_at<As>(job.gate, 0);
  const auto* const up = kept_at<As>(job.up, 0);
  const auto* const grad = kept_at<As>(job.grad_out, 0);
  auto* const grad_gate = kept_at<As>(job.grad_gate, 0);
  auto* const grad_up = kept_at<As>(job.grad_up, 0);
  const auto some = [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
      const float inflow = As::to(grad[i]), of_gate = As::to(gate[i]);
      grad_gate[i] = As::of(gated_back<As, Activation>(inflow, of_gate, As::to(up[i])));
      grad_up[i] = As::of(gated_back_up<As, Activation>(inflow, of_gate));
    }
  };
  each_chunk(first, last, some, gate, up, grad);
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

// The pairs of a head are (x[i], x[i + size / 2]).
template <typename As, bool Backward>
void rotary_as(const RotaryJob& job, int64_t token) {
  const int64_t half = job.size / 2, width = job.heads * job.size;
  const auto* const cos = kept_at<As>(job.cos, token % job.positions * job.size);
  const auto* const sin = kept_at<As>(job.sin, token % job.positions * job.size);
  for (int64_t at = token * width; at < (token + 1) * width; at += job.size) {
    const auto* const x = kept_at<As>(job.x, at);
    auto* const out = kept_at<As>(job.out, at);
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
      const float first = As::to(x[i]), second = As::to(x[half + i]);
      const float sin_first = As::to(sin[i]), sin_second = As::to(sin[half + i]);
      // back is by the other's sine, and the other way round
      const float into_first = Backward ? -sin_second : sin_first;
      const float into_second = Backward ? -sin_first : sin_second;
      out[i] = As::of(turned_first<As>(first, second, As::to(cos[i]), into_first));
      out[half + i] = As::of(turned_second<As>(first, second, As::to(cos[half + i]), into_second));
    }
  }
}

inline void rotary(const RotaryJob& job, int64_t first, int64_t last) {
  as_kept(job.dtype, [&](auto as) {
    using As = decltype(as);
    for (int64_t token = first; token < last; ++token) {
      (job.backward ? rotary_as<As, true> : rotary_as<As, false>)(job, token);
    }
  });
}

}  // namespace
}  // namespace tunesmith
