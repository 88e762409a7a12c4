// dequantize_4bit: the bits of a plain loop, on every instruction set.
#include <vector>

#include "../../../csrc/four_bit.h"
#include "check.h"
#include "input.h"
#include "memory.h"
#include "scales.h"

using fuzz::Input;
using fuzz::Tensor;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  fuzz::use_threads(input.byte());
  const unsigned chance = input.byte();
  int64_t numel = input.up_to(chance < 180 ? 200 : chance < 250 ? 513 : 9000);
  // one of a few hundred is so large that two threads share it
  if (chance == 255 && input.byte() < 128) numel += 1 << 16;
  const int64_t blocksize = input.blocksize();
  const int type = input.type_4bit(), dtype = input.dtype();
  const auto packed =
      Tensor(Tensor::kBytes, (numel + 1) / 2, input.up_to(3)).fill(input.random(), fuzz::kTame);
  const fuzz::Scales scales(input, numel, blocksize, input.kind());
  const int64_t misaligned = input.up_to(3);
  const tunesmith::FourBitTable table =
      type == TUNESMITH_NF4 ? tunesmith::make_nf4_table() : tunesmith::make_fp4_table();

  std::vector<double> expected(numel);
  for (int64_t i = 0; i < numel; ++i) {
    const unsigned code = packed.bytes()[i / 2] >> (i % 2 == 0 ? 4 : 0) & 0xF;
    const double product = double(table.values[code]) * scales[i / blocksize];  // exact
    // a zero has no sign
    expected[i] = fuzz::rounded(fuzz::rounded(product, TUNESMITH_FLOAT32) + 0.0, dtype);
  }
  fuzz::with_every_isa([&] {
    const Tensor out(dtype, numel, misaligned);
    tunesmith_dequantize_4bit_cpu(packed.bytes(), scales.absmax(), scales.nested_absmax(),
                                  scales.nested_offset(), numel, blocksize, type, dtype,
                                  out.data());
    for (int64_t i = 0; i < numel; ++i) {
      if (!fuzz::same(out[i], expected[i])) {
        fuzz::fail("element %lld of %lld is %a, not %a", static_cast<long long>(i),
                   static_cast<long long>(numel), out[i], expected[i]);
      }
    }
  });
  return 0;
}
