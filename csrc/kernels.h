// What a device implements: plain C, pointers and sizes. Nothing is checked here.
//
// Blocks run over the flattened tensor; the last may be short. Code 2i is the high nibble of byte i;
// the nibble beside an odd last element is the code of zero.
#pragma once

#include <cstdint>

extern "C" {

enum tunesmith_dtype { TUNESMITH_FLOAT32 = 0, TUNESMITH_FLOAT16 = 1, TUNESMITH_BFLOAT16 = 2 };

// Writes packed [ceil(numel / 2)] and absmax [blocks]. A block that holds NaN or Inf gets such an
// absmax and codes without meaning.
void tunesmith_quantize_nf4_cpu(const void* weight, int dtype, int64_t numel, int64_t blocksize,
                                uint8_t* packed, float* absmax);

// Writes codes [blocks] and nested_absmax [ceil(blocks / 256)] of absmax less the offset.
void tunesmith_quantize_absmax_cpu(const float* absmax, int64_t blocks, const float* nested_offset,
                                   uint8_t* codes, float* nested_absmax);

// Writes out [numel]. absmax is fp32 when nested_absmax is null, uint8 codes otherwise.
void tunesmith_dequantize_nf4_cpu(const uint8_t* packed, const void* absmax,
                                  const float* nested_absmax, const float* nested_offset,
                                  int64_t numel, int64_t blocksize, int dtype, void* out);

// Which instruction set the CPU kernels use; null beyond the last that this CPU can run.
const char* tunesmith_isa(void);
const char* tunesmith_isa_at(int index);
// Returns whether that one can be used; if so it is from now on.
bool tunesmith_set_isa(const char* name);
bool tunesmith_has_openmp(void);

#ifdef TUNESMITH_CUDA
// The same on the current CUDA device, put on a stream (a cudaStream_t). Returns null, or what CUDA
// calls the error of the launch.
const char* tunesmith_quantize_nf4_cuda(const void* weight, int dtype, int64_t numel,
                                        int64_t blocksize, uint8_t* packed, float* absmax,
                                        void* stream);
const char* tunesmith_quantize_absmax_cuda(const float* absmax, int64_t blocks,
                                           const float* nested_offset, uint8_t* codes,
                                           float* nested_absmax, void* stream);
const char* tunesmith_dequantize_nf4_cuda(const uint8_t* packed, const void* absmax,
                                          const float* nested_absmax, const float* nested_offset,
                                          int64_t numel, int64_t blocksize, int dtype, void* out,
                                          void* stream);
#endif
}
