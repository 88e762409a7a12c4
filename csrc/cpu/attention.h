// What the ways to take attention backward share.
#pragma once

#include <algorithm>

#include "../kernels.h"

namespace tunesmith {

// Runs that see the same keys of a row: what flows into those comes from all of them.
struct AttentionGroup {
  int64_t row, first_key, keys;
  const tunesmith_run* const* runs;
  int64_t run_count;
};

// The first element of a head of a token, in a tensor of so many heads.
inline int64_t element_of(const tunesmith_attention& job, int64_t row, int64_t token, int64_t heads,
                          int64_t head) {
  return ((row * job.tokens + token) * heads + head) * job.head_size;
}

// Calls use(run, start, count) for all queries of a head, `most` at a time.
template <typename Use>
void for_each_block_of_head(const AttentionGroup& group, int64_t most, Use use) {
  for (int64_t r = 0; r < group.run_count; ++r) {
    const tunesmith_run& run = *group.runs[r];
    for (int64_t at = run.start; at < run.stop; at += most) {
      use(run, at, std::min(most, run.stop - at));
    }
  }
}

// Calls use(run, head, start, count) for all queries that see the keys of one head, `most` at a time.
template <typename Use>
void for_each_block(const tunesmith_attention& job, const AttentionGroup& group, int64_t key_head,
                    int64_t most, Use use) {
  const int64_t shared = job.heads / job.key_heads;
  for (int64_t head = key_head * shared; head < (key_head + 1) * shared; ++head) {
    for_each_block_of_head(group, most, [&](const tunesmith_run& run, int64_t start, int64_t count) {
      use(run, head, start, count);
    });
  }
}

// Does one head of the queries of a group; false where the job is not for it and nothing was done.
bool attention_forward_amx(const tunesmith_attention& job, const AttentionGroup& group, int64_t head,
                           void* out, float* lse);

// Does one head of the keys of a group; false where the job is not for it and nothing was done.
bool attention_backward_amx(const tunesmith_attention& job, const AttentionGroup& group, int64_t key_head,
                            void* grad_q, void* grad_k, void* grad_v);

}  // namespace tunesmith
