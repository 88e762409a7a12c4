// The pool: blocks of its own for each caller, aligned, kept as they are, and no more waiting than
// TUNESMITH_POOL_MB allows. With a second thread, and across a fork, at times.
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

#include "check.h"
#include "input.h"

using fuzz::Input;

namespace {

std::atomic<int64_t> mapped{0};  // bytes

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
  return (megabytes == nullptr ? int64_t(256) : std::atoll(megabytes)) << 20;
}

// A block with a mark of its owner at both ends and in every page between.
struct Block {
  uint8_t* memory;
  size_t nbytes;
  uint8_t mark;

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
      auto* memory = static_cast<uint8_t*>(tunesmith_take(nbytes));
      if (memory == nullptr) fuzz::fail("there is no block of %zu bytes", nbytes);
      if (reinterpret_cast<uintptr_t>(memory) % 64 != 0) fuzz::fail("%p is not aligned", memory);
      blocks.push_back({memory, nbytes, mark});
      blocks.back().write();
      mark = uint8_t(mark + 37);
    } else {
      const size_t at = input.byte() % blocks.size();
      blocks[at].check();
      tunesmith_give_back(blocks[at].memory);
      blocks.erase(blocks.begin() + int64_t(at));
    }
  }
}

void give_back(const std::vector<Block>& blocks) {
  for (const Block& block : blocks) block.check();
  for (const Block& block : blocks) tunesmith_give_back(block.memory);
}

// A child has the blocks of its parent, and a pool that works, whatever the parent's threads were at.
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
  if (two_threads) {
    other = std::thread([&stop, data, size] {
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
  stop = true;
  if (two_threads) other.join();
  if (mapped > limit()) {
    fuzz::fail("%lld bytes wait, of %lld", static_cast<long long>(mapped.load()),
               static_cast<long long>(limit()));
  }
  if (tunesmith_take(SIZE_MAX) != nullptr || tunesmith_take(SIZE_MAX / 4) != nullptr) {
    fuzz::fail("more memory than there can be was handed out");
  }
  tunesmith_give_back(nullptr);
  return 0;
}
