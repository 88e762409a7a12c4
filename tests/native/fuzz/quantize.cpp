// quantize_4bit and quantize_absmax: the bits of a plain loop, on every instruction set.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../../../csrc/four_bit.h"
#include "check.h"
#include "input.h"
#include "memory.h"

using fuzz::Input;
using fuzz::Kind;
using fuzz::Tensor;

namespace {

// One of a few hundred is so large that two threads share it.
int64_t count_of(Input& input) {
  const unsigned chance = input.byte();
  if (chance == 255 && input.byte() < 128) return (1 << 16) + input.up_to(1 << 13);
  return input.up_to(chance < 180 ? 200 : chance < 250 ? 513 : 9000);
}

// Numbers at which the code changes, or right beside.
void put_on_midpoints(const Tensor& weight, int64_t blocksize, const tunesmith::FourBitTable& table,
                      fuzz::Random random) {
  for (int64_t i = 0; i < weight.count(); ++i) {
    const float midpoint = table.midpoints[random.bits() % 15];
    const float beside[] = {midpoint, std::nextafter(midpoint, 2.0f),
                            std::nextafter(midpoint, -2.0f)};
    weight.floats()[i] = i % blocksize == 0 ? 1.0f : beside[random.bits() % 3];
  }
}

void quantize_4bit(Input& input) {
  const int64_t numel = count_of(input), blocksize = input.blocksize();
  const int dtype = input.dtype(), type = input.type_4bit();
  const tunesmith::FourBitTable table =
      type == TUNESMITH_NF4 ? tunesmith::make_nf4_table() : tunesmith::make_fp4_table();
  const auto weight = Tensor(dtype, numel, input.up_to(3)).fill(input.random(), input.kind());
  if (dtype == TUNESMITH_FLOAT32 && input.one_in(3)) {
    put_on_midpoints(weight, blocksize, table, input.random());
  }
  const int64_t blocks = (numel + blocksize - 1) / blocksize;
  const int64_t misaligned = input.up_to(3);

  std::vector<float> absmax(blocks, 0.0f);
  std::vector<unsigned> codes(numel + numel % 2, table.zero);
  for (int64_t i = 0; i < numel; ++i) {
    float& largest = absmax[i / blocksize];
    const auto magnitude = float(std::fabs(weight[i]));
    // whichever of NaN and Inf it is
    if (!std::isfinite(magnitude)) largest = INFINITY;
    largest = std::max(largest, magnitude);
  }
  for (int64_t i = 0; i < numel; ++i) {
    // in fp32: the codes hang on its roundings
    const float inverse = 1.0f / std::max(absmax[i / blocksize], 1e-38f);
    const float scaled = float(weight[i]) * inverse;
    unsigned rank = 0;
    for (int r = 0; r < 15; ++r) {
      const float low = table.values[table.codes[r]], high = table.values[table.codes[r + 1]];
      if (scaled > (low + high) / 2.0f) rank = r + 1;
    }
    codes[i] = table.codes[rank];
  }

  fuzz::with_every_isa([&] {
    const Tensor packed(Tensor::kBytes, (numel + 1) / 2, misaligned);
    const Tensor scales(TUNESMITH_FLOAT32, blocks, misaligned);
    tunesmith_quantize_4bit_cpu(weight.data(), dtype, numel, blocksize, type, packed.bytes(),
                                scales.floats());
    for (int64_t b = 0; b < blocks; ++b) {
      const bool finite = std::isfinite(absmax[b]);
      if (finite ? scales.floats()[b] != absmax[b] : std::isfinite(scales.floats()[b])) {
        fuzz::fail("absmax[%lld] is %g, not %g", static_cast<long long>(b), scales[b], absmax[b]);
      }
    }
    for (int64_t i = 0; i < packed.count(); ++i) {
      if (!std::isfinite(absmax[2 * i / blocksize])) continue;
      const unsigned pair = codes[2 * i] << 4 | codes[2 * i + 1];
      if (packed.bytes()[i] != pair) {
        fuzz::fail("byte %lld of %lld is %02x, not %02x", static_cast<long long>(i),
                   static_cast<long long>(packed.count()), packed.bytes()[i], pair);
      }
    }
  });
}

void quantize_absmax(Input& input) {
  const int64_t blocks = input.up_to(input.one_in(8) ? 6000 : 600);
  const auto absmax =
      Tensor(TUNESMITH_FLOAT32, blocks, input.up_to(3)).fill(input.random(), input.kind());
  const auto offset = Tensor(TUNESMITH_FLOAT32, 1).fill(input.random(), input.kind());
  const int64_t misaligned = input.up_to(3), groups = (blocks + 255) / 256;
  const tunesmith::DynamicTable table = tunesmith::make_dynamic_table();

  const Tensor codes(Tensor::kBytes, blocks, misaligned);
  const Tensor nested(TUNESMITH_FLOAT32, groups, misaligned);
  ++fuzz::executions;
  tunesmith_quantize_absmax_cpu(absmax.floats(), blocks, offset.floats(), codes.bytes(),
                                nested.floats());
  for (int64_t first = 0; first < blocks; first += 256) {
    const int64_t last = std::min<int64_t>(blocks, first + 256);
    float largest = 0.0f;
    bool finite = true;
    for (int64_t i = first; i < last; ++i) {
      const float value = absmax.floats()[i] - offset.floats()[0];
      finite &= std::isfinite(value);
      largest = std::max(largest, std::fabs(value));
    }
    if (!finite) continue;
    if (nested.floats()[first / 256] != largest) fuzz::fail("a nested absmax is wrong");
    const float inverse = 1.0f / std::max(largest, 1e-38f);
    for (int64_t i = first; i < last; ++i) {
      const float scaled = (absmax.floats()[i] - offset.floats()[0]) * inverse;
      unsigned code = 0;
      while (code < 255 && scaled > (table.values[code] + table.values[code + 1]) / 2.0f) ++code;
      if (codes.bytes()[i] != code) {
        fuzz::fail("absmax code %lld is %d, not %u", static_cast<long long>(i), codes.bytes()[i],
                   code);
      }
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  fuzz::use_threads(input.byte());
  if (input.one_in(4)) {
    quantize_absmax(input);
  } else {
    quantize_4bit(input);
  }
  return 0;
}
