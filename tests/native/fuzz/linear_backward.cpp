// The gradients of the linear layer against their formulas in double precision.
#include <vector>

#include "check.h"
#include "input.h"
#include "layer.h"
#include "memory.h"

using fuzz::Input;
using fuzz::Layer;
using fuzz::Sum;
using fuzz::Tensor;

namespace {

// What flows into s [tokens, rank].
std::vector<Sum> grad_s_of(const Layer& layer, const Tensor& grad_y) {
  std::vector<Sum> out(layer.tokens * layer.rank);
  for (int64_t m = 0; m < layer.tokens; ++m) {
    for (int64_t r = 0; r < layer.rank; ++r) {
      for (int64_t n = 0; n < layer.out; ++n) {
        const double term = layer.scaling * grad_y[m * layer.out + n] * layer.b(n, r);
        out[m * layer.rank + r].add(term);
      }
    }
  }
  return out;
}

std::vector<Sum> grad_x_of(const Layer& layer, const Tensor& grad_y, const std::vector<Sum>& grad_s,
                           const Tensor* before, std::vector<double>& narrow) {
  std::vector<Sum> out(layer.tokens * layer.in);
  narrow.resize(out.size());
  for (int64_t m = 0; m < layer.tokens; ++m) {
    for (int64_t k = 0; k < layer.in; ++k) {
      const int64_t at = m * layer.in + k;
      for (int64_t n = 0; n < layer.out; ++n) {
        out[at].add(grad_y[m * layer.out + n] * layer.weight(n, k));
      }
      narrow[at] = out[at].size;
      for (int64_t r = 0; r < layer.rank; ++r) {
        out[at].add(grad_s[m * layer.rank + r], layer.kept(m, k) * layer.a(r, k));
      }
      narrow[at] += 3.1 * (out[at].size - narrow[at]);  // B, what flows into s, and A
      if (before != nullptr) out[at].add((*before)[at]);
    }
  }
  return out;
}

std::vector<Sum> grad_a_of(const Layer& layer, const std::vector<Sum>& grad_s) {
  std::vector<Sum> out(layer.rank * layer.in);
  for (int64_t r = 0; r < layer.rank; ++r) {
    for (int64_t k = 0; k < layer.in; ++k) {
      for (int64_t m = 0; m < layer.tokens; ++m) {
        const double dropped = layer.kept(m, k) * (*layer.x)[m * layer.in + k];
        out[r * layer.in + k].add(grad_s[m * layer.rank + r], dropped);
      }
    }
  }
  return out;
}

std::vector<Sum> grad_b_of(const Layer& layer, const Tensor& grad_y, const Tensor& s) {
  std::vector<Sum> out(layer.out * layer.rank);
  for (int64_t n = 0; n < layer.out; ++n) {
    for (int64_t r = 0; r < layer.rank; ++r) {
      for (int64_t m = 0; m < layer.tokens; ++m) {
        const double term = grad_y[m * layer.out + n] * s[m * layer.rank + r];
        out[n * layer.rank + r].add(layer.scaling * term);
      }
    }
  }
  return out;
}

// `narrow` is what is lost by rounding each factor, in units of 2^-8.
void compare(const Layer& layer, const char* what, const Tensor& actual,
             const std::vector<Sum>& expected, int64_t terms, int type,
             const std::vector<double>& narrow) {
  for (int64_t i = 0; i < actual.count(); ++i) {
    layer.compare(what, i, actual[i], expected[i], terms, layer.narrow() ? narrow[i] : 0, type);
  }
}

std::vector<double> times_size(double factor, const std::vector<Sum>& sums) {
  std::vector<double> out;
  for (const Sum& sum : sums) out.push_back(factor * sum.size);
  return out;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  fuzz::use_threads(input.byte());
  Layer layer(input);
  const bool accumulate = input.one_in(2);
  const bool need_x = !input.one_in(4), need_a = !input.one_in(4), need_b = !input.one_in(4);
  const Tensor grad_y = layer.more(input, layer.dtype, layer.tokens * layer.out);
  const Tensor s = layer.more(input, TUNESMITH_FLOAT32, layer.tokens * layer.rank);
  const Tensor before = layer.more(input, layer.dtype, layer.tokens * layer.in);
  const int64_t misaligned = input.up_to(3);
  std::vector<double> narrow_x;
  const std::vector<Sum> expected_s = grad_s_of(layer, grad_y);
  const std::vector<Sum> expected_x =
      grad_x_of(layer, grad_y, expected_s, accumulate ? &before : nullptr, narrow_x);
  const std::vector<Sum> expected_a = grad_a_of(layer, expected_s);
  const std::vector<Sum> expected_b = grad_b_of(layer, grad_y, s);
  // B, what flows into s, and x times its mask; s alone
  const auto narrow_a = times_size(3.1, expected_a), narrow_b = times_size(1, expected_b);

  fuzz::with_every_isa([&] {
    const tunesmith_linear linear = layer.describe();
    const Tensor grad_x = before;
    const Tensor grad_a(layer.adapter_dtype, layer.rank * layer.in, misaligned);
    const Tensor grad_b(layer.adapter_dtype, layer.out * layer.rank, misaligned);
    // what is not needed need not be there
    tunesmith_linear_backward_cpu(
        &linear, need_a ? layer.x->data() : nullptr, need_b ? s.floats() : nullptr, grad_y.data(),
        need_x ? grad_x.data() : nullptr, need_a ? grad_a.data() : nullptr,
        need_b ? grad_b.data() : nullptr, accumulate);
    if (!layer.comparable()) return;
    const int64_t depth = layer.out + layer.rank;
    if (need_x) compare(layer, "grad_x", grad_x, expected_x, depth, layer.dtype, narrow_x);
    if (need_a) {
      compare(layer, "grad_a", grad_a, expected_a, layer.tokens + layer.out, layer.adapter_dtype,
              narrow_a);
    }
    if (need_b) {
      compare(layer, "grad_b", grad_b, expected_b, layer.tokens, layer.adapter_dtype, narrow_b);
    }
  });
  return 0;
}
