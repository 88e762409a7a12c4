// What one instruction set implements, and how dispatch.cpp finds it.
//
// A new one is a file of its own (say avx512.cpp), its flags in CMakeLists.txt, a declaration here
// and a line in dispatch.cpp.
#pragma once

#include <cstdint>

namespace tunesmith {

struct QuantizeJob {
  const void* weight;
  int dtype;
  int64_t numel;
  int64_t blocksize;
  uint8_t* packed;
  float* absmax;
};

struct DequantizeJob {
  const uint8_t* packed;
  const void* absmax;
  const float* nested_absmax;
  float nested_offset;
  int64_t numel;
  int64_t blocksize;
  int dtype;
  void* out;
};

struct AbsmaxJob {
  const float* absmax;
  int64_t blocks;
  float nested_offset;
  uint8_t* codes;
  float* nested_absmax;
};

// Does the groups of 256 absmax [first, last). One in 64 of the work at most, so every set shares it.
void quantize_absmax(const AbsmaxJob& job, int64_t first, int64_t last);

// Each function does the blocks [first, last), whose bytes no other call touches.
struct Isa {
  const char* name;
  void (*quantize)(const QuantizeJob& job, int64_t first, int64_t last);
  void (*dequantize)(const DequantizeJob& job, int64_t first, int64_t last);
};

extern const Isa scalar_isa;
#ifdef TUNESMITH_AVX2
extern const Isa avx2_isa;
#endif

}  // namespace tunesmith
