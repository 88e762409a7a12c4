// A fresh page costs a fault and a fill with zeros: more, for a dequantized weight, than the
// arithmetic. So blocks that were given back wait here, huge pages where the system grants them.
#include "pool.h"

#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>

namespace tunesmith {
namespace {

constexpr size_t kHugePage = size_t(1) << 21;
constexpr size_t kPage = size_t(1) << 12;
// What waits may be this large in all, beside each thread's arena, unless TUNESMITH_POOL_MB sets
// another limit: what a model of a size that fits the machine keeps of a short sample for its
// backward pass.
size_t default_limit() {
  constexpr size_t kLeast = size_t(256) << 20;
  const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGE_SIZE);
  if (pages <= 0 || page <= 0) return kLeast;
  return std::max(kLeast, size_t(pages) / 16 * size_t(page));
}

// In front of every block.
struct alignas(64) Header {
  size_t nbytes;  // with the header
  Header* next;   // while it waits
};

class Pool {
 public:
  Pool() {
    const char* megabytes = std::getenv("TUNESMITH_POOL_MB");
    if (megabytes != nullptr && *megabytes != '\0') {
      limit_ = size_t(std::strtoull(megabytes, nullptr, 10)) << 20;
    }
  }

  void* take(size_t nbytes) {
    if (nbytes > SIZE_MAX - sizeof(Header) - kHugePage) return nullptr;
    const size_t total = rounded(nbytes + sizeof(Header));
    Header* block = find(total);
    if (block == nullptr) block = map(total);
    return block == nullptr ? nullptr : block + 1;
  }

  void give_back(void* memory) {
    Header* block = static_cast<Header*>(memory) - 1;
    Header* drop = nullptr;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      block->next = waiting_;
      waiting_ = block;
      held_ += block->nbytes;
      // those that have waited longest go
      while (held_ > limit_) {
        Header** last = &waiting_;
        while ((*last)->next != nullptr) last = &(*last)->next;
        held_ -= (*last)->nbytes;
        (*last)->next = drop;
        drop = *last;
        *last = nullptr;
      }
    }
    while (drop != nullptr) {
      Header* next = drop->next;
      munmap(drop, drop->nbytes);
      drop = next;
    }
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

 private:
  static size_t rounded(size_t nbytes) {
    const size_t unit = nbytes >= kHugePage ? kHugePage : kPage;
    return (nbytes + unit - 1) / unit * unit;
  }

  // The smallest that is large enough, but not one that would mostly lie idle.
  Header* find(size_t total) {
    const std::lock_guard<std::mutex> lock(mutex_);
    Header** best = nullptr;
    for (Header** at = &waiting_; *at != nullptr; at = &(*at)->next) {
      const size_t size = (*at)->nbytes;
      if (size < total || size / 2 > total) continue;
      if (best == nullptr || size < (*best)->nbytes) best = at;
    }
    if (best == nullptr) return nullptr;
    Header* block = *best;
    *best = block->next;
    held_ -= block->nbytes;
    return block;
  }

  static Header* map(size_t total) {
    const bool huge = total >= kHugePage;
    const size_t spare = huge ? kHugePage : 0;
    void* memory =
        mmap(nullptr, total + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    if (huge) {
      // keep what is aligned to a huge page
      const uintptr_t begin = reinterpret_cast<uintptr_t>(memory);
      const uintptr_t aligned = (begin + kHugePage - 1) / kHugePage * kHugePage;
      if (aligned > begin) munmap(memory, aligned - begin);
      const uintptr_t end = begin + total + spare;
      if (end > aligned + total)
        munmap(reinterpret_cast<void*>(aligned + total), end - aligned - total);
      memory = reinterpret_cast<void*>(aligned);
#ifdef MADV_HUGEPAGE
      madvise(memory, total, MADV_HUGEPAGE);  // a wish; without it pages are small
#endif
    }
    return new (memory) Header{total, nullptr};
  }

  std::mutex mutex_;
  Header* waiting_ = nullptr;
  size_t held_ = 0;
  size_t limit_ = default_limit();
};

// Never destroyed: tensors may be freed after static destructors have run.
Pool& pool() {
  static Pool* const the_pool = [] {
    static Pool* made = new Pool;
    // a fork must not find the lock held by a thread that it has not got
    pthread_atfork([] { made->lock(); }, [] { made->unlock(); }, [] { made->unlock(); });
    return made;
  }();
  return *the_pool;
}

// One thread's memory for what it takes and gives back within a call: no other thread has to be
// waited for, and it is in this core's cache. What is taken last is given back first, as a rule;
// what is given back earlier is free again once all is.
class Arena {
 public:
  ~Arena() { tunesmith_give_back(begin_); }

  void* take(size_t nbytes) {
    if (begin_ == nullptr) begin_ = static_cast<char*>(tunesmith_take(kSize));
    if (begin_ == nullptr || nbytes > kSize || rounded(nbytes) > kSize - used_) {
      return tunesmith_take(nbytes);
    }
    void* const memory = begin_ + used_;
    used_ += rounded(nbytes);
    ++blocks_;
    return memory;
  }

  void give_back(void* memory, size_t nbytes) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(memory) - reinterpret_cast<uintptr_t>(begin_);
    if (begin_ == nullptr || at >= kSize) return tunesmith_give_back(memory);
    if (at + rounded(nbytes) == used_) used_ = at;
    if (--blocks_ == 0) used_ = 0;
  }

 private:
  static constexpr size_t kSize = kHugePage - sizeof(Header);

  // never 0, so that no two blocks begin at one place
  static size_t rounded(size_t nbytes) { return nbytes / 64 * 64 + 64; }

  char* begin_ = nullptr;
  size_t used_ = 0;
  size_t blocks_ = 0;
};

thread_local Arena arena;

}  // namespace

void* take_scratch(size_t nbytes) { return arena.take(nbytes); }

void give_back_scratch(void* memory, size_t nbytes) { arena.give_back(memory, nbytes); }

}  // namespace tunesmith

void* tunesmith_take(size_t nbytes) { return tunesmith::pool().take(nbytes); }

void tunesmith_give_back(void* memory) {
  if (memory != nullptr) tunesmith::pool().give_back(memory);
}
