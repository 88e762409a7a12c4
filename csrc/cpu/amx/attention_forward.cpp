// The forward pass of attention with AMX (FlashAttention-2, arXiv:2307.08691, algorithm 1): 32
// queries of a head go through the keys they see, some at a time, and what they have summed up is
// scaled down where a later score is the largest so far.
#include <cmath>
#include <limits>

#include "attention_tiles.h"

namespace tunesmith {
namespace {

constexpr int64_t kKeys = 128;  // of one block

// One head of the queries of one group.
class ForwardTask : HeadTask {
 public:
  ForwardTask(const tunesmith_attention& job, const AttentionGroup& group, int64_t head)
      : HeadTask(job, group),
        head_(head),
        log_scale_(_mm512_set1_ps(job.scale * kLog2E)),
        keys_(2 * padded_ * size_),
        transposed_values_(2 * padded_ * size_),
        rows_(2 * kKeys * size_),
        queries_(2 * kSquare * size_),
        totals_(4 * kSquare * size_) {}

  void run(void* out, float* lse) {
    const int64_t key_head = head_ / (job_.heads / job_.key_heads);
    gather(job_.k, job_.key_heads, key_head, group_.first_key, group_.keys, padded_, keys());
    uint32_t* const work = pairs_;  // not in use yet
    for (int64_t key = 0; key < padded_; key += kKeys) {
      const int64_t there = std::max<int64_t>(0, std::min(kKeys, group_.keys - key));
      gather(job_.v, job_.key_heads, key_head, group_.first_key + key, there, keys_at(key), rows());
      transpose_rows(rows(), keys_at(key), work, transposed_values() + key * size_);
    }
    for_each_block_of_head(group_, kSquare,
                           [&](const tunesmith_segment& segment, int64_t start, int64_t count) {
                             square_of_queries(segment, start, count, out, lse);
                           });
  }

 private:
  uint16_t* keys() const { return keys_.as<uint16_t>(); }
  uint16_t* transposed_values() const { return transposed_values_.as<uint16_t>(); }
  uint16_t* rows() const { return rows_.as<uint16_t>(); }
  int64_t keys_at(int64_t key) const { return std::min(kKeys, padded_ - key); }

  void square_of_queries(const tunesmith_segment& segment, int64_t start, int64_t count, void* out,
                         float* lse) {
    gather(job_.q, job_.heads, head_, start, count, kSquare, rows());
    pair_columns(rows(), kSquare, queries_.as<uint32_t>());
    float* const totals = totals_.as<float>();  // [size, 32]
    for (__m512& running_max : running_max_)
      running_max = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (__m512& sum : running_sum_) sum = _mm512_setzero_ps();
    // a key is seen by the queries from one on, the first of all or the one that stands where it
    // does
    first_ = segment.causal ? start - group_.first_key : group_.keys;
    const int64_t seen = std::min(group_.keys, segment.causal ? first_ + count : group_.keys);
    for (int64_t key = 0; key < seen; key += kKeys) {
      const int64_t squares = divide_up(std::min(kKeys, seen - key), kSquare);
      add_keys(key, squares, key > 0 ? totals : nullptr);
      const uint16_t* const values = transposed_values() + key * size_;
      for (int64_t d = 0; d < size_; d += kSquare) {
        const uint16_t* const left = values + d * keys_at(key);
        if (key == 0) {
          add_square<true>(left, keys_at(key), pairs_, kSquare, squares, totals + d * kSquare,
                           kSquare);
        } else {
          add_square<false>(left, keys_at(key), pairs_, kSquare, squares, totals + d * kSquare,
                            kSquare);
        }
      }
    }

    float running_max[kSquare], sums[kSquare], inverse_sums[kSquare];
    for (int64_t i = 0; i < kSquare; i += kTile) {
      _mm512_storeu_ps(running_max + i, running_max_[i / kTile]);
      _mm512_storeu_ps(sums + i, running_sum_[i / kTile]);
    }
    for (int64_t i = 0; i < kSquare; ++i) inverse_sums[i] = 1.0f / sums[i];
    for (int64_t i = 0; i < kSquare; i += kTile)
      scale_totals(totals + i, _mm512_loadu_ps(inverse_sums + i));
    write_transposed(totals, kSquare, count, job_.heads, head_, start, out);
    float* const its_lse = lse + (group_.row * job_.heads + head_) * job_.tokens + start;
    for (int64_t i = 0; i < count; ++i) its_lse[i] = running_max[i] / kLog2E + std::log(sums[i]);
  }

  // Puts into pairs_ what the queries take of so many squares of keys, and brings the sums, and
  // `totals` if there are some yet, to the largest scores that are known then.
  void add_keys(int64_t key, int64_t squares, float* totals) {
    for (int64_t s = 0; s < squares; ++s) {
      add_square<true>(keys() + (key + s * kSquare) * size_, size_, queries_.as<uint32_t>(),
                       kSquare, size_ / kSquare, scores_ + s * kSquare * kSquare, kSquare);
    }
    for (int64_t i = 0; i < kSquare; i += kTile) {
      const __m512 before = running_max_[i / kTile];
      __m512 running_max = before;
      for (int64_t s = 0; s < squares; ++s) {
        const int64_t first = key + s * kSquare;
        const bool all_seen = hidden_from(first + kSquare - 1) <= i;
        float* const scores = scores_ + s * kSquare * kSquare + i;
        running_max = all_seen ? scaled<false>(scores, first, i, running_max)
                               : scaled<true>(scores, first, i, running_max);
      }
      running_max_[i / kTile] = running_max;
      const __m512 rescale = exp2_of(_mm512_sub_ps(before, running_max));
      if (totals != nullptr) scale_totals(totals + i, rescale);
      __m512 sum = _mm512_mul_ps(running_sum_[i / kTile], rescale);
      const auto probability_of = [&](int64_t row) {
        return exp2_of(_mm512_sub_ps(_mm512_loadu_ps(scores_ + row * kSquare + i), running_max));
      };
      for (int64_t row = 0; row < squares * kSquare; row += 4) {
        const __m512 a = probability_of(row), b = probability_of(row + 1);
        const __m512 c = probability_of(row + 2), d = probability_of(row + 3);
        sum = _mm512_add_ps(sum, _mm512_add_ps(_mm512_add_ps(a, b), _mm512_add_ps(c, d)));
        uint32_t* const to = pairs_ + row / 2 * kSquare + i;
        store_bits(to, paired(rounded(a), rounded(b)));
        store_bits(to + kSquare, paired(rounded(c), rounded(d)));
      }
      running_sum_[i / kTile] = sum;
    }
  }

  // Scales a square of scores, of 16 queries from the i-th on, and returns their largest and the
  // running maximum.
  template <bool kSomeHidden>
  __m512 scaled(float* scores, int64_t first_key, int64_t i, __m512 running_max) const {
    const __m512 least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 other = least;
    for (int64_t row = 0; row < kSquare; row += 2) {
      for (int64_t r = 0; r < 2; ++r) {
        float* const at = scores + (row + r) * kSquare;
        __m512 score = _mm512_mul_ps(_mm512_loadu_ps(at), log_scale_);
        if constexpr (kSomeHidden) {
          const int64_t hidden =
              std::clamp<int64_t>(hidden_from(first_key + row + r) - i, 0, kTile);
          score = _mm512_mask_mov_ps(score, __mmask16((1u << hidden) - 1), least);
        }
        _mm512_storeu_ps(at, score);
        __m512& largest = r == 0 ? running_max : other;
        largest =
            _mm512_max_ps(score, largest);  // in this order NaN is passed over; the sum shows it
      }
    }
    return _mm512_max_ps(running_max, other);
  }

  void scale_totals(float* totals, __m512 factor) const {
    for (int64_t d = 0; d < size_; ++d) {
      float* const at = totals + d * kSquare;
      _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), factor));
    }
  }

  // How many of the queries do not see a key.
  int64_t hidden_from(int64_t key) const { return key >= group_.keys ? kSquare : key - first_; }

  int64_t head_, first_ = 0;
  __m512 log_scale_;
  __m512 running_max_[2],
      running_sum_[2];  // of each query: the largest score, and the sum of their probabilities
  Scratch keys_, transposed_values_, rows_, queries_, totals_;
  alignas(64) float scores_[kKeys * kSquare];
  alignas(64) uint32_t pairs_[kKeys / 2 * kSquare];
};

}  // namespace

bool attention_forward_amx(const tunesmith_attention& job, const AttentionGroup& group,
                           int64_t head, void* out, float* lse) {
  if (!of_whole_tiles(job)) return false;
  ForwardTask(job, group, head).run(out, lse);
  return true;
}

}  // namespace tunesmith
