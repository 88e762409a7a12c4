// The products of each instruction set: product_<set>.cpp.
#pragma once

#include "isa.h"

namespace tunesmith {

void multiply_scalar(const Product& product);
void multiply_avx2(const Product& product);
void multiply_avx512(const Product& product);
void multiply_avx512_bf16(const Product& product);
void multiply_amx_bf16(const Product& product);

}  // namespace tunesmith
