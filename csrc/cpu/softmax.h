// What attention does between its products, in plain C++ that the compiler turns into the vectors
// of the file that includes this.
#pragma once

#include <cmath>

#include "jobs.h"
#include "../formulas.h"
#include "elements.h"

namespace tunesmith {
namespace {

// The first query that sees the k-th key of a block.
inline int64_t first_to_see(int64_t k, int64_t offset, int64_t queries) {
  const int64_t hidden = k + offset;
  return hidden < 0 ? 0 : hidden < queries ? hidden : queries;
}

template <typename Element>
void softmax_backward_as(const SoftmaxJob& job) {
  using Storage = typename Element::Storage;
  for (int64_t k = 0; k < job.keys; ++k) {
    const int64_t row = k * job.queries;
    auto* const probabilities = static_cast<Storage*>(job.probabilities) + row;
    auto* const score_grads = static_cast<Storage*>(job.score_grads) + row;
    const float* const scores = job.scores + row;
    const float* const grads = job.grads + row;
    const int64_t first = first_to_see(k, job.offset, job.queries);
    for (int64_t i = 0; i < first; ++i) probabilities[i] = score_grads[i] = Storage(0);
    for (int64_t i = first; i < job.queries; ++i) {
      const float p = exp_of(scores[i] - job.lse[i]);
      probabilities[i] = Element::narrow(p);
      score_grads[i] = Element::narrow(p * (grads[i] - job.delta[i]) * job.scale);
    }
  }
}

void softmax_backward(const SoftmaxJob& job) {
  with_element(job.dtype, [&](auto element) { softmax_backward_as<decltype(element)>(job); });
}

template <typename Element>
void softmax_forward_as(const SoftmaxForwardJob& job) {
  using Storage = typename Element::Storage;
  const int64_t queries = job.queries;
  float* const running_max = job.running_max;
  float* const running_sum = job.running_sum;
  for (int64_t i = 0; i < queries; ++i) job.rescale[i] = running_max[i];
  for (int64_t k = 0; k < job.keys; ++k) {
    const float* const scores = job.scores + k * queries;
#pragma omp simd
    for (int64_t i = first_to_see(k, job.offset, queries); i < queries; ++i) {
      running_max[i] = scores[i] > running_max[i] ? scores[i] : running_max[i];
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    job.rescale[i] = exp_of(job.rescale[i] - running_max[i]);
    running_sum[i] *= job.rescale[i];
  }
  for (int64_t k = 0; k < job.keys; ++k) {
    const float* const scores = job.scores + k * queries;
    auto* const probabilities = static_cast<Storage*>(job.probabilities) + k * queries;
    const int64_t first = first_to_see(k, job.offset, queries);
    for (int64_t i = 0; i < first; ++i) probabilities[i] = Storage(0);
#pragma omp simd
    for (int64_t i = first; i < queries; ++i) {
      const float p = exp_of(scores[i] - running_max[i]);
      running_sum[i] += p;
      probabilities[i] = Element::narrow(p);
    }
  }
}

void softmax_forward(const SoftmaxForwardJob& job) {
  with_element(job.dtype, [&](auto element) { softmax_forward_as<decltype(element)>(job); });
}

template <typename Element>
void logps_of_row(const LogpsJob& job, int64_t row) {
  const int64_t columns = job.columns;
  auto* const logits = static_cast<typename Element::Storage*>(job.logits) + row * columns;
  float max_logit = Element::widen(logits[0]);
#pragma omp simd reduction(max : max_logit)
  for (int64_t i = 0; i < columns; ++i) {
    const float value = Element::widen(logits[i]);
    max_logit = value > max_logit ? value : max_logit;
  }
  double sum = 0.0;
  for (int64_t begin = 0; begin < columns; begin += kSummedAtOnce) {
    const int64_t end = begin + kSummedAtOnce < columns ? begin + kSummedAtOnce : columns;
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) part += exp_of(Element::widen(logits[i]) - max_logit);
    sum += part;
  }
  const float log_sum =
      float(std::log(sum));  // not added to `max_logit`, beside which it may be lost
  const int64_t label = job.labels[row];
  job.logps[row] = (Element::widen(logits[label]) - max_logit) - log_sum;
  if (!job.gradients) return;
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) {
    logits[i] = Element::narrow(-exp_of((Element::widen(logits[i]) - max_logit) - log_sum));
  }
  logits[label] = Element::narrow(1.0f - exp_of(job.logps[row]));
}

inline void logps(const LogpsJob& job, int64_t first, int64_t last) {
  with_element(job.dtype, [&](auto element) {
    for (int64_t row = first; row < last; ++row) logps_of_row<decltype(element)>(job, row);
  });
}

// One head's query over the keys that its row sees, some at a time: what was summed under a smaller
// maximum is scaled down when a larger one turns up (arXiv:1805.02867).
template <typename Element>
void attention_decode_head(const AttentionDecodeJob& job, int64_t row, int64_t head) {
  using Storage = typename Element::Storage;
  constexpr int64_t kKeys = 64, kMaxHeadSize = 512;
  const int64_t size = job.head_size, shared = job.heads / job.key_heads;
  const int64_t begin = (row * job.key_heads + head / shared) * job.capacity * size;
  const auto* const keys = static_cast<const Storage*>(job.keys) + begin;
  const auto* const values = static_cast<const Storage*>(job.values) + begin;
  const int64_t at = (row * job.heads + head) * size;
  const auto* const q = static_cast<const Storage*>(job.q) + at;
  auto* const out = static_cast<Storage*>(job.out) + at;
  float query[kMaxHeadSize], running_out[kMaxHeadSize], scores[kKeys];
  for (int64_t d = 0; d < size; ++d) {
    query[d] = Element::widen(q[d]) * job.scale;
    running_out[d] = 0.0f;
  }
  float running_max = -3e38f, running_sum = 0.0f;
  for (int64_t key = job.first[row]; key < job.length; key += kKeys) {
    const int64_t count = job.length - key < kKeys ? job.length - key : kKeys;
    float new_max = running_max;
    for (int64_t k = 0; k < count; ++k) {
      const Storage* const of_key = keys + (key + k) * size;
      float score = 0.0f;
#pragma omp simd reduction(+ : score)
      for (int64_t d = 0; d < size; ++d) score += query[d] * Element::widen(of_key[d]);
      scores[k] = score;
      new_max = score > new_max ? score : new_max;
    }
    const float rescale = exp_of(running_max - new_max);
    running_max = new_max;
    running_sum *= rescale;
    for (int64_t d = 0; d < size; ++d) running_out[d] *= rescale;
    for (int64_t k = 0; k < count; ++k) {
      const float p = exp_of(scores[k] - running_max);
      const Storage* const of_key = values + (key + k) * size;
      running_sum += p;
#pragma omp simd
      for (int64_t d = 0; d < size; ++d) running_out[d] += p * Element::widen(of_key[d]);
    }
  }
  for (int64_t d = 0; d < size; ++d)
    out[d] = Element::narrow(running_sum == 0.0f ? 0.0f : running_out[d] / running_sum);
}

inline void attention_decode(const AttentionDecodeJob& job, int64_t first, int64_t last) {
  with_element(job.dtype, [&](auto element) {
    for (int64_t i = first; i < last; ++i) {
      attention_decode_head<decltype(element)>(job, i / job.heads, i % job.heads);
    }
  });
}

}  // namespace
}  // namespace tunesmith
