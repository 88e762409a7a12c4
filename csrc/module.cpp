// Registers the kernels with Python; what each group takes is in bindings/, and in `_native.pyi`.
#include "bindings/bindings.h"

PYBIND11_MODULE(_native, m) {
  m.doc() = "The compiled kernels: pointers in, pointers out, nothing checked.";
  m.attr("FLOAT32") = int(TUNESMITH_FLOAT32);
  m.attr("FLOAT16") = int(TUNESMITH_FLOAT16);
  m.attr("BFLOAT16") = int(TUNESMITH_BFLOAT16);
  m.attr("NF4") = int(TUNESMITH_NF4);
  m.attr("FP4") = int(TUNESMITH_FP4);
  m.attr("SILU") = int(TUNESMITH_SILU);
  m.attr("GELU_TANH") = int(TUNESMITH_GELU_TANH);
  tunesmith::bind_four_bit(m);
  tunesmith::bind_linear(m);
  tunesmith::bind_attention(m);
  tunesmith::bind_elementwise(m);
  tunesmith::bind_layers(m);
  tunesmith::bind_runtime(m);
}
