// Runs a kernel with every instruction set, and stops at what is wrong.
#pragma once

#include <dlfcn.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "../../../csrc/kernels.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace fuzz {

// An execution is one input through one instruction set.
inline int64_t executions = 0;

[[noreturn]] inline void fail(const char* format, ...) {
  std::va_list args;
  va_start(args, format);
  std::fprintf(stderr, "WRONG (%s): ", tunesmith_isa());
  std::vfprintf(stderr, format, args);
  std::fprintf(stderr, "\n");
  va_end(args);
  std::abort();
}

template <typename Run>
void with_every_isa(const Run& run) {
  for (int i = 0; const char* name = tunesmith_isa_at(i); ++i) {
    if (!tunesmith_set_isa(name)) fail("%s cannot be set", name);
    ++executions;
    run();
  }
}

// Where an OpenMP runtime is loaded; the kernels then share their work among as many.
inline void use_threads(unsigned chance) {
  constexpr int kCounts[] = {1, 2, 3, 4, 12};
  static const auto set =
      reinterpret_cast<void (*)(int)>(dlsym(RTLD_DEFAULT, "omp_set_num_threads"));
  if (set != nullptr) set(kCounts[chance % 5]);
}

}  // namespace fuzz
