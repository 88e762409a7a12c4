// Quantizing and dequantizing, and the arithmetic of four_bit.h one number at a time, for tests.
#include "../four_bit.h"

#include "bindings.h"

namespace tunesmith {
namespace {

constexpr FourBitTable kNf4 = make_nf4_table();
constexpr FourBitTable kFp4 = make_fp4_table();
constexpr DynamicTable kDynamic = make_dynamic_table();

void quantize_4bit(Pointer weight, int dtype, int64_t numel, int64_t blocksize, int type,
                   Pointer packed, Pointer absmax, Stream stream) {
  call(stream, TUNESMITH_EITHER(quantize_4bit), weight, dtype, numel, blocksize, type, packed,
       absmax);
}

void quantize_absmax(Pointer absmax, int64_t blocks, Pointer nested_offset, Pointer codes,
                     Pointer nested_absmax, Stream stream) {
  call(stream, TUNESMITH_EITHER(quantize_absmax), absmax, blocks, nested_offset, codes,
       nested_absmax);
}

void dequantize_4bit(Pointer packed, Pointer absmax, Pointer nested_absmax, Pointer nested_offset,
                     int64_t numel, int64_t blocksize, int type, int dtype, Pointer out,
                     Stream stream) {
  call(stream, TUNESMITH_EITHER(dequantize_4bit), packed, absmax, nested_absmax, nested_offset,
       numel, blocksize, type, dtype, out);
}

}  // namespace

void bind_four_bit(py::module_& m) {
  m.def("quantize_4bit", quantize_4bit, "weight"_a, "dtype"_a, "numel"_a, "blocksize"_a, "type"_a,
        "packed"_a, "absmax"_a, "stream"_a, Unlocked());
  m.def("quantize_absmax", quantize_absmax, "absmax"_a, "blocks"_a, "nested_offset"_a, "codes"_a,
        "nested_absmax"_a, "stream"_a, Unlocked());
  m.def("dequantize_4bit", dequantize_4bit, "packed"_a, "absmax"_a, "nested_absmax"_a,
        "nested_offset"_a, "numel"_a, "blocksize"_a, "type"_a, "dtype"_a, "out"_a, "stream"_a,
        Unlocked());

  m.def("float16_to_float32", float16_to_float, "bits"_a);
  m.def("float32_to_float16", float_to_float16, "value"_a);
  m.def("bfloat16_to_float32", bfloat16_to_float, "bits"_a);
  m.def("float32_to_bfloat16", float_to_bfloat16, "value"_a);
  m.def("nf4_code", [](float scaled) { return encode_4bit(scaled, kNf4); }, "scaled"_a);
  m.def("nf4_value", [](unsigned code) { return kNf4.values[code & 15u]; }, "code"_a);
  m.def("fp4_code", [](float scaled) { return encode_4bit(scaled, kFp4); }, "scaled"_a);
  m.def("fp4_value", [](unsigned code) { return kFp4.values[code & 15u]; }, "code"_a);
  m.def("dynamic_code", [](float scaled) { return encode_dynamic(scaled, kDynamic); }, "scaled"_a);
  m.def("dynamic_value", [](unsigned code) { return kDynamic.values[code & 255u]; }, "code"_a);
}

}  // namespace tunesmith
