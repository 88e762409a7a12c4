// The instruction set in use, for what is built on it.
#pragma once

#include "../nf4.h"
#include "isa.h"

namespace tunesmith {

// Runs a product with the instruction set in use.
void multiply(Product product);

void softmax_backward(const SoftmaxJob& job);

// The table of a 4-bit type; null for a plain one.
const FourBitTable* table_of(int type);

}  // namespace tunesmith
