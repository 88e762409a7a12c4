// The table of kernels that each instruction set fills in, and the tables that there are: a folder
// each (scalar, avx2, avx512, amx).
//
// A new one is a folder with kernels.cpp (everything but products) and product.cpp, its flags in
// CMakeLists.txt, a declaration here and a line in dispatch.cpp.
#pragma once

#include <cstdint>

#include "attention.h"
#include "jobs.h"

namespace tunesmith {

// Does the groups of 256 absmax [first, last). One in 64 of the work at most, so every set shares
// it.
void quantize_absmax(const AbsmaxJob& job, int64_t first, int64_t last);

// `quantize` and `dequantize` do the blocks [first, last), `norm` rows, `gated` elements, `rotary`
// tokens, `attention_decode` heads of rows and `logps` rows, whose bytes no other call touches;
// `multiply` does all of a product, on several threads.
struct Isa {
  const char* name;
  void (*quantize)(const QuantizeJob& job, int64_t first, int64_t last);
  void (*dequantize)(const DequantizeJob& job, int64_t first, int64_t last);
  void (*multiply)(const Product& product);
  void (*softmax_forward)(const SoftmaxForwardJob& job);
  void (*softmax_backward)(const SoftmaxJob& job);
  void (*norm)(const NormJob& job, int64_t first, int64_t last);
  void (*gated)(const GatedJob& job, int64_t first, int64_t last);
  void (*rotary)(const RotaryJob& job, int64_t first, int64_t last);
  void (*attention_decode)(const AttentionDecodeJob& job, int64_t first, int64_t last);
  void (*logps)(const LogpsJob& job, int64_t first, int64_t last);
  // may be null, or return false for a job that is not for them
  bool (*attention_forward)(const tunesmith_attention& job, const AttentionGroup& group,
                            int64_t head, void* out, float* lse);
  bool (*attention_backward)(const tunesmith_attention& job, const AttentionGroup& group,
                             int64_t key_head, void* grad_q, void* grad_k, void* grad_v);
};

extern const Isa scalar_isa;
#ifdef TUNESMITH_X86
extern const Isa avx2_isa;
extern const Isa avx512_isa;
extern const Isa avx512_bf16_isa;
extern const Isa amx_bf16_isa;
#endif

// What those tables are made of beside the headers: the products of each set, <set>/product*.cpp,
// and what AMX does with attention, amx/attention_*.cpp.
void multiply_scalar(const Product& product);
void multiply_avx2(const Product& product);
void multiply_avx512(const Product& product);
void multiply_avx512_bf16(const Product& product);
void multiply_amx_bf16(const Product& product);

// Does one head of the queries of a group; false where the job is not for it and nothing was done.
bool attention_forward_amx(const tunesmith_attention& job, const AttentionGroup& group,
                           int64_t head, void* out, float* lse);

// Does one head of the keys of a group; false where the job is not for it and nothing was done.
bool attention_backward_amx(const tunesmith_attention& job, const AttentionGroup& group,
                            int64_t key_head, void* grad_q, void* grad_k, void* grad_v);

}  // namespace tunesmith
