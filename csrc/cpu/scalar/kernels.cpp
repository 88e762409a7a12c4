// The kernels without vector instructions: the baseline, and what others call for a short block.
#include "../../kernels.h"
#include "../../four_bit.h"
#include "../elements.h"
#include "../isa_table.h"

namespace tunesmith {
namespace {

constexpr DynamicTable kDynamic = make_dynamic_table();

template <typename T>
void quantize_blocks(const QuantizeJob& job, int64_t first, int64_t last) {
  const FourBitTable& table = *job.table;
  const auto* weight = static_cast<const typename T::Storage*>(job.weight);
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * job.blocksize;
    const int64_t end = begin + job.blocksize < job.numel ? begin + job.blocksize : job.numel;
    // as integers magnitudes sort alike, and NaN and Inf above the rest: nothing is lost
    uint32_t largest = 0;
    for (int64_t i = begin; i < end; ++i) {
      const uint32_t magnitude = bits_of(T::widen(weight[i])) & 0x7FFFFFFFu;
      largest = magnitude > largest ? magnitude : largest;
    }
    const float absmax = float_of(largest);
    const float inverse = inverse_of(absmax);
    job.absmax[block] = absmax;
    for (int64_t i = begin; i < end; i += 2) {
      const unsigned high = encode_4bit(T::widen(weight[i]) * inverse, table);
      const unsigned low =
          i + 1 < end ? encode_4bit(T::widen(weight[i + 1]) * inverse, table) : table.zero;
      job.packed[i / 2] = uint8_t(high << 4 | low);
    }
  }
}

template <typename T>
void dequantize_blocks(const DequantizeJob& job, int64_t first, int64_t last) {
  auto* out = static_cast<typename T::Storage*>(job.out);
  for (int64_t block = first; block < last; ++block) {
    const int64_t begin = block * job.blocksize;
    const int64_t end = begin + job.blocksize < job.numel ? begin + job.blocksize : job.numel;
    const float scale = scale_of(block, job.absmax, job.nested_absmax, job.nested_offset, kDynamic);
    typename T::Storage values[16];
    for (int code = 0; code < 16; ++code) {
      values[code] = T::narrow(times_scale(job.table->values[code], scale));
    }
    for (int64_t i = begin; i < end; i += 2) {
      const uint8_t pair = job.packed[i / 2];
      out[i] = values[pair >> 4];
      if (i + 1 < end) out[i + 1] = values[pair & 0xF];
    }
  }
}

void quantize(const QuantizeJob& job, int64_t first, int64_t last) {
  with_element(job.dtype,
               [&](auto element) { quantize_blocks<decltype(element)>(job, first, last); });
}

void dequantize(const DequantizeJob& job, int64_t first, int64_t last) {
  switch (job.dtype) {
    case TUNESMITH_FLOAT32: return dequantize_blocks<Float32Element>(job, first, last);
    case TUNESMITH_FLOAT16: return dequantize_blocks<Float16Element>(job, first, last);
    case TUNESMITH_BFLOAT16: return dequantize_blocks<AnyBFloat16Element>(job, first, last);
  }
}

}  // namespace

void quantize_absmax(const AbsmaxJob& job, int64_t first, int64_t last) {
  for (int64_t group = first; group < last; ++group) {
    const int64_t begin = group * kNestedBlocksize;
    const int64_t end =
        begin + kNestedBlocksize < job.blocks ? begin + kNestedBlocksize : job.blocks;
    float largest = 0.0f;
    for (int64_t i = begin; i < end; ++i) {
      const float value = job.absmax[i] - job.nested_offset;
      const float magnitude = value < 0.0f ? -value : value;
      largest = magnitude > largest ? magnitude : largest;
    }
    const float inverse = inverse_of(largest);
    job.nested_absmax[group] = largest;
    for (int64_t i = begin; i < end; ++i) {
      const float scaled = (job.absmax[i] - job.nested_offset) * inverse;
      job.codes[i] = uint8_t(encode_dynamic(scaled, kDynamic));
    }
  }
}

const Isa scalar_isa = make_isa("scalar", quantize, dequantize, multiply_scalar);

}  // namespace tunesmith
