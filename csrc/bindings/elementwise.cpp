// What stands between products: norms, gated units, rotary embedding, log-probabilities.
#include "bindings.h"

namespace tunesmith {
namespace {

void logps(Pointer logits, Pointer labels, int dtype, int64_t rows, int64_t columns, bool gradients,
           Pointer out, Stream stream) {
  call(stream, TUNESMITH_EITHER(logps), logits, labels, dtype, rows, columns, gradients, out);
}

void rms_norm(Pointer x, Pointer weight, int dtype, int64_t rows, int64_t columns, float eps,
              bool from_one, Pointer y, Pointer scale, Stream stream) {
  call(stream, TUNESMITH_EITHER(rms_norm), x, weight, dtype, rows, columns, eps, from_one, y,
       scale);
}

void rms_norm_backward(Pointer grad_y, Pointer x, Pointer weight, Pointer scale, int dtype,
                       int64_t rows, int64_t columns, bool from_one, Pointer grad_x,
                       Stream stream) {
  const auto nothing_added = [](auto... args) {
    const auto on_cpu = [](Pointer grad_y, Pointer x, Pointer weight, Pointer scale, int dtype,
                           int64_t rows, int64_t columns, bool from_one, Pointer grad_x) {
      tunesmith_rms_norm_backward_cpu(grad_y, x, weight, scale, dtype, rows, columns, from_one,
                                      nullptr, grad_x);
    };
    on_cpu(args...);
  };
  call(stream, nothing_added, TUNESMITH_ON_CUDA(rms_norm_backward), grad_y, x, weight, scale, dtype,
       rows, columns, from_one, grad_x);
}

void gated(Pointer gate, Pointer up, int dtype, int64_t numel, int activation, Pointer y,
           Stream stream) {
  call(stream, TUNESMITH_EITHER(gated), gate, up, dtype, numel, activation, y);
}

void gated_backward(Pointer grad_y, Pointer gate, Pointer up, int dtype, int64_t numel,
                    int activation, Pointer grad_gate, Pointer grad_up, Stream stream) {
  call(stream, TUNESMITH_EITHER(gated_backward), grad_y, gate, up, dtype, numel, activation,
       grad_gate, grad_up);
}

void rotary(Pointer x, Pointer cos, Pointer sin, int dtype, int64_t tokens, int64_t positions,
            int64_t heads, int64_t head_size, bool backward, Pointer out, Stream stream) {
  call(stream, TUNESMITH_EITHER(rotary), x, cos, sin, dtype, tokens, positions, heads, head_size,
       backward, out);
}

}  // namespace

void bind_elementwise(py::module_& m) {
  m.def("logps", logps, "logits"_a, "labels"_a, "dtype"_a, "rows"_a, "columns"_a, "gradients"_a,
        "logps"_a, "stream"_a, Unlocked());
  m.def("rms_norm", rms_norm, "x"_a, "weight"_a, "dtype"_a, "rows"_a, "columns"_a, "eps"_a,
        "from_one"_a, "y"_a, "scale"_a, "stream"_a, Unlocked());
  m.def("rms_norm_backward", rms_norm_backward, "grad_y"_a, "x"_a, "weight"_a, "scale"_a, "dtype"_a,
        "rows"_a, "columns"_a, "from_one"_a, "grad_x"_a, "stream"_a, Unlocked());
  m.def("gated", gated, "gate"_a, "up"_a, "dtype"_a, "numel"_a, "activation"_a, "y"_a, "stream"_a,
        Unlocked());
  m.def("gated_backward", gated_backward, "grad_y"_a, "gate"_a, "up"_a, "dtype"_a, "numel"_a,
        "activation"_a, "grad_gate"_a, "grad_up"_a, "stream"_a, Unlocked());
  m.def("rotary", rotary, "x"_a, "cos"_a, "sin"_a, "dtype"_a, "tokens"_a, "positions"_a, "heads"_a,
        "head_size"_a, "backward"_a, "out"_a, "stream"_a, Unlocked());
}

}  // namespace tunesmith
