// The norm of several tensors, and their scaling, against sums in double.
#include <cmath>
#include <vector>

#include "check.h"
#include "close.h"
#include "input.h"
#include "memory.h"

using fuzz::Input;
using fuzz::kUnit;
using fuzz::Tensor;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  fuzz::use_threads(input.byte());
  const int dtype = input.dtype();
  const int64_t count = input.up_to(6);
  const bool wide = input.one_in(64);  // more than one thread is given
  const fuzz::Kind kind = input.kind();
  std::vector<Tensor> tensors;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t numel = wide ? input.up_to(40000) : input.up_to(100);
    tensors.push_back(Tensor(dtype, numel, input.up_to(3)).fill(input.random(), kind, 0));
  }
  double squares = 0.0;
  for (const Tensor& tensor : tensors) {
    for (int64_t i = 0; i < tensor.count(); ++i) squares += tensor[i] * tensor[i];
  }
  const double exact = std::sqrt(squares);
  const float most = input.one_in(3) ? INFINITY : float(exact) * float(1 + input.up_to(7)) / 4.0f;

  const std::vector<Tensor> changed = tensors;
  std::vector<void*> pointers;
  std::vector<int64_t> numels;
  for (const Tensor& tensor : changed) {
    pointers.push_back(tensor.data());
    numels.push_back(tensor.count());
  }
  ++fuzz::executions;  // there is one for all instruction sets
  const float norm = tunesmith_clip_norm_cpu(pointers.data(), numels.data(), count, dtype, most);
  if (!(exact < 1e30)) {
    if (norm < 1e29f) fuzz::fail("got a norm of %g for %g", double(norm), exact);
    return 0;
  }
  fuzz::check_close("norm", 0, double(norm), exact, 600 * kUnit * exact, TUNESMITH_FLOAT32);
  const float factor = most / (norm + 1e-6f);
  for (size_t t = 0; t < tensors.size(); ++t) {
    for (int64_t i = 0; i < tensors[t].count(); ++i) {
      const double before = tensors[t][i], after = changed[t][i];
      if (factor >= 1.0f) {
        if (!fuzz::same(before, after)) fuzz::fail("element %lld changed", (long long)i);
      } else {
        fuzz::check_close("scaled", i, after, before * double(factor),
                          2 * kUnit * std::fabs(before), dtype);
      }
    }
  }
  return 0;
}
