// RMSNorm, gated units and the rotary embedding, both ways, against their formulas.
#include <cmath>

#include "check.h"
#include "close.h"
#include "input.h"
#include "memory.h"

using fuzz::check_close;
using fuzz::Input;
using fuzz::kUnit;
using fuzz::Tensor;

namespace {

// Tensors of one type, of numbers of one kind.
struct Drawn {
  explicit Drawn(Input& input)
      : dtype(input.dtype()), kind(input.kind()), lift(unsigned(input.up_to(2))) {}

  Tensor tensor(Input& input, int64_t count) const {
    return Tensor(dtype, count, input.up_to(3)).fill(input.random(), kind, lift);
  }
  // What a value is off by that was rounded to the type on its way.
  double lost(double value) const { return fuzz::half_unit(std::fabs(value), dtype); }

  int dtype;
  fuzz::Kind kind;
  unsigned lift;
};

// Beyond it products of three overflow in 16 bits.
bool comparable(const Drawn& drawn, std::initializer_list<const Tensor*> tensors) {
  return fuzz::largest(tensors) < (drawn.dtype == TUNESMITH_FLOAT16 ? 30 : 1e9);
}

void norm(Input& input) {
  const Drawn drawn(input);
  const int64_t rows = input.up_to(20), columns = 1 + input.up_to(input.one_in(8) ? 3000 : 150);
  const float eps = input.pick<float>({1e-6f, 1e-5f, 1e-12f});
  const bool from_one = input.one_in(3);
  const Tensor x = drawn.tensor(input, rows * columns), weight = drawn.tensor(input, columns);
  const Tensor grad_y = drawn.tensor(input, rows * columns),
               plus = drawn.tensor(input, rows * columns);
  const bool adds = input.one_in(2);
  const int64_t misaligned = input.up_to(3);
  const double sums = double(columns + 32) * kUnit;

  fuzz::with_every_isa([&] {
    const Tensor y(drawn.dtype, rows * columns, misaligned), scale(TUNESMITH_FLOAT32, rows);
    const Tensor grad_x(drawn.dtype, rows * columns, misaligned);
    tunesmith_rms_norm_cpu(x.data(), weight.data(), drawn.dtype, rows, columns, eps, from_one,
                           y.data(), scale.floats());
    tunesmith_rms_norm_backward_cpu(grad_y.data(), x.data(), weight.data(), scale.floats(),
                                    drawn.dtype, rows, columns, from_one,
                                    adds ? plus.data() : nullptr, grad_x.data());
    if (!comparable(drawn, {&x, &weight, &grad_y, &plus})) return;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t begin = row * columns;
      const auto factor = [&](int64_t i) { return weight[i] + (from_one ? 1 : 0); };
      double squares = 0, along = 0, size = 0, lost = 0;
      for (int64_t i = 0; i < columns; ++i) {
        const double inflow = grad_y[begin + i] * factor(i);
        squares += x[begin + i] * x[begin + i];
        along += inflow * x[begin + i];
        size += std::fabs(grad_y[begin + i] * x[begin + i]) * (std::fabs(weight[i]) + 1);
        lost += drawn.lost(inflow) * std::fabs(x[begin + i]);
      }
      const double exact = 1 / std::sqrt(squares / double(columns) + eps);
      check_close("scale", row, scale[row], exact, sums * exact, TUNESMITH_FLOAT32);
      const double share = exact * exact / double(columns);
      for (int64_t i = 0; i < columns; ++i) {
        const double normed = x[begin + i] * exact, inflow = grad_y[begin + i] * factor(i);
        // how far 1 + weight is off, where it nearly cancels, is a part of both
        const double factor_size = std::fabs(weight[i]) + 1;
        check_close("y", begin + i, y[begin + i], normed * factor(i),
                    std::fabs(normed) * factor_size * 2 * sums + drawn.lost(normed) * factor_size,
                    drawn.dtype);
        const double back = inflow - x[begin + i] * share * along;
        const double off = std::fabs(x[begin + i]) * share * (lost + 4 * sums * size) +
                           drawn.lost(inflow) +
                           4 * kUnit * std::fabs(grad_y[begin + i]) * factor_size;
        const double more = adds ? plus[begin + i] : 0;
        check_close("grad_x", begin + i, grad_x[begin + i], exact * back + more,
                    exact * off + 4 * sums * exact * std::fabs(back) + 2 * kUnit * std::fabs(more) +
                        0x1p-120,
                    drawn.dtype);
      }
    }
  });
}

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void gated(Input& input) {
  const Drawn drawn(input);
  const int64_t numel = input.up_to(input.one_in(8) ? 40000 : 300), misaligned = input.up_to(3);
  const int activation = input.pick<int>({TUNESMITH_SILU, TUNESMITH_GELU_TANH});
  const Tensor gate = drawn.tensor(input, numel), up = drawn.tensor(input, numel);
  const Tensor grad_y = drawn.tensor(input, numel);

  fuzz::with_every_isa([&] {
    const Tensor y(drawn.dtype, numel, misaligned), grad_gate(drawn.dtype, numel, misaligned);
    const Tensor grad_up(drawn.dtype, numel);
    tunesmith_gated_cpu(gate.data(), up.data(), drawn.dtype, numel, activation, y.data());
    tunesmith_gated_backward_cpu(grad_y.data(), gate.data(), up.data(), drawn.dtype, numel,
                                 activation, grad_gate.data(), grad_up.data());
    if (!comparable(drawn, {&gate, &up, &grad_y})) return;
    const double linear = 2 * std::sqrt(2 / M_PI), cubic = linear * 0.044715;
    for (int64_t i = 0; i < numel; ++i) {
      const double x = gate[i];
      const bool silu = activation == TUNESMITH_SILU;
      const double inner = silu ? x : x * (linear + cubic * x * x);
      const double inner_slope = silu ? 1 : linear + 3 * cubic * x * x;
      const double active = x * sigmoid(inner), rest = sigmoid(-inner);
      const double slope = sigmoid(inner) * (1 + x * rest * inner_slope);
      // what is off in an exponent counts as far as the sigmoid is neither 0 nor 1; e^87 is the
      // most
      const double unit = (16 + 6 * std::min(std::fabs(inner), 90.0) * rest) * kUnit;
      const double held = std::fabs(x) * 0x1p-125;
      const double off_active = std::fabs(active) * unit + held;
      check_close("y", i, y[i], active * up[i],
                  (off_active + drawn.lost(active)) * std::fabs(up[i]) * (1 + kUnit), drawn.dtype);
      check_close("grad_up", i, grad_up[i], active * grad_y[i],
                  (off_active + drawn.lost(active)) * std::fabs(grad_y[i]) * (1 + kUnit),
                  drawn.dtype);
      const double inflow = grad_y[i] * up[i];
      const double slope_size = sigmoid(inner) * (1 + std::fabs(x) * rest * inner_slope);
      const double off_slope = slope_size * 3 * unit + held * (1 + inner_slope);
      check_close(
          "grad_gate", i, grad_gate[i], inflow * slope,
          std::fabs(inflow) * off_slope + drawn.lost(inflow) * (std::fabs(slope) + off_slope),
          drawn.dtype);
    }
  });
}

void rotary(Input& input) {
  const Drawn drawn(input);
  const int64_t tokens = input.up_to(12), heads = input.up_to(5), half = input.up_to(70);
  const int64_t size = 2 * half, misaligned = input.up_to(3);
  const int64_t positions = input.one_in(2) ? tokens : input.up_to(12) + 1;
  const bool backward = input.one_in(2);
  const Tensor x = drawn.tensor(input, tokens * heads * size);
  const Tensor cos = drawn.tensor(input, positions * size),
               sin = drawn.tensor(input, positions * size);

  fuzz::with_every_isa([&] {
    const Tensor out(drawn.dtype, x.count(), misaligned);
    tunesmith_rotary_cpu(x.data(), cos.data(), sin.data(), drawn.dtype, tokens, positions, heads,
                         size, backward, out.data());
    if (!comparable(drawn, {&x, &cos, &sin})) return;
    for (int64_t at = 0; at < x.count(); ++at) {
      const int64_t i = at % size, angle = at / (heads * size) % positions * size;
      const int64_t j = i < half ? i + half : i - half;  // its partner
      const double sign = (i < half) == backward ? 1 : -1;
      const double own = x[at] * cos[angle + i];
      const double other = sign * x[at - i + j] * sin[angle + (backward ? j : i)];
      check_close("out", at, out[at], own + other,
                  drawn.lost(own) + drawn.lost(other) + kUnit * (std::fabs(own) + std::fabs(other)),
                  drawn.dtype);
    }
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  fuzz::use_threads(input.byte());
  switch (input.byte() % 3) {
    case 0: norm(input); break;
    case 1: gated(input); break;
    default: rotary(input);
  }
  return 0;
}
