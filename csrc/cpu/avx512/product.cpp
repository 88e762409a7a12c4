// Products with AVX-512: 16 fp32 at a time.
#include "simd.h"

#include "../isa.h"

namespace tunesmith {

void multiply_avx512(const Product& product) {
  if (is_small(product)) return multiply_small<Avx512>(product);
  if (has_few_tokens(product) && !has_extreme_values(product.left, product.rows)) {
    return multiply_few<Avx512>(product);
  }
  if (product.transposed) return multiply_transposed<Fp32Arithmetic<Avx512>>(product);
  multiply_plain<Fp32Arithmetic<Avx512>>(product);
}

}  // namespace tunesmith
