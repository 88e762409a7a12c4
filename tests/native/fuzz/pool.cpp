// The pool: blocks of its own for each caller, aligned, kept as they are, and no more waiting than
// TUNESMITH_POOL_MB allows; and a thread's scratch memory beside it, given back in any order. With
// a second thread, and across a fork, at times.
//
// Linked with --wrap=mmap,--wrap=munmap: what the pool has mapped is counted here.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../../../csrc/cpu/pool.h"
#include "check.h"
#include "input.h"

using fuzz::Input;

namespace {

std::atomic<int64_t> mapped{0};  // bytes

// Each thread's scratch memory, which does not wait: a huge page.
constexpr uintptr_t kArena = uintptr_t(1) << 21;

}  // namespace

extern "C" {
void* __real_mmap(void* at, size_t nbytes, int protection, int flags, int file, off_t offset);
int __real_munmap(void* at, size_t nbytes);

void* __wrap_mmap(void* at, size_t nbytes, int protection, int flags, int file, off_t offset) {
  void* memory = __real_mmap(at, nbytes, protection, flags, file, offset);
  if (memory != MAP_FAILED) mapped += int64_t(nbytes);
  return memory;
}

int __wrap_munmap(void* at, size_t nbytes) {
  mapped -= int64_t(nbytes);
  return __real_munmap(at, nbytes);
}
}

namespace {

int64_t limit() {
  const char* megabytes = std::getenv("TUNESMITH_POOL_MB");
  if (megabytes != nullptr) return int64_t(std::atoll(megabytes)) << 20;
  const int64_t sixteenth = int64_t(sysconf(_SC_PHYS_PAGES)) / 16 * sysconf(_SC_PAGE_SIZE);
  return sixteenth > int64_t(256) << 20 ? sixteenth : int64_t(256) << 20;
}

// A block with a mark of its owner at both ends and in every page between.
struct Block {
  uint8_t* memory;
  size_t nbytes;
  uint8_t mark;
  bool scratch;

  static uint8_t* take(size_t nbytes, bool scratch) {
    void* const memory = scratch ? tunesmith::take_scratch(nbytes) : tunesmith_take(nbytes);
    return static_cast<uint8_t*>(memory);
  }
  void give_back() const {
    if (scratch) return tunesmith::give_back_scratch(memory, nbytes);
    tunesmith_give_back(memory);
  }
  template <typename Each>
  void each_marked(const Each& each) const {
    constexpr size_t kEnd = 80, kStep = 4000;
    for (size_t i = 0; i < nbytes; i += i < kEnd || i + kEnd >= nbytes ? 1 : kStep) each(i);
    if (nbytes > 0) each(nbytes - 1);
  }
  void write() const {
    each_marked([&](size_t i) { memory[i] = uint8_t(mark + i); });
  }
  void check() const {
    each_marked([&](size_t i) {
      if (memory[i] != uint8_t(mark + i)) {
        fuzz::fail("byte %zu of a block of %zu was changed by someone else", i, nbytes);
      }
    });
  }
};

size_t size_of(Input& input) {
  constexpr size_t kHeader = 64;
  const size_t chance = input.byte(), more = input.byte();
  if (chance < 120) return more * 3;
  if (chance < 170) return 4096 * (1 + chance % 3) - kHeader - 2 + more % 5;
  if (chance < 240) return more * 700;
  if (chance < 252) return (size_t(1) << 21) * (1 + chance % 2) - kHeader - 2 + more % 5;
  return more * 30000;
}

// Takes and gives back as the input says; gives all back in the end.
void use(Input& input, uint8_t mark, std::vector<Block>& blocks) {
  for (int step = 0; step < 24; ++step) {
    if (blocks.empty() || input.byte() % 8 < 5) {
      const size_t nbytes = size_of(input);
      const bool scratch = input.byte() % 2 == 0;
      uint8_t* const memory = Block::take(nbytes, scratch);
      if (memory == nullptr) fuzz::fail("there is no block of %zu bytes", nbytes);
      if (reinterpret_cast<uintptr_t>(memory) % 64 != 0) fuzz::fail("%p is not aligned", memory);
      blocks.push_back({memory, nbytes, mark, scratch});
      blocks.back().write();
      mark = uint8_t(mark + 37);
    } else {
      const size_t at = input.byte() % blocks.size();
      blocks[at].check();
      blocks[at].give_back();
      blocks.erase(blocks.begin() + int64_t(at));
    }
  }
}

void give_back(const std::vector<Block>& blocks) {
  for (const Block& block : blocks) block.check();
  for (const Block& block : blocks) block.give_back();
}

// A child has the blocks of its parent, and a pool that works, whatever the parent's threads were
// at.
void check_fork(Input& input, const std::vector<Block>& blocks) {
  std::atomic<bool> stop{false};
  std::thread busy([&stop] {
    while (!stop) tunesmith_give_back(tunesmith_take(100));
  });
  for (int i = 0; i < 4; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      std::signal(SIGALRM, SIG_DFL);
      alarm(10);  // rather than wait for a lock for ever
      std::vector<Block> more = blocks;
      use(input, 11, more);
      give_back(more);
      _exit(0);
    }
    int status = 0;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0) {
      fuzz::fail("the child of a fork ended with status %d", status);
    }
  }
  stop = true;
  busy.join();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  ++fuzz::executions;
  Input input(data, size);
  const unsigned chance = input.byte();
  const bool two_threads = chance % 16 == 0, forks = chance % 64 < 2;
  std::atomic<bool> stop{false};
  std::thread other;
  void* const mine = tunesmith::take_scratch(1);
  if (two_threads) {
    other = std::thread([&stop, data, size, mine] {
      void* const theirs = tunesmith::take_scratch(1);
      if (uintptr_t(mine) / kArena == uintptr_t(theirs) / kArena) {
        fuzz::fail("%p and %p are scratch memory of two threads", mine, theirs);
      }
      tunesmith::give_back_scratch(theirs, 1);
      do {
        Input same(data, size);
        std::vector<Block> blocks;
        use(same, 101, blocks);
        give_back(blocks);
      } while (!stop);
    });
  }
  std::vector<Block> blocks;
  use(input, 1, blocks);
  if (forks) check_fork(input, blocks);
  give_back(blocks);
  tunesmith::give_back_scratch(mine, 1);
  stop = true;
  if (two_threads) other.join();
  const int64_t waiting = mapped - int64_t(kArena);
  if (waiting > limit()) {
    fuzz::fail("%lld bytes wait, of %lld", static_cast<long long>(waiting),
               static_cast<long long>(limit()));
  }
  if (Block::take(SIZE_MAX, chance % 2 == 0) != nullptr ||
      tunesmith_take(SIZE_MAX / 4) != nullptr) {
    fuzz::fail("more memory than there can be was handed out");
  }
  tunesmith_give_back(nullptr);
  return 0;
}
