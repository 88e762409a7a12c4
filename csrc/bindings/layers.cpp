// Whole decoder layers, for training and for generating, and the norm of all gradients.
#include <vector>

#include "bindings.h"

namespace tunesmith {
namespace {

using Norms = std::vector<tunesmith_norm>;
using Linears = std::vector<tunesmith_linear>;

tunesmith_norm make_norm(Pointer weight, float eps, bool from_one) {
  return {weight, eps, from_one};
}

// What both kinds of layer are made of: norms before attention, of queries, of keys and before the
// MLP; linear layers of query, key, value, output, gate, up and down.
template <typename Layer>
Layer make_layer(int dtype, const Norms& norms, const Linears& linears, int64_t head_size,
                 float scale, int activation) {
  Layer layer = {};
  layer.dtype = dtype;
  layer.attention_norm = norms.at(0);
  layer.query_norm = norms.at(1);
  layer.key_norm = norms.at(2);
  layer.mlp_norm = norms.at(3);
  layer.query = linears.at(0);
  layer.key = linears.at(1);
  layer.value = linears.at(2);
  layer.output = linears.at(3);
  layer.gate = linears.at(4);
  layer.up = linears.at(5);
  layer.down = linears.at(6);
  layer.head_size = head_size;
  layer.scale = scale;
  layer.activation = activation;
  return layer;
}

tunesmith_decode_layer make_decode_layer(int dtype, int64_t rows, const Norms& norms,
                                         const Linears& linears, int64_t head_size, float scale,
                                         int activation, Pointer keys, Pointer values,
                                         int64_t capacity) {
  auto layer =
      make_layer<tunesmith_decode_layer>(dtype, norms, linears, head_size, scale, activation);
  layer.rows = rows;
  layer.keys = keys;
  layer.values = values;
  layer.capacity = capacity;
  return layer;
}

void decode_layers(const std::vector<const tunesmith_decode_layer*>& layers, Pointer x, Pointer cos,
                   Pointer sin, Pointer first, int64_t position) {
  for (const auto* layer : layers) tunesmith_decode_layer_cpu(layer, x, cos, sin, first, position);
}

tunesmith_decoder_layer for_tokens(tunesmith_decoder_layer layer, int64_t rows, int64_t tokens,
                                   Pointer cos, Pointer sin, int64_t positions, Pointer segments,
                                   int64_t segment_count) {
  layer.rows = rows;
  layer.tokens = tokens;
  for (auto* linear : {&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate,
                       &layer.up, &layer.down}) {
    linear->tokens = rows * tokens;
  }
  layer.cos = cos;
  layer.sin = sin;
  layer.positions = positions;
  layer.segments = segments;
  layer.segment_count = segment_count;
  return layer;
}

void decoder_layer(const tunesmith_decoder_layer& layer, Pointer x, Pointer activations,
                   Pointer out) {
  tunesmith_decoder_layer_cpu(&layer, x, activations, out);
}

void decoder_layer_backward(const tunesmith_decoder_layer& layer, Pointer x, Pointer activations,
                            Pointer grad_out, Pointer grad_x, const std::vector<Pointer>& grads) {
  void* grad_adapters[14] = {};
  for (size_t i = 0; i < 14; ++i) grad_adapters[i] = grads.at(i);
  tunesmith_decoder_layer_backward_cpu(&layer, x, activations, grad_out, grad_x, grad_adapters);
}

float clip_norm(const std::vector<Pointer>& tensors, const std::vector<int64_t>& numels, int dtype,
                float max_norm) {
  if (tensors.size() != numels.size()) {
    throw std::runtime_error("clip_norm: as many tensors as numels");
  }
  std::vector<void*> data(tensors.begin(), tensors.end());
  return tunesmith_clip_norm_cpu(data.data(), numels.data(), int64_t(data.size()), dtype, max_norm);
}

}  // namespace

void bind_layers(py::module_& m) {
  py::class_<tunesmith_norm>(m, "Norm", py::module_local())
      .def(py::init(&make_norm), "weight"_a, "eps"_a, "from_one"_a);
  py::class_<tunesmith_decode_layer>(m, "DecodeLayer", py::module_local())
      .def(py::init(&make_decode_layer), "dtype"_a, "rows"_a, "norms"_a, "linears"_a, "head_size"_a,
           "scale"_a, "activation"_a, "keys"_a, "values"_a, "capacity"_a);
  m.def("decode_layers", decode_layers, "layers"_a, "x"_a, "cos"_a, "sin"_a, "first"_a,
        "position"_a, Unlocked());
  py::class_<tunesmith_decoder_layer>(m, "DecoderLayer", py::module_local())
      .def(py::init(&make_layer<tunesmith_decoder_layer>), "dtype"_a, "norms"_a, "linears"_a,
           "head_size"_a, "scale"_a, "activation"_a)
      .def("for_tokens", &for_tokens, "rows"_a, "tokens"_a, "cos"_a, "sin"_a, "positions"_a,
           "segments"_a, "segment_count"_a)
      .def_property_readonly("activation_bytes", &tunesmith_decoder_layer_activation_bytes);
  m.def("decoder_layer", decoder_layer, "layer"_a, "x"_a, "activations"_a, "out"_a, Unlocked());
  m.def("decoder_layer_backward", decoder_layer_backward, "layer"_a, "x"_a, "activations"_a,
        "grad_out"_a, "grad_x"_a, "grads"_a, Unlocked());
  m.def("clip_norm", clip_norm, "tensors"_a, "numels"_a, "dtype"_a, "max_norm"_a, Unlocked());
}

}  // namespace tunesmith
