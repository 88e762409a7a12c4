// What attention does between its products, in plain C++ that the compiler turns into the vectors of
// the file that includes this.
#pragma once

#include "isa.h"
#include "values.h"

namespace tunesmith {
namespace {

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
  as_kept(job.dtype, [&](auto as) { softmax_backward_as<decltype(as)>(job); });
}

}  // namespace
}  // namespace tunesmith
