// The forward of the linear layer against its formula in double precision.
#include <vector>

#include "check.h"
#include "input.h"
#include "layer.h"
#include "memory.h"

using fuzz::Input;
using fuzz::Sum;
using fuzz::Tensor;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  fuzz::use_threads(input.byte());
  fuzz::Layer layer(input);
  const bool accumulate = input.one_in(2);
  const Tensor before = layer.more(input, layer.dtype, layer.tokens * layer.out);
  const int64_t misaligned = input.up_to(3);

  std::vector<Sum> s(layer.tokens * layer.rank), y(layer.tokens * layer.out);
  std::vector<double> narrow(y.size());  // what is lost by rounding each factor, in units of 2^-8
  for (int64_t m = 0; m < layer.tokens; ++m) {
    for (int64_t r = 0; r < layer.rank; ++r) {
      for (int64_t k = 0; k < layer.in; ++k) {
        s[m * layer.rank + r].add((*layer.x)[m * layer.in + k] * layer.kept(m, k) * layer.a(r, k));
      }
    }
    for (int64_t n = 0; n < layer.out; ++n) {
      Sum& sum = y[m * layer.out + n];
      for (int64_t k = 0; k < layer.in; ++k) {
        sum.add((*layer.x)[m * layer.in + k] * layer.weight(n, k));
      }
      double& lost = narrow[m * layer.out + n];
      lost = sum.size;
      for (int64_t r = 0; r < layer.rank; ++r) {
        sum.add(s[m * layer.rank + r], layer.scaling * layer.b(n, r));
      }
      lost += 4.1 * (sum.size - lost);  // x times its mask, A, s and B
      sum.add(layer.bias(n));
      if (accumulate) sum.add(before[m * layer.out + n]);
    }
  }

  fuzz::with_every_isa([&] {
    const tunesmith_linear linear = layer.describe();
    const Tensor our_s(TUNESMITH_FLOAT32, layer.tokens * layer.rank, misaligned);
    const Tensor our_y = before;
    tunesmith_linear_cpu(&linear, layer.x->data(), our_s.floats(), our_y.data(), accumulate);
    if (!layer.comparable()) return;
    for (int64_t i = 0; i < our_s.count(); ++i) {
      layer.compare("s", i, our_s[i], s[i], layer.in, layer.narrow() ? 2.1 * s[i].size : 0,
                    TUNESMITH_FLOAT32);
    }
    for (int64_t i = 0; i < our_y.count(); ++i) {
      layer.compare("y", i, our_y[i], y[i], layer.in + layer.rank, layer.narrow() ? narrow[i] : 0,
                    layer.dtype);
    }
  });
  return 0;
}
