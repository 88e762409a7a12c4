// The CPU side of kernels.h: picks the instruction set at run time, and shares blocks among threads.
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../kernels.h"
#include "../nf4.h"
#include "isa.h"
#include "parallel.h"

namespace tunesmith {
namespace {

// below this many elements a thread is not worth waking
constexpr int64_t kGrain = 1 << 15;

int64_t divide_up(int64_t count, int64_t size) { return (count + size - 1) / size; }

struct Choice {
  const Isa* isa;
  bool (*supported)();
};

// Best first. The questions are asked here, in code that runs on any CPU.
const Choice kChoices[] = {
#ifdef TUNESMITH_AVX2
    {&avx2_isa,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
#endif
    {&scalar_isa, [] { return true; }},
};

const Isa* find(const char* name) {
  for (const Choice& choice : kChoices) {
    if (choice.supported() && std::strcmp(choice.isa->name, name) == 0) return choice.isa;
  }
  return nullptr;
}

const Isa* best() {
  for (const Choice& choice : kChoices) {
    if (choice.supported()) return choice.isa;
  }
  return &scalar_isa;
}

// TUNESMITH_ISA names the set to use; one that this CPU has not got is passed over.
const Isa* first_choice() {
  const char* wanted = std::getenv("TUNESMITH_ISA");
  const Isa* isa = wanted == nullptr ? nullptr : find(wanted);
  return isa == nullptr ? best() : isa;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{first_choice()};
  return isa;
}

}  // namespace
}  // namespace tunesmith

using namespace tunesmith;

void tunesmith_quantize_nf4_cpu(const void* weight, int dtype, int64_t numel, int64_t blocksize,
                                uint8_t* packed, float* absmax) {
  const QuantizeJob job = {weight, dtype, numel, blocksize, packed, absmax};
  const Isa& isa = *current();
  parallel_for(divide_up(numel, blocksize), divide_up(kGrain, blocksize),
               [&](int64_t first, int64_t last) { isa.quantize(job, first, last); });
}

void tunesmith_quantize_absmax_cpu(const float* absmax, int64_t blocks, const float* nested_offset,
                                   uint8_t* codes, float* nested_absmax) {
  const AbsmaxJob job = {absmax, blocks, *nested_offset, codes, nested_absmax};
  parallel_for(divide_up(blocks, kNestedBlocksize), 8,
               [&](int64_t first, int64_t last) { quantize_absmax(job, first, last); });
}

void tunesmith_dequantize_nf4_cpu(const uint8_t* packed, const void* absmax,
                                  const float* nested_absmax, const float* nested_offset,
                                  int64_t numel, int64_t blocksize, int dtype, void* out) {
  const float offset = nested_offset == nullptr ? 0.0f : *nested_offset;
  const DequantizeJob job = {packed, absmax, nested_absmax, offset, numel, blocksize, dtype, out};
  const Isa& isa = *current();
  parallel_for(divide_up(numel, blocksize), divide_up(kGrain, blocksize),
               [&](int64_t first, int64_t last) { isa.dequantize(job, first, last); });
}

const char* tunesmith_isa(void) { return current().load()->name; }

const char* tunesmith_isa_at(int index) {
  for (const Choice& choice : kChoices) {
    if (choice.supported() && index-- == 0) return choice.isa->name;
  }
  return nullptr;
}

bool tunesmith_set_isa(const char* name) {
  const Isa* isa = find(name);
  if (isa != nullptr) current() = isa;
  return isa != nullptr;
}

bool tunesmith_has_openmp(void) { return openmp_loaded(); }
