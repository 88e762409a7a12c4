// How attention is cut into pieces, forward and backward and with any instruction set: segments
// that see the same keys, and blocks of queries.
#pragma once

#include <algorithm>

#include "../kernels.h"

namespace tunesmith {

// Segments that see the same keys of a row: what flows into those comes from all of them.
struct AttentionGroup {
  int64_t row, first_key, keys;
  const tunesmith_segment* const* segments;
  int64_t segment_count;
};

// The first element of a head of a token, in a tensor of so many heads.
inline int64_t element_of(const tunesmith_attention& job, int64_t row, int64_t token, int64_t heads,
                          int64_t head) {
  return ((row * job.tokens + token) * heads + head) * job.head_size;
}

// Calls use(segment, start, count) for all queries of a head, `max_count` at a time.
template <typename Use>
void for_each_block_of_head(const AttentionGroup& group, int64_t max_count, Use use) {
  for (int64_t r = 0; r < group.segment_count; ++r) {
    const tunesmith_segment& segment = *group.segments[r];
    for (int64_t at = segment.start; at < segment.stop; at += max_count) {
      use(segment, at, std::min(max_count, segment.stop - at));
    }
  }
}

// Calls use(segment, head, start, count) for all queries that see the keys of one head, `max_count`
// at a time.
template <typename Use>
void for_each_block(const tunesmith_attention& job, const AttentionGroup& group, int64_t key_head,
                    int64_t max_count, Use use) {
  const int64_t shared = job.heads / job.key_heads;
  for (int64_t head = key_head * shared; head < (key_head + 1) * shared; ++head) {
    for_each_block_of_head(group, max_count,
                           [&](const tunesmith_segment& segment, int64_t start, int64_t count) {
                             use(segment, head, start, count);
                           });
  }
}

}  // namespace tunesmith
