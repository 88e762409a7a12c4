// What one instruction set implements, and how dispatch.cpp finds it.
//
// A new one is a pair of files (quantize and dequantize, products), its flags in CMakeLists.txt, a
// declaration here and a line in dispatch.cpp.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../kernels.h"
#include "../nf4.h"
#include "attention.h"

namespace tunesmith {

struct QuantizeJob {
  const void* weight;
  int dtype;
  int64_t numel;
  int64_t blocksize;
  const FourBitTable* table;
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
  const FourBitTable* table;
  int dtype;
  void* out;
};

// Bytes of an element of a plain type.
inline int64_t size_of(int type) { return type == TUNESMITH_FLOAT32 ? 4 : 2; }

// Whether the output is so large that it would only push everything else out of the caches, and lies
// at a multiple of `alignment` bytes. To store past them saves reading it first.
inline bool goes_past_caches(const DequantizeJob& job, size_t alignment) {
  constexpr int64_t kLarge = int64_t(1) << 24;
  return job.numel * size_of(job.dtype) >= kLarge && reinterpret_cast<uintptr_t>(job.out) % alignment == 0;
}

struct AbsmaxJob {
  const float* absmax;
  int64_t blocks;
  float nested_offset;
  uint8_t* codes;
  float* nested_absmax;
};

// Rows of `columns` elements without gaps: plain values, some of which a mask may drop, or 4-bit codes.
struct Matrix {
  const void* data;
  int type;
  int64_t columns;
  // 4-bit only
  const FourBitTable* table;
  const void* absmax;
  const float* nested_absmax;
  float nested_offset;
  int64_t blocksize;
  // plain only; null keeps all
  const uint8_t* keep;
  float keep_scale;
};

// out = alpha left right + bias + alpha2 left2 right2, left [M, P] and left2 [M, R] plain. `right` is
// [P, N], or [N, P] and used transposed; right2 [R, N] or [N, R] likewise. A factor without data is
// left out with its product.
struct Product {
  Matrix left;
  Matrix right;
  bool transposed;
  float alpha;
  const void* bias;  // [N], of type out_type
  Matrix left2;
  Matrix right2;
  float alpha2;
  // drops elements of left2 right2; only where right is not transposed
  const uint8_t* keep;
  float keep_scale;
  // element (m, n) is out[m * row_stride + n * column_stride]
  void* out;
  int out_type;
  int64_t row_stride;
  int64_t column_stride;
  int64_t rows;     // M
  int64_t columns;  // N
  bool accumulate;
  bool exact;  // multiply in fp32 even where bf16 would do
};

// A block of attention's backward pass, everything [keys, queries]: from scaled scores and the gradients
// of the probabilities to the probabilities and the gradients of the unscaled scores, both of `dtype`.
// Key k is seen by queries from k + offset on.
struct SoftmaxJob {
  const float* scores;
  const float* grads;
  int64_t keys, queries, offset;
  const float* lse;    // [queries], the log-sum-exp of all scores
  const float* delta;  // [queries], output times its gradient
  float scale;
  int dtype;
  void* probabilities;
  void* score_grads;
};

// A block of attention, everything [keys, queries]: from scaled scores to shares of `dtype`, which still lack
// a division by the sum of all. Key k is seen by queries from k + offset on. `most` and `sum` are those of
// the keys before and become those of these, too; what those keys have added up is `smaller` times as much.
struct SoftmaxForwardJob {
  const float* scores;
  int64_t keys, queries, offset;
  int dtype;
  float* most;     // [queries]
  float* sum;      // [queries]
  float* smaller;  // [queries]
  void* shares;
};

// A norm of rows of `columns` elements, or its backward pass, where `grad_out` is not null.
struct NormJob {
  const void* x;
  const void* weight;
  const void* grad_out;
  int64_t columns;
  int dtype;
  float eps;
  bool from_one;  // the weight is what is added to one
  float* scale;   // [rows], one over the root mean square
  void* out;      // y, or the gradient of x
  const void* plus;  // what is added to the gradient, or null
};

// out = act(gate) up, or its backward pass, where `grad_out` is not null.
struct GatedJob {
  const void* gate;
  const void* up;
  const void* grad_out;
  int dtype;
  int activation;
  void* out;
  void* grad_gate;
  void* grad_up;
};

// Rotary embedding of tokens of `heads` times `size` elements; cos and sin [positions, size] are those of
// token % positions.
struct RotaryJob {
  const void* x;
  const void* cos;
  const void* sin;
  int64_t positions, heads, size;
  int dtype;
  bool backward;
  void* out;
};

// Rows of `columns` logits to the log-probabilities of one label each, and, where asked for, in their own
// place to the derivatives of those.
struct LogpsJob {
  void* logits;
  const int64_t* labels;
  int64_t columns;
  int dtype;
  bool slopes;
  float* logps;
};

// Attention of one query a row, as decoding has it, over keys and values [rows, key_heads, capacity,
// size], of which row r sees [first[r], length).
struct DecodeJob {
  const void* q;
  const void* keys;
  const void* values;
  const int64_t* first;
  int64_t heads, key_heads, size, capacity, length;
  float scale;
  int dtype;
  void* out;
};

// Up to this many rows a product need not bring its factors into blocks, and a linear layer's tokens are
// projected into the low rank one by one.
constexpr int64_t kFewTokens = 8;

// Does the groups of 256 absmax [first, last). One in 64 of the work at most, so every set shares it.
void quantize_absmax(const AbsmaxJob& job, int64_t first, int64_t last);

// `quantize` and `dequantize` do the blocks [first, last), `norm` rows, `gated` elements, `rotary`
// tokens, `decode` heads of rows and `logps` rows, whose bytes no other call touches; `multiply` does all of a product, on several threads.
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
  void (*decode)(const DecodeJob& job, int64_t first, int64_t last);
  void (*logps)(const LogpsJob& job, int64_t first, int64_t last);
  // may be null, or return false for a job that is not for them
  bool (*attention_forward)(const tunesmith_attention& job, const AttentionGroup& group, int64_t head,
                            void* out, float* lse);
  bool (*attention_backward)(const tunesmith_attention& job, const AttentionGroup& group, int64_t key_head,
                             void* grad_q, void* grad_k, void* grad_v);
};

extern const Isa scalar_isa;
#ifdef TUNESMITH_X86
extern const Isa avx2_isa;
extern const Isa avx512_isa;
extern const Isa avx512_bf16_isa;
extern const Isa amx_bf16_isa;
#endif

}  // namespace tunesmith
