// A second OpenMP runtime in one process means twice the threads, or a deadlock after a fork. So
// none is linked: the one that torch has loaded is asked for by name, and it obeys
// torch.set_num_threads.
#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>

namespace tunesmith {
namespace {

struct OpenMp {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
  int (*thread_num)();
  int (*num_threads)();
  int (*max_threads)();

  bool loaded() const { return parallel && thread_num && num_threads && max_threads; }
};

template <typename Function>
void find(const char* name, Function& function) {
  function = reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, name));
}

const OpenMp& openmp() {
  static const OpenMp found = [] {
    OpenMp runtime = {};
    find("GOMP_parallel", runtime.parallel);
    find("omp_get_thread_num", runtime.thread_num);
    find("omp_get_num_threads", runtime.num_threads);
    find("omp_get_max_threads", runtime.max_threads);
    return runtime;
  }();
  return found;
}

// A child has none of the threads that its parent's runtime waits for: it does everything itself.
std::atomic<bool> forked{false};

void take_note_of_forks() {
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
  (void)registered;
}

struct Loop {
  int64_t count;
  void (*work)(const void* context, int64_t first, int64_t last);
  const void* context;
};

void run_share(void* data) {
  const Loop& loop = *static_cast<const Loop*>(data);
  // the team may be smaller than what was asked for
  const int64_t threads = openmp().num_threads();
  const int64_t thread = openmp().thread_num();
  const int64_t first = loop.count * thread / threads;
  const int64_t last = loop.count * (thread + 1) / threads;
  if (first < last) loop.work(loop.context, first, last);
}

}  // namespace

void parallel_ranges(int64_t count, int64_t grain,
                     void (*work)(const void* context, int64_t first, int64_t last),
                     const void* context) {
  if (count <= 0) return;
  int64_t threads = max_threads();
  const int64_t shares = count / (grain > 0 ? grain : 1);
  if (threads > shares) threads = shares;
  if (threads <= 1) return work(context, 0, count);
  take_note_of_forks();
  Loop loop = {count, work, context};
  openmp().parallel(run_share, &loop, unsigned(threads), 0);
}

int64_t max_threads() {
  const bool alone = forked.load(std::memory_order_relaxed) || !openmp().loaded();
  return alone ? 1 : openmp().max_threads();
}

bool openmp_loaded() { return openmp().loaded(); }

}  // namespace tunesmith
