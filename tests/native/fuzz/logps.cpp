// Log-probabilities of labels, and their derivatives by the logits, against their formula.
#include <algorithm>
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
  const bool wide = input.one_in(8);  // more than are summed at once
  const int64_t rows = wide ? input.up_to(3) : input.up_to(12);
  const int64_t columns = 1 + (wide ? input.up_to(5000) : input.up_to(100));
  const auto lift = unsigned(input.up_to(8));
  const fuzz::Kind kind = input.kind();
  const bool gradients = input.one_in(2);
  const Tensor logits =
      Tensor(dtype, rows * columns, input.up_to(3)).fill(input.random(), kind, lift);
  std::vector<int64_t> labels(static_cast<size_t>(rows));
  fuzz::Random random = input.random();
  for (int64_t& label : labels) label = int64_t(random.bits() % uint64_t(columns));

  fuzz::with_every_isa([&] {
    const Tensor changed = logits, logps(TUNESMITH_FLOAT32, rows);
    tunesmith_logps_cpu(changed.data(), labels.data(), dtype, rows, columns, gradients,
                        logps.floats());
    if (!gradients) {
      for (int64_t i = 0; i < logits.count(); ++i) {
        if (!fuzz::same(changed[i], logits[i])) fuzz::fail("logit %lld changed", (long long)i);
      }
    }
    if (!(fuzz::largest({&logits}) < 1e30)) return;
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t begin = row * columns;
      double most = -INFINITY, sum = 0, spread = 0;
      for (int64_t i = 0; i < columns; ++i) most = std::max(most, logits[begin + i]);
      for (int64_t i = 0; i < columns; ++i) {
        sum += std::exp(logits[begin + i] - most);
        // what is off in an exponent is its part of the whole that is off
        const double below = most - logits[begin + i];
        spread += std::exp(-below) * std::min(below, 90.0);
      }
      // sums of at most 1024, an exponential within 4 units, and e^-87 for all that is less
      const double off =
          double(std::min<int64_t>(columns, 1024) + 16 + int64_t(spread / sum)) * kUnit +
          double(columns) * 0x1p-125;
      const int64_t label = labels[size_t(row)];
      const double exact = logits[begin + label] - most - std::log(sum);
      fuzz::check_close("logps", row, logps[row], exact,
                        off + 2 * kUnit * (std::fabs(exact) + std::log(sum)), TUNESMITH_FLOAT32);
      for (int64_t i = 0; gradients && i < columns; ++i) {
        const double below = most - logits[begin + i] + std::log(sum);
        const double p = std::exp(-below);
        const double slack = p * (off + 16 * kUnit + 3 * kUnit * below) + 0x1p-124;
        const double one = i == label ? 1 : 0;
        fuzz::check_close("slope", i, changed[begin + i], one - p, slack + one * kUnit, dtype);
      }
    }
  });
  return 0;
}
