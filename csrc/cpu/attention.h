// What the ways to take attention backward share.
#pragma once

#include "../kernels.h"

namespace tunesmith {

// Runs that see the same keys of a row: what flows into those comes from all of them.
struct AttentionGroup {
  int64_t row, first_key, keys;
  const tunesmith_run* const* runs;
  int64_t run_count;
};

// Does one head of the keys of a group; false where the job is not for it and nothing was done.
bool attention_backward_amx(const tunesmith_attention& job, const AttentionGroup& group, int64_t key_head,
                            void* grad_q, void* grad_k, void* grad_v);

}  // namespace tunesmith
