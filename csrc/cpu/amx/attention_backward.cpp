// The backward pass of attention with AMX (FlashAttention-2, arXiv:2307.08691, algorithm 2), for
// bf16 and heads of whole tiles; attention_forward.cpp is the other pass.
//
// The sums are those of ../attention.cpp. But a square of scores goes from tiles to probabilities
// while it is in the closest cache.
#include "attention_tiles.h"

namespace tunesmith {
namespace {

constexpr int64_t kQueries = 128, kKeys = 64;  // of one block

// One head of one group.
class TileTask : HeadTask {
 public:
  TileTask(const tunesmith_attention& job, const AttentionGroup& group, int64_t key_head)
      : HeadTask(job, group),
        key_head_(key_head),
        scale_(_mm512_set1_ps(job.scale)),
        log_scale_(_mm512_set1_ps(job.scale * kLog2E)),
        keys_(2 * padded_ * size_),
        values_(2 * padded_ * size_),
        transposed_keys_(2 * padded_ * size_),
        grad_keys_(4 * padded_ * size_),
        grad_values_(4 * padded_ * size_),
        rows_(2 * kQueries * size_),
        queries_by_size_(2 * kQueries * size_),
        queries_(2 * kQueries * size_),
        grad_out_by_size_(2 * kQueries * size_),
        grad_out_(2 * kQueries * size_),
        probabilities_(2 * kKeys * kQueries),
        score_grads_(2 * kKeys * kQueries),
        paired_score_grads_(2 * kKeys * kQueries),
        grad_queries_(4 * kQueries * size_) {}

  void run(void* grad_q, void* grad_k, void* grad_v) {
    gather(job_.k, job_.key_heads, key_head_, group_.first_key, group_.keys, padded_, keys());
    gather(job_.v, job_.key_heads, key_head_, group_.first_key, group_.keys, padded_, values());
    uint32_t* const work = paired_score_grads_.as<uint32_t>();  // not in use yet
    for (int64_t key = 0; key < padded_; key += kKeys) {
      transpose_rows(keys() + key * size_, keys_of_block(key), work,
                     transposed_keys_.as<uint16_t>() + key * size_);
    }
    memset(grad_keys(), 0, size_t(4 * padded_ * size_));
    memset(grad_values(), 0, size_t(4 * padded_ * size_));
    for_each_block(job_, group_, key_head_, kQueries,
                   [&](const tunesmith_segment& segment, int64_t head, int64_t start,
                       int64_t count) { block_of_queries(segment, head, start, count, grad_q); });
    scatter(grad_keys(), grad_k);
    scatter(grad_values(), grad_v);
  }

 private:
  uint16_t* keys() const { return keys_.as<uint16_t>(); }
  uint16_t* values() const { return values_.as<uint16_t>(); }
  float* grad_keys() const { return grad_keys_.as<float>(); }
  float* grad_values() const { return grad_values_.as<float>(); }
  int64_t keys_of_block(int64_t key) const { return std::min(kKeys, padded_ - key); }

  // rows [count, size] to pairs along the rows: [count / 2, size]
  void pair_rows(const uint16_t* rows, int64_t count, uint32_t* to) const {
    for (int64_t i = 0; i < count; i += 2) {
      const uint16_t* const first = rows + i * size_;
      for (int64_t d = 0; d < size_; d += kTile) {
        store_bits(to + i / 2 * size_ + d,
                   paired(load_half_bits(first + d), load_half_bits(first + size_ + d)));
      }
    }
  }

  void scatter(const float* from, void* to) const {
    for (int64_t i = 0; i < group_.keys; ++i) {
      auto* const out =
          static_cast<uint16_t*>(to) + offset_of(job_.key_heads, key_head_, group_.first_key + i);
      for (int64_t d = 0; d < size_; d += kTile) {
        store_half(out + d, rounded(_mm512_loadu_ps(from + i * size_ + d)));
      }
    }
  }

  // What a block's queries need at every key: lse and delta, negative and scaled.
  void prepare(int64_t head, int64_t start, int64_t count, int64_t padded) {
    gather(job_.q, job_.heads, head, start, count, padded, rows_.as<uint16_t>());
    pair_columns(rows_.as<uint16_t>(), padded, queries_by_size_.as<uint32_t>());
    pair_rows(rows_.as<uint16_t>(), padded, queries_.as<uint32_t>());
    gather(job_.grad_out, job_.heads, head, start, count, padded, rows_.as<uint16_t>());
    pair_columns(rows_.as<uint16_t>(), padded, grad_out_by_size_.as<uint32_t>());
    pair_rows(rows_.as<uint16_t>(), padded, grad_out_.as<uint32_t>());
    const float* const lse = job_.lse + (group_.row * job_.heads + head) * job_.tokens + start;
    for (int64_t i = 0; i < padded; ++i) {
      lse_[i] = delta_[i] = 0.0f;
      if (i >= count) continue;
      lse_[i] = -kLog2E * lse[i];
      const auto* const out =
          static_cast<const uint16_t*>(job_.out) + offset_of(job_.heads, head, start + i);
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < size_; d += kTile) {
        sum = _mm512_fmadd_ps(BFloat16::load(out + d),
                              BFloat16::load(rows_.as<uint16_t>() + i * size_ + d), sum);
      }
      delta_[i] = -job_.scale * _mm512_reduce_add_ps(sum);
    }
  }

  void block_of_queries(const tunesmith_segment& segment, int64_t head, int64_t start,
                        int64_t count, void* grad_q) {
    const int64_t padded = up_to_square(count);
    prepare(head, start, count, padded);
    float* const grad_queries = grad_queries_.as<float>();  // [size, padded]
    memset(grad_queries, 0, size_t(4 * padded * size_));

    // the first query that sees a key; `padded` for those that none does
    const int64_t before = start - group_.first_key;
    const auto first_query = [&](int64_t key) {
      if (key >= group_.keys) return padded;
      return segment.causal ? std::clamp<int64_t>(key - before, 0, padded) : 0;
    };
    const int64_t seen = up_to_square(segment.causal ? before + count : group_.keys);
    for (int64_t key = 0; key < seen; key += kKeys) {
      const int64_t keys_here = std::min(kKeys, seen - key);
      for (int64_t k = 0; k < keys_here; k += kSquare) {
        for (int64_t q = 0; q < padded; q += kSquare) {
          square_of_scores(key, k, q, padded, first_query);
        }
      }
      for (int64_t k = 0; k < keys_here; k += kSquare) {
        // the queries before are hidden, and their probabilities zero
        const int64_t skipped = first_query(key + k) / kSquare * kSquare;
        const int64_t steps = (padded - skipped) / kSquare, at = (key + k) * size_;
        for (int64_t d = 0; d < size_; d += kSquare) {
          const int64_t right = skipped / 2 * size_ + d, left = k * padded + skipped;
          add_square<false>(probabilities_.as<uint16_t>() + left, padded,
                            grad_out_.as<uint32_t>() + right, size_, steps, grad_values() + at + d,
                            size_);
          add_square<false>(score_grads_.as<uint16_t>() + left, padded,
                            queries_.as<uint32_t>() + right, size_, steps, grad_keys() + at + d,
                            size_);
        }
      }
      const uint16_t* const transposed = transposed_keys_.as<uint16_t>() + key * size_;
      const int64_t stride = keys_of_block(key);
      for (int64_t q = 0; q < padded; q += kSquare) {
        int64_t steps = 0;
        while (steps * kSquare < keys_here && first_query(key + steps * kSquare) < q + kSquare)
          ++steps;
        for (int64_t d = 0; d < size_ && steps > 0; d += kSquare) {
          add_square<false>(transposed + d * stride, stride, paired_score_grads_.as<uint32_t>() + q,
                            padded, steps, grad_queries + d * padded + q, padded);
        }
      }
    }

    write_transposed(grad_queries, padded, count, job_.heads, head, start, grad_q);
  }

  // Keys [key + k, + 32) and queries [q, + 32) of a block: probabilities and the gradients of the
  // scores.
  template <typename FirstQuery>
  void square_of_scores(int64_t key, int64_t k, int64_t q, int64_t padded,
                        const FirstQuery& first_query) {
    alignas(64) float scores[kSquare * kSquare], grads[kSquare * kSquare];
    const int64_t at = k * padded + q;
    uint16_t* const probabilities = probabilities_.as<uint16_t>() + at;
    uint16_t* const score_grads = score_grads_.as<uint16_t>() + at;
    uint32_t* const pairs = paired_score_grads_.as<uint32_t>() + k / 2 * padded + q;
    if (first_query(key + k) >= q + kSquare) return;  // nobody reads what no query of it sees
    add_square<true>(keys() + (key + k) * size_, size_, queries_by_size_.as<uint32_t>() + q, padded,
                     size_ / kSquare, scores, kSquare);
    add_square<true>(values() + (key + k) * size_, size_, grad_out_by_size_.as<uint32_t>() + q,
                     padded, size_ / kSquare, grads, kSquare);
    const bool all_seen = first_query(key + k + kSquare - 1) <= q;
    for (int64_t i = 0; i < kSquare; i += kTile) {
      const __m512 lse = _mm512_loadu_ps(lse_ + q + i), delta = _mm512_loadu_ps(delta_ + q + i);
      for (int64_t row = 0; row < kSquare; row += 2) {
        __m256i rounded_grads[2];
        for (int64_t r = 0; r < 2; ++r) {
          const int64_t of_row = (row + r) * kSquare + i;
          __m512 p = exp2_of(_mm512_fmadd_ps(_mm512_loadu_ps(scores + of_row), log_scale_, lse));
          __m512 grad =
              _mm512_mul_ps(p, _mm512_fmadd_ps(_mm512_loadu_ps(grads + of_row), scale_, delta));
          if (!all_seen) {
            const int64_t hidden =
                std::clamp<int64_t>(first_query(key + k + row + r) - q - i, 0, kTile);
            const auto unseen = __mmask16((1u << hidden) - 1);
            p = _mm512_mask_mov_ps(p, unseen, _mm512_setzero_ps());
            grad = _mm512_mask_mov_ps(grad, unseen, _mm512_setzero_ps());
          }
          rounded_grads[r] = rounded(grad);
          store_half(probabilities + (row + r) * padded + i, rounded(p));
          store_half(score_grads + (row + r) * padded + i, rounded_grads[r]);
        }
        store_bits(pairs + row / 2 * padded + i, paired(rounded_grads[0], rounded_grads[1]));
      }
    }
  }

  int64_t key_head_;
  __m512 scale_, log_scale_;
  Scratch keys_, values_, transposed_keys_, grad_keys_, grad_values_;
  Scratch rows_, queries_by_size_, queries_, grad_out_by_size_, grad_out_;
  Scratch probabilities_, score_grads_, paired_score_grads_, grad_queries_;
  float lse_[kQueries], delta_[kQueries];
};

}  // namespace

bool attention_backward_amx(const tunesmith_attention& job, const AttentionGroup& group,
                            int64_t key_head, void* grad_q, void* grad_k, void* grad_v) {
  if (!of_whole_tiles(job)) return false;
  TileTask(job, group, key_head).run(grad_q, grad_k, grad_v);
  return true;
}

}  // namespace tunesmith
