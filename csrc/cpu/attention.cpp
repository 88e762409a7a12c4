// Attention without holding the probabilities (FlashAttention-2, arXiv:2307.08691). In the backward
// pass (algorithm 2) those of a block of queries and keys are worked out anew from the log-sum-exp
// that the forward pass has left.
//
// Everything is held with the queries running, so that what belongs to a query (log-sum-exp, delta)
// is a vector, and the products need no transposing but that of the keys.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../kernels.h"
#include "attention.h"
#include "dispatch.h"
#include "elements.h"
#include "parallel.h"
#include "pool.h"

namespace tunesmith {
namespace {

constexpr int64_t kQueries = 128, kKeys = 256;  // of one block

// The segments of an AttentionGroup.
struct Group {
  int64_t row, first_key, keys;
  std::vector<const tunesmith_segment*> segments;

  AttentionGroup view() const {
    return {row, first_key, keys, segments.data(), int64_t(segments.size())};
  }
};

std::vector<Group> groups_of(const tunesmith_attention& job) {
  std::vector<Group> groups;
  for (int64_t i = 0; i < job.segment_count; ++i) {
    const tunesmith_segment& segment = job.segments[i];
    const int64_t keys = segment.last_key - segment.first_key + 1;
    auto same = [&](const Group& group) {
      return group.row == segment.row && group.first_key == segment.first_key && group.keys == keys;
    };
    auto found = std::find_if(groups.begin(), groups.end(), same);
    if (found == groups.end()) {
      groups.push_back({segment.row, segment.first_key, keys, {}});
      found = groups.end() - 1;
    }
    found->segments.push_back(&segment);
  }
  return groups;
}

// out [keys, queries] = alpha x (left rightᵀ)ᵀ for a left [queries, P] and a right [keys, P].
Product for_keys(const Matrix& left, const Matrix& right, int64_t keys, int64_t queries,
                 float alpha, float* out) {
  Product product = product_of(left, right, queries, keys, out, TUNESMITH_FLOAT32);
  product.transposed = true;
  product.alpha = alpha;
  product.row_stride = 1;
  product.column_stride = queries;
  return product;
}

// What both passes do with the tensors of a job.
class HeadTask {
 protected:
  HeadTask(const tunesmith_attention& job, const AttentionGroup& group)
      : job_(job), group_(group), size_(job.head_size), bytes_(size_of(job.dtype)) {}

  int64_t offset_of(int64_t heads, int64_t head, int64_t token) const {
    return element_of(job_, group_.row, token, heads, head);
  }

  void gather(const void* from, int64_t heads, int64_t head, int64_t token, int64_t count,
              char* to) const {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(to + i * size_ * bytes_,
                  static_cast<const char*>(from) + offset_of(heads, head, token + i) * bytes_,
                  size_t(size_ * bytes_));
    }
  }

  // [count, size] to [size, count]
  void transpose(const char* from, int64_t count, char* to) const {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < size_; ++d) {
        std::memcpy(to + (d * count + i) * bytes_, from + (i * size_ + d) * bytes_, size_t(bytes_));
      }
    }
  }

  // What is held as [size, count] to a head of so many tokens.
  void write_transposed(const float* from, int64_t count, int64_t head, int64_t token,
                        void* to) const {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = offset_of(job_.heads, head, token + i);
      for (int64_t d = 0; d < size_; ++d) store_float(to, job_.dtype, at + d, from[d * count + i]);
    }
  }

  const tunesmith_attention& job_;
  const AttentionGroup& group_;
  int64_t size_, bytes_;
};

// One head of the queries of one group (FlashAttention-2, algorithm 1).
class ForwardTask : HeadTask {
 public:
  ForwardTask(const tunesmith_attention& job, const AttentionGroup& group, int64_t head)
      : HeadTask(job, group),
        head_(head),
        keys_(bytes_ * group.keys * size_),
        transposed_values_(bytes_ * group.keys * size_),
        rows_(bytes_ * std::max(kQueries, kKeys) * size_),
        scores_(sizeof(float) * kQueries * kKeys),
        probabilities_(bytes_ * kQueries * kKeys),
        totals_(sizeof(float) * kQueries * size_) {}

  void run(void* out, float* lse) {
    const int64_t key_head = head_ / (job_.heads / job_.key_heads);
    gather(job_.k, job_.key_heads, key_head, group_.first_key, group_.keys, keys_.as<char>());
    for (int64_t at = 0; at < group_.keys; at += kKeys) {
      const int64_t count = std::min(kKeys, group_.keys - at);
      gather(job_.v, job_.key_heads, key_head, group_.first_key + at, count, rows_.as<char>());
      transpose(rows_.as<char>(), count, transposed_values_.as<char>() + at * size_ * bytes_);
    }
    for_each_block_of_head(group_, kQueries,
                           [&](const tunesmith_segment& segment, int64_t start, int64_t count) {
                             block_of_queries(segment, start, count, out, lse);
                           });
  }

 private:
  void block_of_queries(const tunesmith_segment& segment, int64_t start, int64_t count, void* out,
                        float* lse) {
    gather(job_.q, job_.heads, head_, start, count, rows_.as<char>());
    const Matrix queries = plain_matrix(rows_.as<void>(), job_.dtype, size_);
    float running_max[kQueries], running_sum[kQueries], rescale[kQueries];
    std::fill_n(running_max, count, -3e38f);
    std::fill_n(running_sum, count, 0.0f);
    float* const totals = totals_.as<float>();  // [size, count]
    std::memset(totals, 0, sizeof(float) * size_t(count * size_));
    const int64_t seen = segment.causal ? start + count - group_.first_key : group_.keys;
    for (int64_t key = 0; key < seen; key += kKeys) {
      const int64_t keys = std::min(kKeys, group_.keys - key), at = key * size_ * bytes_;
      multiply(for_keys(queries, plain_matrix(keys_.as<char>() + at, job_.dtype, size_), keys,
                        count, job_.scale, scores_.as<float>()));
      const int64_t offset = segment.causal ? group_.first_key + key - start : -keys;
      softmax_forward({scores_.as<float>(), keys, count, offset, job_.dtype, running_max,
                       running_sum, rescale, probabilities_.as<void>()});
      scale_totals(rescale, count);
      Product into_totals =
          product_of(plain_matrix(transposed_values_.as<char>() + at, job_.dtype, keys),
                     plain_matrix(probabilities_.as<void>(), job_.dtype, count), size_, count,
                     totals, TUNESMITH_FLOAT32);
      into_totals.accumulate = true;
      multiply(into_totals);
    }
    float* const its_lse = lse + (group_.row * job_.heads + head_) * job_.tokens + start;
    for (int64_t i = 0; i < count; ++i) {
      its_lse[i] = running_max[i] + std::log(running_sum[i]);
      rescale[i] = 1.0f / running_sum[i];
    }
    scale_totals(rescale, count);
    write_transposed(totals, count, head_, start, out);
  }

  void scale_totals(const float* factors, int64_t count) const {
    float* const totals = totals_.as<float>();
    for (int64_t d = 0; d < size_; ++d) {
      for (int64_t i = 0; i < count; ++i) totals[d * count + i] *= factors[i];
    }
  }

  int64_t head_;
  Scratch keys_, transposed_values_, rows_, scores_, probabilities_, totals_;
};

// One head of the keys of one group.
class BackwardTask : HeadTask {
 public:
  BackwardTask(const tunesmith_attention& job, const AttentionGroup& group, int64_t key_head)
      : HeadTask(job, group),
        key_head_(key_head),
        keys_(bytes_ * group.keys * size_),
        values_(bytes_ * group.keys * size_),
        transposed_keys_(bytes_ * group.keys * size_),
        grad_keys_(sizeof(float) * group.keys * size_),
        grad_values_(sizeof(float) * group.keys * size_),
        queries_(bytes_ * kQueries * size_),
        grad_out_(bytes_ * kQueries * size_),
        scores_(sizeof(float) * kQueries * kKeys),
        grad_scores_(sizeof(float) * kQueries * kKeys),
        probabilities_(bytes_ * kQueries * kKeys),
        score_grads_(bytes_ * kQueries * kKeys),
        grad_queries_(sizeof(float) * kQueries * size_) {}

  void run(void* grad_q, void* grad_k, void* grad_v) {
    gather(job_.k, job_.key_heads, key_head_, group_.first_key, group_.keys, keys_.as<char>());
    gather(job_.v, job_.key_heads, key_head_, group_.first_key, group_.keys, values_.as<char>());
    for (int64_t at = 0; at < group_.keys; at += kKeys) {
      transpose(keys_.as<char>() + at * size_ * bytes_, std::min(kKeys, group_.keys - at),
                transposed_keys_.as<char>() + at * size_ * bytes_);
    }
    std::memset(grad_keys_.as<char>(), 0, sizeof(float) * group_.keys * size_);
    std::memset(grad_values_.as<char>(), 0, sizeof(float) * group_.keys * size_);
    for_each_block(job_, group_, key_head_, kQueries,
                   [&](const tunesmith_segment& segment, int64_t head, int64_t start,
                       int64_t count) { block_of_queries(segment, head, start, count, grad_q); });
    scatter(grad_keys_.as<float>(), grad_k);
    scatter(grad_values_.as<float>(), grad_v);
  }

 private:
  void scatter(const float* from, void* to) const {
    for (int64_t i = 0; i < group_.keys; ++i) {
      const int64_t at = offset_of(job_.key_heads, key_head_, group_.first_key + i);
      for (int64_t d = 0; d < size_; ++d) store_float(to, job_.dtype, at + d, from[i * size_ + d]);
    }
  }

  void block_of_queries(const tunesmith_segment& segment, int64_t head, int64_t start,
                        int64_t count, void* grad_q) {
    gather(job_.q, job_.heads, head, start, count, queries_.as<char>());
    gather(job_.grad_out, job_.heads, head, start, count, grad_out_.as<char>());
    float lse[kQueries], delta[kQueries];
    const float* const all_lse = job_.lse + (group_.row * job_.heads + head) * job_.tokens;
    for (int64_t i = 0; i < count; ++i) {
      lse[i] = all_lse[start + i];
      delta[i] = 0.0f;
      const int64_t out = offset_of(job_.heads, head, start + i);
      for (int64_t d = 0; d < size_; ++d) {
        delta[i] += load_float(job_.out, job_.dtype, out + d) *
                    load_float(grad_out_.as<void>(), job_.dtype, i * size_ + d);
      }
    }
    std::memset(grad_queries_.as<char>(), 0, sizeof(float) * count * size_);
    const Matrix queries = plain_matrix(queries_.as<void>(), job_.dtype, size_);
    const Matrix grad_out = plain_matrix(grad_out_.as<void>(), job_.dtype, size_);
    const int64_t seen = segment.causal ? start + count - group_.first_key : group_.keys;
    for (int64_t key = 0; key < seen; key += kKeys) {
      const int64_t keys = std::min(kKeys, group_.keys - key), at = key * size_;
      multiply(for_keys(queries, plain_matrix(keys_.as<char>() + at * bytes_, job_.dtype, size_),
                        keys, count, job_.scale, scores_.as<float>()));
      multiply(for_keys(grad_out, plain_matrix(values_.as<char>() + at * bytes_, job_.dtype, size_),
                        keys, count, 1.0f, grad_scores_.as<float>()));

      // key k is seen by queries from the one that stands where it stands
      const int64_t offset = segment.causal ? group_.first_key + key - start : -keys;
      softmax_backward({scores_.as<float>(), grad_scores_.as<float>(), keys, count, offset, lse,
                        delta, job_.scale, job_.dtype, probabilities_.as<void>(),
                        score_grads_.as<void>()});

      const Matrix probabilities = plain_matrix(probabilities_.as<void>(), job_.dtype, count);
      const Matrix score_grads = plain_matrix(score_grads_.as<void>(), job_.dtype, count);
      Product into_values = product_of(probabilities, grad_out, keys, size_,
                                       grad_values_.as<float>() + at, TUNESMITH_FLOAT32);
      into_values.accumulate = true;
      multiply(into_values);
      Product into_keys = product_of(score_grads, queries, keys, size_, grad_keys_.as<float>() + at,
                                     TUNESMITH_FLOAT32);
      into_keys.accumulate = true;
      multiply(into_keys);
      Product into_queries =
          product_of(plain_matrix(transposed_keys_.as<char>() + at * bytes_, job_.dtype, keys),
                     plain_matrix(score_grads_.as<void>(), job_.dtype, count), size_, count,
                     grad_queries_.as<float>(), TUNESMITH_FLOAT32);
      into_queries.accumulate = true;
      multiply(into_queries);
    }
    write_transposed(grad_queries_.as<float>(), count, head, start, grad_q);
  }

  int64_t key_head_;
  Scratch keys_, values_, transposed_keys_, grad_keys_, grad_values_, queries_, grad_out_;
  Scratch scores_, grad_scores_, probabilities_, score_grads_, grad_queries_;
};

}  // namespace
}  // namespace tunesmith

using namespace tunesmith;

void tunesmith_attention_cpu(const tunesmith_attention* job, void* out, float* lse) {
  const std::vector<Group> groups = groups_of(*job);
  parallel_for(int64_t(groups.size()) * job->heads, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const AttentionGroup segments = groups[size_t(i / job->heads)].view();
      if (attention_forward(*job, segments, i % job->heads, out, lse)) continue;
      ForwardTask(*job, segments, i % job->heads).run(out, lse);
    }
  });
}

void tunesmith_attention_backward_cpu(const tunesmith_attention* job, void* grad_q, void* grad_k,
                                      void* grad_v) {
  const std::vector<Group> groups = groups_of(*job);
  parallel_for(int64_t(groups.size()) * job->key_heads, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const AttentionGroup segments = groups[size_t(i / job->key_heads)].view();
      const int64_t key_head = i % job->key_heads;
      if (attention_backward(*job, segments, key_head, grad_q, grad_k, grad_v)) continue;
      BackwardTask(*job, segments, key_head).run(grad_q, grad_k, grad_v);
    }
  });
}
