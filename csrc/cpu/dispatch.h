// What the instruction set in use does, for the files that are compiled without one.
#pragma once

#include "../four_bit.h"
#include "attention.h"
#include "jobs.h"

namespace tunesmith {

// Runs a product with the instruction set in use.
void multiply(Product product);

void softmax_forward(const SoftmaxForwardJob& job);
void softmax_backward(const SoftmaxJob& job);

// Does one head of a group if the instruction set in use has a way of its own for the job.
bool attention_forward(const tunesmith_attention& job, const AttentionGroup& group, int64_t head,
                       void* out, float* lse);
bool attention_backward(const tunesmith_attention& job, const AttentionGroup& group,
                        int64_t key_head, void* grad_q, void* grad_k, void* grad_v);

// The table of a 4-bit type; null for a plain one.
const FourBitTable* table_of(int type);

}  // namespace tunesmith
