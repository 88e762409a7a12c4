// What the kernels of an instruction set are asked for: one struct for each of them. dispatch.cpp
// fills them in, and shares their blocks, rows or elements among threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../four_bit.h"
#include "../kernels.h"
#include "matrix.h"

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

// Whether the output is so large that it would only push everything else out of the caches, and
// lies at a multiple of `alignment` bytes. To store past them saves reading it first.
inline bool streams_stores(const DequantizeJob& job, size_t alignment) {
  constexpr int64_t kLarge = int64_t(1) << 24;
  return job.numel * size_of(job.dtype) >= kLarge &&
         reinterpret_cast<uintptr_t>(job.out) % alignment == 0;
}

struct AbsmaxJob {
  const float* absmax;
  int64_t blocks;
  float nested_offset;
  uint8_t* codes;
  float* nested_absmax;
};

// A block of attention's backward pass, everything [keys, queries]: from scaled scores and the
// gradients of the probabilities to the probabilities and the gradients of the unscaled scores,
// both of `dtype`. Key k is seen by queries from k + offset on.
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

// A block of attention, everything [keys, queries]: from scaled scores to probabilities of `dtype`,
// which still lack a division by the sum of all. Key k is seen by queries from k + offset on.
// `running_max` and `running_sum` are those of the keys before and become those of these, too; what
// those keys have added up is `rescale` times as much.
struct SoftmaxForwardJob {
  const float* scores;
  int64_t keys, queries, offset;
  int dtype;
  float* running_max;  // [queries]
  float* running_sum;  // [queries]
  float* rescale;      // [queries]
  void* probabilities;
};

// A norm of rows of `columns` elements, or its backward pass, where `grad_out` is not null.
struct NormJob {
  const void* x;
  const void* weight;
  const void* grad_out;
  int64_t columns;
  int dtype;
  float eps;
  bool from_one;     // the weight is what is added to one
  float* scale;      // [rows], one over the root mean square
  void* out;         // y, or the gradient of x
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

// Rotary embedding of tokens of `heads` times `head_size` elements; cos and sin [positions,
// head_size] are those of token % positions.
struct RotaryJob {
  const void* x;
  const void* cos;
  const void* sin;
  int64_t positions, heads, head_size;
  int dtype;
  bool backward;
  void* out;
};

// Rows of `columns` logits to the log-probabilities of one label each, and, where asked for, in
// their own place to the derivatives of those.
struct LogpsJob {
  void* logits;
  const int64_t* labels;
  int64_t columns;
  int dtype;
  bool gradients;
  float* logps;
};

// Attention of one query a row, as decoding has it, over keys and values [rows, key_heads,
// capacity, head_size], of which row r sees [first[r], length).
struct AttentionDecodeJob {
  const void* q;
  const void* keys;
  const void* values;
  const int64_t* first;
  int64_t heads, key_heads, head_size, capacity, length;
  float scale;
  int dtype;
  void* out;
};

}  // namespace tunesmith
