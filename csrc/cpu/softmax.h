// What attention does between its products, in plain C++ that the compiler turns into the vectors of
// the file that includes this.
#pragma once

#include <cmath>

#include "isa.h"
#include "values.h"

namespace tunesmith {
namespace {

// The first query that sees the k-th key of a block.
inline int64_t first_to_see(int64_t k, int64_t offset, int64_t queries) {
  const int64_t hidden = k + offset;
  return hidden < 0 ? 0 : hidden < queries ? hidden : queries;
}

template <typename As>
void softmax_backward_as(const SoftmaxJob& job) {
  using Storage = typename As::Storage;
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
      probabilities[i] = As::of(p);
      score_grads[i] = As::of(p * (grads[i] - job.delta[i]) * job.scale);
    }
  }
}

void softmax_backward(const SoftmaxJob& job) {
  as_kept(job.dtype, [&](auto as) { softmax_backward_as<decltype(as)>(job); });
}

template <typename As>
void softmax_forward_as(const SoftmaxForwardJob& job) {
  using Storage = typename As::Storage;
  const int64_t queries = job.queries;
  float* const most = job.most;
  float* const sum = job.sum;
  for (int64_t i = 0; i < queries; ++i) job.smaller[i] = most[i];
  for (int64_t k = 0; k < job.keys; ++k) {
    const float* const scores = job.scores + k * queries;
#pragma omp simd
    for (int64_t i = first_to_see(k, job.offset, queries); i < queries; ++i) {
      most[i] = scores[i] > most[i] ? scores[i] : most[i];
    }
  }
  for (int64_t i = 0; i < queries; ++i) {
    job.smaller[i] = exp_of(job.smaller[i] - most[i]);
    sum[i] *= job.smaller[i];
  }
  for (int64_t k = 0; k < job.keys; ++k) {
    const float* const scores = job.scores + k * queries;
    auto* const shares = static_cast<Storage*>(job.shares) + k * queries;
    const int64_t first = first_to_see(k, job.offset, queries);
    for (int64_t i = 0; i < first; ++i) shares[i] = Storage(0);
#pragma omp simd
    for (int64_t i = first; i < queries; ++i) {
      const float p = exp_of(scores[i] - most[i]);
      sum[i] += p;
      shares[i] = As::of(p);
    }
  }
}

void softmax_forward(const SoftmaxForwardJob& job) {
  as_kept(job.dtype, [&](auto as) { softmax_forward_as<decltype(as)>(job); });
}

template <typename As>
void logps_of_row(const LogpsJob& job, int64_t row) {
  const int64_t columns = job.columns;
  auto* const logits = static_cast<typename As::Storage*>(job.logits) + row * columns;
  float most = As::to(logits[0]);
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < columns; ++i) {
    const float value = As::to(logits[i]);
    most = value > most ? value : most;
  }
  double sum = 0.0;
  for (int64_t begin = 0; begin < columns; begin += kSummedAtOnce) {
    const int64_t end = begin + kSummedAtOnce < columns ? begin + kSummedAtOnce : columns;
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i) part += exp_of(As::to(logits[i]) - most);
    sum += part;
  }
  const float log_sum = float(std::log(sum));  // not added to `most`, beside which it may be lost
  const int64_t label = job.labels[row];
  job.logps[row] = (As::to(logits[label]) - most) - log_sum;
  if (!job.slopes) return;
#pragma omp simd
  for (int64_t i = 0; i < columns; ++i) {
    logits[i] = As::of(-exp_of((As::to(logits[i]) - most) - log_sum));
  }
  logits[label] = As::of(1.0f - exp_of(job.logps[row]));
}

inline void logps(const LogpsJob& job, int64_t first, int64_t last) {
  as_kept(job.dtype, [&](auto as) {
    for (int64_t row = first; row < last; ++row) logps_of_row<decltype(as)>(job, row);
  });
}

// One head's query over the keys that its row sees, some at a time: what was summed under a smaller
// maximum is scaled down when a larger one turns up (arXiv:1805.02867).
template <typename As>
void decode_head(const DecodeJob& job, int64_t row, int64_t head) {
  using Storage = typename As::Storage;
  constexpr int64_t kKeys = 64, kMostSize = 512;
  const int64_t size = job.size, shared = job.heads / job.key_heads;
  const int64_t begin = (row * job.key_heads + head / shared) * job.capacity * size;
  const auto* const keys = static_cast<const Storage*>(job.keys) + begin;
  const auto* const values = static_cast<const Storage*>(job.values) + begin;
  const int64_t at = (row * job.heads + head) * size;
  const auto* const q = static_cast<const Storage*>(job.q) + at;
  auto* const out = static_cast<Storage*>(job.out) + at;
  float query[kMostSize], total[kMostSize], scores[kKeys];
  for (int64_t d = 0; d < size; ++d) {
    query[d] = As::to(q[d]) * job.scale;
    total[d] = 0.0f;
  }
  float most = -3e38f, sum = 0.0f;
  for (int64_t key = job.first[row]; key < job.length; key += kKeys) {
    const int64_t count = job.length - key < kKeys ? job.length - key : kKeys;
    float largest = most;
    for (int64_t k = 0; k < count; ++k) {
      const Storage* const of_key = keys + (key + k) * size;
      float score = 0.0f;
#pragma omp simd reduction(+ : score)
      for (int64_t d = 0; d < size; ++d) score += query[d] * As::to(of_key[d]);
      scores[k] = score;
      largest = score > largest ? score : largest;
    }
    const float smaller = exp_of(most - largest);
    most = largest;
    sum *= smaller;
    for (int64_t d = 0; d < size; ++d) total[d] *= smaller;
    for (int64_t k = 0; k < count; ++k) {
      const float p = exp_of(scores[k] - most);
      const Storage* const of_key = values + (key + k) * size;
      sum += p;
#pragma omp simd
      for (int64_t d = 0; d < size; ++d) total[d] += p * As::to(of_key[d]);
    }
  }
  for (int64_t d = 0; d < size; ++d) out[d] = As::of(sum == 0.0f ? 0.0f : total[d] / sum);
}

inline void decode(const DecodeJob& job, int64_t first, int64_t last) {
  as_kept(job.dtype, [&](auto as) {
    for (int64_t i = first; i < last; ++i) {
      decode_head<decltype(as)>(job, i / job.heads, i % job.heads);
    }
  });
}

}  // namespace
}  // namespace tunesmith
