// Loops over the threads that torch already has.
#pragma once

#include <cstdint>

namespace tunesmith {

constexpr int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Calls work(context, first, last) for ranges that make up [0, count), each at least `grain` long
// but for the last, on as many threads as OpenMP would give; in the calling thread if there is no
// OpenMP.
void parallel_ranges(int64_t count, int64_t grain,
                     void (*work)(const void* context, int64_t first, int64_t last),
                     const void* context);

// The same for anything that can be called as work(first, last).
template <typename Work>
void parallel_for(int64_t count, int64_t grain, const Work& work) {
  parallel_ranges(
      count, grain,
      [](const void* context, int64_t first, int64_t last) {
        (*static_cast<const Work*>(context))(first, last);
      },
      &work);
}

// How many threads such a loop may get.
int64_t max_threads();

bool openmp_loaded();

}  // namespace tunesmith
