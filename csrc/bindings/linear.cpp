// The frozen linear layer with an adapter.
#include "bindings.h"

namespace tunesmith {
namespace {

tunesmith_linear make_linear(int64_t tokens, int64_t in_features, int64_t out_features, int dtype,
                             int type, Pointer weight, Pointer absmax, Pointer nested_absmax,
                             Pointer nested_offset, int64_t blocksize, Pointer bias, int64_t rank,
                             int adapter_dtype, Pointer lora_a, Pointer lora_b, float scaling,
                             Pointer keep, float keep_scale) {
  tunesmith_linear layer = {};
  layer.tokens = tokens;
  layer.in_features = in_features;
  layer.out_features = out_features;
  layer.dtype = dtype;
  layer.type = type;
  layer.weight = weight;
  layer.absmax = absmax;
  layer.nested_absmax = nested_absmax;
  layer.nested_offset = nested_offset;
  layer.blocksize = blocksize;
  layer.bias = bias;
  layer.rank = rank;
  layer.adapter_dtype = adapter_dtype;
  layer.lora_a = lora_a;
  layer.lora_b = lora_b;
  layer.scaling = scaling;
  layer.keep = keep;
  layer.keep_scale = keep_scale;
  return layer;
}

void linear(const tunesmith_linear& layer, Pointer x, Pointer s, Pointer y, bool accumulate) {
  tunesmith_linear_cpu(&layer, x, s, y, accumulate);
}

void linear_backward(const tunesmith_linear& layer, Pointer x, Pointer s, Pointer grad_y,
                     Pointer grad_x, Pointer grad_a, Pointer grad_b, bool accumulate) {
  tunesmith_linear_backward_cpu(&layer, x, s, grad_y, grad_x, grad_a, grad_b, accumulate);
}

void linear_small(const tunesmith_linear& layer, Pointer x, Pointer s, Pointer y, Stream stream) {
  const auto not_on_cpu = [](auto...) {
    throw std::runtime_error("linear_small is for CUDA; call linear");
  };
  call(stream, not_on_cpu, TUNESMITH_ON_CUDA(linear_small), &layer, x, s, y);
}

}  // namespace

void bind_linear(py::module_& m) {
  // local, for a process may hold another copy of this module
  py::class_<tunesmith_linear>(m, "Linear", py::module_local())
      .def(py::init(&make_linear), "tokens"_a, "in_features"_a, "out_features"_a, "dtype"_a,
           "type"_a, "weight"_a, "absmax"_a, "nested_absmax"_a, "nested_offset"_a, "blocksize"_a,
           "bias"_a, "rank"_a, "adapter_dtype"_a, "lora_a"_a, "lora_b"_a, "scaling"_a, "keep"_a,
           "keep_scale"_a);
  m.def("linear", linear, "layer"_a, "x"_a, "s"_a, "y"_a, "accumulate"_a, Unlocked());
  m.def("linear_backward", linear_backward, "layer"_a, "x"_a, "s"_a, "grad_y"_a, "grad_x"_a,
        "grad_a"_a, "grad_b"_a, "accumulate"_a, Unlocked());
  m.def("linear_small", linear_small, "layer"_a, "x"_a, "s"_a, "y"_a, "stream"_a, Unlocked());
}

}  // namespace tunesmith
