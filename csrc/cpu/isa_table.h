// Fills in the table of isa.h: what every instruction set has in common is the plain C++ of the
// headers below, compiled with the flags of the file that includes this.
#pragma once

#include "elementwise.h"
#include "isa.h"
#include "softmax.h"

namespace tunesmith {
namespace {

// Known at compile time: nothing of an instruction set may run before somebody has asked for it.
constexpr Isa make_isa(const char* name, decltype(Isa::quantize) quantize,
                       decltype(Isa::dequantize) dequantize, decltype(Isa::multiply) multiply) {
  Isa isa = {};
  isa.name = name;
  isa.quantize = quantize;
  isa.dequantize = dequantize;
  isa.multiply = multiply;
  isa.softmax_forward = softmax_forward;
  isa.softmax_backward = softmax_backward;
  isa.norm = norm;
  isa.gated = gated;
  isa.rotary = rotary;
  isa.attention_decode = attention_decode;
  isa.logps = logps;
  return isa;
}

}  // namespace
}  // namespace tunesmith
