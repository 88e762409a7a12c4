// Runs the kernels: blocks one after the other, the threads of a block as fibers.
//
// What is an error here, and stops the kernel:
//   - an access outside a buffer of emulation_allocate: pages before and after are forbidden, and
//     bytes that share its own pages are checked after each launch
//   - a misaligned access, an index outside a local array, a shift too far, an overflow: the
//     sanitizer traps
//   - threads that wait at different places, or for one that has ended: __syncthreads and shuffles
//   - shared memory: all of it is NaN when a block starts, and what lies beyond must stay as it was
//   - a launch that no device takes
// A missing __syncthreads shows in the results, in some order of warps and lanes: ascending,
// descending or shuffled.
#include <algorithm>
#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

#include "cuda_runtime.h"

constexpr size_t kMostShared = 227 * 1024;

namespace tunesmith {
alignas(4096) uint4 shared_memory[(kMostShared + 5 * 1024) / sizeof(uint4)];
}

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kMostThreads = 1024;
constexpr size_t kStack = 128 * 1024;
constexpr unsigned char kGuard = 0x7B;   // a large number in every dtype
constexpr unsigned char kPoison = 0xFF;  // NaN

enum class State { ready, at_block_barrier, at_warp_barrier, done };

struct Thread {
  ucontext_t start;
  jmp_buf where;
  bool started = false;
  State state = State::done;
  uint3 index;
  emulation::Site site;
  // two, for a lane may hand on its next value before another has read this one
  uint32_t handed[2];
  unsigned exchanges;
};

struct Buffer {
  unsigned char* mapped;
  size_t mapped_size;
  unsigned char* begin;
  size_t size;
};

std::vector<std::unique_ptr<Thread>> threads;
Thread* current = nullptr;
jmp_buf scheduler;
sigjmp_buf launch_frame;
bool running = false;
const std::function<void()>* body = nullptr;

int order = 0;
int multiprocessors = 132;
int64_t only_block = -1;
std::map<void*, Buffer> buffers;
std::map<const void*, int> allowed_shared;
std::string failure;
std::vector<cudaStream_t> streams;
size_t most_shared_used = 0;
volatile sig_atomic_t caught_signal;
void* volatile caught_address;

[[noreturn]] void stop(const std::string& what) {
  failure = what;
  siglongjmp(launch_frame, 1);
}

std::string name_of(const Thread& thread) {
  char text[128];
  snprintf(text, sizeof text, "thread %u of block (%u, %u)", thread.index.x, blockIdx.x,
           blockIdx.y);
  return text;
}

std::string name_of(const emulation::Site& site) {
  const std::string file = site.file;
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line);
}

void enter() {
  for (;;) {
    (*body)();
    current->state = State::done;
    if (_setjmp(current->where) == 0) _longjmp(scheduler, 1);
  }
}

void let_others_run() {
  if (_setjmp(current->where) == 0) _longjmp(scheduler, 1);
}

void resume(Thread& thread) {
  current = &thread;
  threadIdx = thread.index;
  if (_setjmp(scheduler) != 0) return;
  if (thread.started) _longjmp(thread.where, 1);
  thread.started = true;
  setcontext(&thread.start);
}

std::unique_ptr<Thread> make_thread(unsigned index) {
  auto thread = std::make_unique<Thread>();
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED) stop("the emulation has no memory for stacks");
  getcontext(&thread->start);
  thread->start.uc_stack.ss_sp = stack;
  thread->start.uc_stack.ss_size = kStack;
  thread->start.uc_link = nullptr;
  makecontext(&thread->start, enter, 0);
  thread->index = {index, 0, 0};
  return thread;
}

bool same(const emulation::Site& a, const emulation::Site& b) {
  return a.line == b.line && a.mask == b.mask && strcmp(a.file, b.file) == 0;
}

// Lets threads [first, last) go on if all of them wait, and for each other.
bool release(unsigned first, unsigned last, State barrier) {
  for (unsigned i = first; i < last; ++i) {
    if (threads[i]->state != barrier) return false;
    if (!same(threads[i]->site, threads[first]->site)) {
      stop(name_of(*threads[first]) + " waits at " + name_of(threads[first]->site) + ", but " +
           name_of(*threads[i]) + " at " + name_of(threads[i]->site));
    }
  }
  for (unsigned i = first; i < last; ++i) threads[i]->state = State::ready;
  return true;
}

// One warp after the other, each as far as it comes: who relies on others without waiting for them
// finds nothing done.
void run_block(unsigned count, const std::vector<std::vector<unsigned>>& warps) {
  for (unsigned i = 0; i < count; ++i) {
    threads[i]->state = State::ready;
    threads[i]->exchanges = 0;
  }
  for (;;) {
    for (const auto& warp : warps) {
      const unsigned first = warp[0] / kWarp * kWarp;
      do {
        for (unsigned i : warp) {
          if (threads[i]->state == State::ready) resume(*threads[i]);
        }
      } while (release(first, first + kWarp, State::at_warp_barrier));
    }
    if (release(0, count, State::at_block_barrier)) continue;
    const Thread *waits = nullptr, *other = nullptr;
    for (unsigned i = 0; i < count; ++i) {
      if (threads[i]->state != State::done) waits = threads[i].get();
    }
    if (waits == nullptr) return;
    for (unsigned i = 0; i < count; ++i) {
      const Thread& thread = *threads[i];
      if (thread.state == waits->state && same(thread.site, waits->site)) continue;
      const bool waited_for = waits->state == State::at_block_barrier ||
                              thread.index.x / kWarp == waits->index.x / kWarp;
      if (waited_for) other = &thread;
    }
    std::string whom = "nobody";
    if (other != nullptr) {
      whom = name_of(*other) + (other->state == State::done
                                    ? ", which has ended"
                                    : ", which waits at " + name_of(other->site));
    }
    stop(name_of(*waits) + " waits at " + name_of(waits->site) + " for " + whom);
  }
}

// The threads of each warp, in the order in which they run.
std::vector<std::vector<unsigned>> warps_of(unsigned count) {
  std::vector<std::vector<unsigned>> warps(count / kWarp, std::vector<unsigned>(kWarp));
  std::mt19937 random{unsigned(order)};
  for (unsigned i = 0; i < count; ++i) warps[i / kWarp][i % kWarp] = i;
  for (auto& warp : warps) {
    if (order == 1) std::reverse(warp.begin(), warp.end());
    if (order > 1) std::shuffle(warp.begin(), warp.end(), random);
  }
  if (order == 1) std::reverse(warps.begin(), warps.end());
  if (order > 1) std::shuffle(warps.begin(), warps.end(), random);
  return warps;
}

size_t to_pages(size_t bytes) {
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  return (bytes + page - 1) / page * page;
}

void run_grid(dim3 grid, dim3 block, size_t shared_bytes) {
  auto* const shared = reinterpret_cast<unsigned char*>(tunesmith::shared_memory);
  const size_t reachable = to_pages(shared_bytes + 1);
  const auto warps = warps_of(block.x);
  gridDim = grid;
  blockDim = block;
  const uint64_t blocks = uint64_t(grid.x) * grid.y;
  for (uint64_t i = 0; i < blocks; ++i) {
    const uint64_t at = order == 1 ? blocks - 1 - i : i;
    if (only_block >= 0 && at != uint64_t(only_block)) continue;
    blockIdx = {unsigned(at % grid.x), unsigned(at / grid.x), 0};
    memset(shared, kPoison, reachable);
    run_block(block.x, warps);
    for (size_t byte = shared_bytes; byte < reachable; ++byte) {
      if (shared[byte] != kPoison) {
        stop("block " + std::to_string(blockIdx.x) + " wrote byte " + std::to_string(byte) +
             " of its shared memory, which has " + std::to_string(shared_bytes));
      }
    }
  }
}

std::string describe_signal() {
  const std::string where = current == nullptr ? "" : " by " + name_of(*current);
  if (caught_signal != SIGSEGV && caught_signal != SIGBUS) {
    return "undefined behaviour (misaligned access, index, shift or overflow)" + where;
  }
  const auto* address = static_cast<unsigned char*>(caught_address);
  for (const auto& [begin, buffer] : buffers) {
    if (address >= buffer.mapped && address < buffer.mapped + buffer.mapped_size) {
      return "access at byte " + std::to_string(address - buffer.begin) + " of a buffer of " +
             std::to_string(buffer.size) + where;
    }
  }
  return "access outside all buffers" + where;
}

void on_signal(int signal, siginfo_t* info, void*) {
  if (!running) _exit(128 + signal);
  caught_signal = signal;
  caught_address = info->si_addr;
  siglongjmp(launch_frame, 2);
}

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE};

// Catches what kernels do wrong for as long as it lives.
class Trap {
 public:
  Trap() {
    stack_t stack = {};
    static std::vector<char> memory(64 * 1024);
    stack.ss_sp = memory.data();
    stack.ss_size = memory.size();
    sigaltstack(&stack, &old_stack_);
    struct sigaction action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (int i = 0; i < 5; ++i) sigaction(kSignals[i], &action, &old_[i]);
  }
  ~Trap() {
    for (int i = 0; i < 5; ++i) sigaction(kSignals[i], &old_[i], nullptr);
    sigaltstack(&old_stack_, nullptr);
  }

 private:
  stack_t old_stack_;
  struct sigaction old_[5];
};

std::string damaged_guard() {
  for (const auto& [begin, buffer] : buffers) {
    const size_t page = to_pages(1);
    const unsigned char* const last = buffer.mapped + buffer.mapped_size - page;
    for (const unsigned char* at = buffer.mapped + page; at < last; ++at) {
      if (at == buffer.begin) at += buffer.size;
      if (at < last && *at != kGuard) {
        return "byte " + std::to_string(at - buffer.begin) + " of a buffer of " +
               std::to_string(buffer.size) + " was written";
      }
    }
  }
  return "";
}

}  // namespace

namespace emulation {

unsigned lane() { return threadIdx.x % kWarp; }

void wait_for_block(Site site) {
  current->site = site;
  current->state = State::at_block_barrier;
  let_others_run();
}

uint32_t exchange(Site site, uint32_t bits, unsigned from) {
  if (site.mask != 0xFFFFFFFFu) stop(name_of(site) + ": only a whole warp's shuffles are emulated");
  Thread& self = *current;
  const unsigned turn = self.exchanges++ % 2;
  self.handed[turn] = bits;
  self.site = site;
  self.state = State::at_warp_barrier;
  let_others_run();
  return threads[self.index.x / kWarp * kWarp + from % kWarp]->handed[turn];
}

cudaError_t allow_shared_bytes(const void* kernel, int bytes) {
  if (bytes < 0 || size_t(bytes) > kMostShared) return cudaErrorInvalidValue;
  allowed_shared[kernel] = bytes;
  return cudaSuccess;
}

cudaError_t launch(const void* kernel, dim3 grid, dim3 block, size_t shared_bytes,
                   cudaStream_t stream, const std::function<void()>& run_thread) {
  const size_t allowed = allowed_shared.count(kernel) ? size_t(allowed_shared[kernel]) : 48 * 1024;
  if (grid.x == 0 || grid.y == 0 || grid.z != 1 || grid.x > 0x7FFFFFFFu || grid.y > 65535 ||
      block.x == 0 || block.x > kMostThreads || block.y != 1 || block.z != 1) {
    return cudaErrorInvalidConfiguration;
  }
  if (shared_bytes > allowed) return cudaErrorInvalidValue;
  streams.push_back(stream);
  most_shared_used = std::max(most_shared_used, shared_bytes);
  failure.clear();
  Trap trap;
  body = &run_thread;
  auto* const shared = reinterpret_cast<unsigned char*>(tunesmith::shared_memory);
  const size_t reachable = to_pages(shared_bytes + 1);
  const size_t forbidden = sizeof tunesmith::shared_memory - reachable;
  mprotect(shared + reachable, forbidden, PROT_NONE);
  const int stopped = sigsetjmp(launch_frame, 1);
  if (stopped == 0) {
    running = true;
    for (unsigned i = unsigned(threads.size()); i < block.x; ++i) threads.push_back(make_thread(i));
    if (block.x % kWarp != 0) stop("a block of " + std::to_string(block.x) + " threads");
    run_grid(grid, block, shared_bytes);
    current = nullptr;
    const std::string damaged = damaged_guard();
    if (!damaged.empty()) stop(damaged);
  } else {
    if (stopped == 2) failure = describe_signal();
    threads.clear();  // their stacks are left as they are
    current = nullptr;
  }
  running = false;
  mprotect(shared + reachable, forbidden, PROT_READ | PROT_WRITE);
  return stopped == 0 ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace emulation

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorLaunchFailure: return failure.c_str();
  }
  return "unknown error";
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  constexpr int kMajor = 9;
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? kMajor : multiprocessors;
  return cudaSuccess;
}

// For the tests.
extern "C" {

// Memory that ends where a forbidden page begins, or up to 15 bytes before, so that it begins
// `misaligned` bytes behind a multiple of 16. It is filled with the guards' pattern, but for very
// large ones, of which only what is touched takes up memory.
void* emulation_allocate(size_t size, size_t misaligned) {
  const size_t page = to_pages(1), inside = to_pages(size + misaligned + 16);
  auto* mapped =
      static_cast<unsigned char*>(mmap(nullptr, inside + 2 * page, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (mapped == MAP_FAILED) return nullptr;
  unsigned char* const end = mapped + page + inside;
  unsigned char* const begin = end - (size + misaligned + 15) / 16 * 16 + misaligned;
  memset(mapped + page, kGuard, size_t(begin - mapped) - page);
  memset(begin + size, kGuard, size_t(end - begin) - size);
  if (size < (size_t(1) << 28)) memset(begin, kGuard, size);
  mprotect(mapped, page, PROT_NONE);
  mprotect(end, page, PROT_NONE);
  buffers[begin] = {mapped, inside + 2 * page, begin, size};
  return begin;
}

void emulation_free(void* begin) {
  const Buffer buffer = buffers.at(begin);
  munmap(buffer.mapped, buffer.mapped_size);
  buffers.erase(begin);
}

// The order of warps, and of the lanes in each: 0 ascending, 1 descending, else a shuffle's seed.
void emulation_set_order(int value) { order = value; }
// Only this block of each grid is run; -1 runs all.
void emulation_set_only_block(int64_t block) { only_block = block; }
void emulation_set_multiprocessors(int count) { multiprocessors = count; }

// How many launches there were since the last call, how many of them on another stream.
int emulation_launches(void* stream, int* on_another, size_t* shared_bytes) {
  const int count = int(streams.size());
  *on_another = 0;
  for (const cudaStream_t used : streams) *on_another += used != static_cast<cudaStream_t>(stream);
  *shared_bytes = most_shared_used;
  streams.clear();
  most_shared_used = 0;
  return count;
}
}
