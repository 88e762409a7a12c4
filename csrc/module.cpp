// Registers the kernels with Python; the only file that knows Python. `_native.pyi` documents it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "nf4.h"

namespace py = pybind11;
using namespace tunesmith;

namespace {

constexpr FourBitTable kNf4 = make_nf4_table();
constexpr FourBitTable kFp4 = make_fp4_table();
constexpr DynamicTable kDynamic = make_dynamic_table();

using Pointer = uintptr_t;
using Stream = std::optional<uintptr_t>;  // none: the CPU

template <typename T>
T* at(Pointer pointer) {
  return reinterpret_cast<T*>(pointer);
}

#ifdef TUNESMITH_CUDA
constexpr bool kCuda = true;
#define ON_STREAM(op, ...) \
  check(tunesmith_##op##_cuda(__VA_ARGS__, reinterpret_cast<void*>(*stream)))
void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
}
#else
constexpr bool kCuda = false;
#define ON_STREAM(op, ...) throw std::runtime_error("this build has no CUDA kernels")
#endif

void quantize_4bit(Pointer weight, int dtype, int64_t numel, int64_t blocksize, int type,
                   Pointer packed, Pointer absmax, Stream stream) {
  if (stream) {
    ON_STREAM(quantize_4bit, at<void>(weight), dtype, numel, blocksize, type, at<uint8_t>(packed),
              at<float>(absmax));
  } else {
    tunesmith_quantize_4bit_cpu(at<void>(weight), dtype, numel, blocksize, type,
                                at<uint8_t>(packed), at<float>(absmax));
  }
}

void quantize_absmax(Pointer absmax, int64_t blocks, Pointer nested_offset, Pointer codes,
                     Pointer nested_absmax, Stream stream) {
  if (stream) {
    ON_STREAM(quantize_absmax, at<float>(absmax), blocks, at<float>(nested_offset),
              at<uint8_t>(codes), at<float>(nested_absmax));
  } else {
    tunesmith_quantize_absmax_cpu(at<float>(absmax), blocks, at<float>(nested_offset),
                                  at<uint8_t>(codes), at<float>(nested_absmax));
  }
}

void dequantize_4bit(Pointer packed, Pointer absmax, Pointer nested_absmax, Pointer nested_offset,
                     int64_t numel, int64_t blocksize, int type, int dtype, Pointer out,
                     Stream stream) {
  if (stream) {
    ON_STREAM(dequantize_4bit, at<uint8_t>(packed), at<void>(absmax), at<float>(nested_absmax),
              at<float>(nested_offset), numel, blocksize, type, dtype, at<void>(out));
  } else {
    tunesmith_dequantize_4bit_cpu(at<uint8_t>(packed), at<void>(absmax), at<float>(nested_absmax),
                                  at<float>(nested_offset), numel, blocksize, type, dtype,
                                  at<void>(out));
  }
}

tunesmith_linear make_linear(int64_t tokens, int64_t in_features, int64_t out_features, int dtype,
                             int type, Pointer weight, Pointer absmax, Pointer nested_absmax,
                             Pointer nested_offset, int64_t blocksize, Pointer bias, int64_t rank,
                             int adapter_dtype, Pointer lora_a, Pointer lora_b, float scaling,
                             Pointer keep, float keep_scale) {
  return {tokens,
          in_features,
          out_features,
          dtype,
          type,
          at<void>(weight),
          at<void>(absmax),
          at<float>(nested_absmax),
          at<float>(nested_offset),
          blocksize,
          at<void>(bias),
          rank,
          adapter_dtype,
          at<void>(lora_a),
          at<void>(lora_b),
          scaling,
          at<uint8_t>(keep),
          keep_scale};
}

void linear(const tunesmith_linear& layer, Pointer x, Pointer s, Pointer y, bool accumulate) {
  tunesmith_linear_cpu(&layer, at<void>(x), at<float>(s), at<void>(y), accumulate);
}

void linear_backward(const tunesmith_linear& layer, Pointer x, Pointer s, Pointer grad_y,
                     Pointer grad_x, Pointer grad_a, Pointer grad_b, bool accumulate) {
  tunesmith_linear_backward_cpu(&layer, at<void>(x), at<float>(s), at<void>(grad_y),
                                at<void>(grad_x), at<void>(grad_a), at<void>(grad_b), accumulate);
}

void attention(const std::vector<int64_t>& shape, int dtype, Pointer q, Pointer k, Pointer v,
               float scale, Pointer runs, int64_t run_count, Pointer out, Pointer lse) {
  const tunesmith_attention job = {
      shape.at(0), shape.at(1), shape.at(2), shape.at(3), shape.at(4), dtype, at<void>(q),
      at<void>(k), at<void>(v), nullptr,     nullptr,     nullptr,     scale, at<tunesmith_run>(runs),
      run_count};
  tunesmith_attention_cpu(&job, at<void>(out), at<float>(lse));
}

void attention_backward(const std::vector<int64_t>& shape, int dtype, Pointer q, Pointer k, Pointer v,
                        Pointer out, Pointer grad_out, Pointer lse, float scale, Pointer runs,
                        int64_t run_count, Pointer grad_q, Pointer grad_k, Pointer grad_v) {
  const tunesmith_attention job = {
      shape.at(0),   shape.at(1), shape.at(2),   shape.at(3),       shape.at(4),
      dtype,         at<void>(q), at<void>(k),   at<void>(v),       at<void>(out),
      at<void>(grad_out), at<float>(lse), scale, at<tunesmith_run>(runs), run_count};
  tunesmith_attention_backward_cpu(&job, at<void>(grad_q), at<void>(grad_k), at<void>(grad_v));
}

void attention_decode(Pointer q, Pointer keys, Pointer values, Pointer first, int dtype,
                      int64_t rows, int64_t heads, int64_t key_heads, int64_t size,
                      int64_t capacity, int64_t length, float scale, Pointer out) {
  tunesmith_attention_decode_cpu(at<void>(q), at<void>(keys), at<void>(values), at<int64_t>(first),
                                 dtype, rows, heads, key_heads, size, capacity, length, scale,
                                 at<void>(out));
}

void logps(Pointer logits, Pointer labels, int dtype, int64_t rows, int64_t columns, bool slopes,
           Pointer out, Stream stream) {
  if (stream) {
    ON_STREAM(logps, at<void>(logits), at<int64_t>(labels), dtype, rows, columns, slopes,
              at<float>(out));
  } else {
    tunesmith_logps_cpu(at<void>(logits), at<int64_t>(labels), dtype, rows, columns, slopes,
                        at<float>(out));
  }
}

void rms_norm(Pointer x, Pointer weight, int dtype, int64_t rows, int64_t columns, float eps,
              bool from_one, Pointer y, Pointer scale, Stream stream) {
  if (stream) {
    ON_STREAM(rms_norm, at<void>(x), at<void>(weight), dtype, rows, columns, eps, from_one,
              at<void>(y), at<float>(scale));
  } else {
    tunesmith_rms_norm_cpu(at<void>(x), at<void>(weight), dtype, rows, columns, eps, from_one,
                           at<void>(y), at<float>(scale));
  }
}

void rms_norm_backward(Pointer grad_y, Pointer x, Pointer weight, Pointer scale, int dtype,
                       int64_t rows, int64_t columns, bool from_one, Pointer grad_x,
                       Stream stream) {
  if (stream) {
    ON_STREAM(rms_norm_backward, at<void>(grad_y), at<void>(x), at<void>(weight), at<float>(scale),
              dtype, rows, columns, from_one, at<void>(grad_x));
  } else {
    tunesmith_rms_norm_backward_cpu(at<void>(grad_y), at<void>(x), at<void>(weight),
                                    at<float>(scale), dtype, rows, columns, from_one, nullptr,
                                    at<void>(grad_x));
  }
}

void gated(Pointer gate, Pointer up, int dtype, int64_t numel, int activation, Pointer y,
           Stream stream) {
  if (stream) {
    ON_STREAM(gated, at<void>(gate), at<void>(up), dtype, numel, activation, at<void>(y));
  } else {
    tunesmith_gated_cpu(at<void>(gate), at<void>(up), dtype, numel, activation, at<void>(y));
  }
}

void gated_backward(Pointer grad_y, Pointer gate, Pointer up, int dtype, int64_t numel,
                    int activation, Pointer grad_gate, Pointer grad_up, Stream stream) {
  if (stream) {
    ON_STREAM(gated_backward, at<void>(grad_y), at<void>(gate), at<void>(up), dtype, numel,
              activation, at<void>(grad_gate), at<void>(grad_up));
  } else {
    tunesmith_gated_backward_cpu(at<void>(grad_y), at<void>(gate), at<void>(up), dtype, numel,
                                 activation, at<void>(grad_gate), at<void>(grad_up));
  }
}

void rotary(Pointer x, Pointer cos, Pointer sin, int dtype, int64_t tokens, int64_t positions,
            int64_t heads, int64_t size, bool backward, Pointer out, Stream stream) {
  if (stream) {
    ON_STREAM(rotary, at<void>(x), at<void>(cos), at<void>(sin), dtype, tokens, positions, heads,
              size, backward, at<void>(out));
  } else {
    tunesmith_rotary_cpu(at<void>(x), at<void>(cos), at<void>(sin), dtype, tokens, positions, heads,
                         size, backward, at<void>(out));
  }
}

tunesmith_norm make_norm(Pointer weight, float eps, bool from_one) {
  return {at<void>(weight), eps, from_one};
}

tunesmith_decode_layer make_decode_layer(int dtype, int64_t rows, const std::vector<tunesmith_norm>& norms,
                                         const std::vector<tunesmith_linear>& linears, int64_t size,
                                         float scale, int activation, Pointer keys, Pointer values,
                                         int64_t capacity) {
  return {dtype,         rows,          norms.at(0),   norms.at(1),      norms.at(2),
          norms.at(3),   linears.at(0), linears.at(1), linears.at(2),    linears.at(3),
          linears.at(4), linears.at(5), linears.at(6), size,             scale,
          activation,    at<void>(keys), at<void>(values), capacity};
}

void decode_layers(const std::vector<const tunesmith_decode_layer*>& layers, Pointer x, Pointer cos,
                   Pointer sin, Pointer first, int64_t token) {
  for (const auto* layer : layers) {
    tunesmith_decode_layer_cpu(layer, at<void>(x), at<void>(cos), at<void>(sin), at<int64_t>(first),
                               token);
  }
}

// One of no tokens yet.
tunesmith_decoder_layer make_decoder_layer(int dtype, const std::vector<tunesmith_norm>& norms,
                                           const std::vector<tunesmith_linear>& linears, int64_t size,
                                           float scale, int activation) {
  return {dtype,         0,             0,             norms.at(0),   norms.at(1),
          norms.at(2),   norms.at(3),   linears.at(0), linears.at(1), linears.at(2),
          linears.at(3), linears.at(4), linears.at(5), linears.at(6), size,
          scale,         activation,    nullptr,       nullptr,       0,
          nullptr,       0};
}

tunesmith_decoder_layer on_tokens(tunesmith_decoder_layer layer, int64_t rows, int64_t tokens, Pointer cos,
                                  Pointer sin, int64_t positions, Pointer runs, int64_t run_count) {
  layer.rows = rows;
  layer.tokens = tokens;
  for (auto* linear : {&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate, &layer.up,
                       &layer.down}) {
    linear->tokens = rows * tokens;
  }
  layer.cos = at<void>(cos);
  layer.sin = at<void>(sin);
  layer.positions = positions;
  layer.runs = at<tunesmith_run>(runs);
  layer.run_count = run_count;
  return layer;
}

void decoder_layer(const tunesmith_decoder_layer& layer, Pointer x, Pointer kept, Pointer out) {
  tunesmith_decoder_layer_cpu(&layer, at<void>(x), at<void>(kept), at<void>(out));
}

void decoder_layer_backward(const tunesmith_decoder_layer& layer, Pointer x, Pointer kept,
                            Pointer grad_out, Pointer grad_x, const std::vector<Pointer>& grads) {
  void* grad_adapters[14] = {};
  for (size_t i = 0; i < 14; ++i) grad_adapters[i] = at<void>(grads.at(i));
  tunesmith_decoder_layer_backward_cpu(&layer, at<void>(x), at<void>(kept), at<void>(grad_out),
                                       at<void>(grad_x), grad_adapters);
}

float clip_norm(const std::vector<Pointer>& tensors, const std::vector<int64_t>& numels, int dtype, float most) {
  std::vector<void*> data(tensors.size());
  for (size_t i = 0; i < data.size(); ++i) data[i] = at<void>(tensors[i]);
  if (data.size() != numels.size()) throw std::runtime_error("clip_norm: as many tensors as numels");
  return tunesmith_clip_norm_cpu(data.data(), numels.data(), int64_t(data.size()), dtype, most);
}

void linear_small([[maybe_unused]] const tunesmith_linear& layer, [[maybe_unused]] Pointer x,
                  [[maybe_unused]] Pointer s, [[maybe_unused]] Pointer y, Stream stream) {
  if (!stream) throw std::runtime_error("linear_small is for CUDA; call linear");
  ON_STREAM(linear_small, &layer, at<void>(x), at<float>(s), at<void>(y));
}

// A vector of bytes from the pool, as DLPack hands it over: the layout of its version 0, which torch
// takes (https://dmlc.github.io/dlpack/latest/c_api.html).
struct DLTensor {
  void* data;
  struct {
    int32_t type, id;
  } device;
  int32_t ndim;
  struct {
    uint8_t code, bits;
    uint16_t lanes;
  } dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
struct PooledBytes {
  DLManagedTensor managed;
  int64_t size;
};

py::capsule empty(int64_t nbytes) {
  void* memory = nbytes < 0 ? nullptr : tunesmith_take(size_t(nbytes));
  if (memory == nullptr) throw std::bad_alloc();
  auto* bytes = new PooledBytes{};
  bytes->size = nbytes;
  constexpr int32_t kCpu = 1;
  constexpr uint8_t kUnsigned = 1;
  bytes->managed.tensor = {memory, {kCpu, 0}, 1, {kUnsigned, 8, 1}, &bytes->size, nullptr, 0};
  bytes->managed.context = bytes;
  bytes->managed.deleter = [](DLManagedTensor* managed) {
    tunesmith_give_back(managed->tensor.data);
    delete static_cast<PooledBytes*>(managed->context);
  };
  // a consumer renames the capsule and calls the deleter itself; else that is done here
  return py::capsule(&bytes->managed, "dltensor", [](PyObject* capsule) {
    if (!PyCapsule_IsValid(capsule, "dltensor")) return;
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule, "dltensor"));
    managed->deleter(managed);
  });
}

std::vector<std::string> isas() {
  std::vector<std::string> names;
  while (const char* name = tunesmith_isa_at(int(names.size()))) names.emplace_back(name);
  return names;
}

void set_isa(const std::string& name) {
  if (!tunesmith_set_isa(name.c_str())) {
    throw py::value_error("instruction set '" + name + "' is not in isas()");
  }
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The compiled kernels: pointers in, pointers out, nothing checked.";
  m.attr("FLOAT32") = int(TUNESMITH_FLOAT32);
  m.attr("FLOAT16") = int(TUNESMITH_FLOAT16);
  m.attr("BFLOAT16") = int(TUNESMITH_BFLOAT16);
  m.attr("NF4") = int(TUNESMITH_NF4);
  m.attr("FP4") = int(TUNESMITH_FP4);
  m.attr("SILU") = int(TUNESMITH_SILU);
  m.attr("GELU_TANH") = int(TUNESMITH_GELU_TANH);

  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("quantize_4bit", quantize_4bit, py::arg("weight"), py::arg("dtype"), py::arg("numel"),
        py::arg("blocksize"), py::arg("type"), py::arg("packed"), py::arg("absmax"), py::arg("stream"), Unlocked());
  m.def("quantize_absmax", quantize_absmax, py::arg("absmax"), py::arg("blocks"),
        py::arg("nested_offset"), py::arg("codes"), py::arg("nested_absmax"), py::arg("stream"),
        Unlocked());
  m.def("dequantize_4bit", dequantize_4bit, py::arg("packed"), py::arg("absmax"),
        py::arg("nested_absmax"), py::arg("nested_offset"), py::arg("numel"), py::arg("blocksize"),
        py::arg("type"), py::arg("dtype"), py::arg("out"), py::arg("stream"), Unlocked());
  // local, for a process may hold another copy of this module
  py::class_<tunesmith_linear>(m, "Linear", py::module_local())
      .def(py::init(&make_linear), py::arg("tokens"), py::arg("in_features"),
           py::arg("out_features"), py::arg("dtype"), py::arg("type"), py::arg("weight"),
           py::arg("absmax"), py::arg("nested_absmax"), py::arg("nested_offset"),
           py::arg("blocksize"), py::arg("bias"), py::arg("rank"), py::arg("adapter_dtype"),
           py::arg("lora_a"), py::arg("lora_b"), py::arg("scaling"), py::arg("keep"),
           py::arg("keep_scale"));
  m.def("linear", linear, py::arg("layer"), py::arg("x"), py::arg("s"), py::arg("y"),
        py::arg("accumulate"), Unlocked());
  m.def("linear_backward", linear_backward, py::arg("layer"), py::arg("x"), py::arg("s"),
        py::arg("grad_y"), py::arg("grad_x"), py::arg("grad_a"), py::arg("grad_b"),
        py::arg("accumulate"), Unlocked());
  m.def("attention", attention, py::arg("shape"), py::arg("dtype"), py::arg("q"), py::arg("k"),
        py::arg("v"), py::arg("scale"), py::arg("runs"), py::arg("run_count"), py::arg("out"),
        py::arg("lse"), Unlocked());
  m.def("attention_backward", attention_backward, py::arg("shape"), py::arg("dtype"), py::arg("q"),
        py::arg("k"), py::arg("v"), py::arg("out"), py::arg("grad_out"), py::arg("lse"),
        py::arg("scale"), py::arg("runs"), py::arg("run_count"), py::arg("grad_q"),
        py::arg("grad_k"), py::arg("grad_v"), Unlocked());
  m.def("attention_decode", attention_decode, py::arg("q"), py::arg("keys"), py::arg("values"),
        py::arg("first"), py::arg("dtype"), py::arg("rows"), py::arg("heads"),
        py::arg("key_heads"), py::arg("size"), py::arg("capacity"), py::arg("length"),
        py::arg("scale"), py::arg("out"), Unlocked());
  m.def("logps", logps, py::arg("logits"), py::arg("labels"), py::arg("dtype"), py::arg("rows"),
        py::arg("columns"), py::arg("slopes"), py::arg("logps"), py::arg("stream"), Unlocked());
  m.def("rms_norm", rms_norm, py::arg("x"), py::arg("weight"), py::arg("dtype"), py::arg("rows"),
        py::arg("columns"), py::arg("eps"), py::arg("from_one"), py::arg("y"), py::arg("scale"),
        py::arg("stream"), Unlocked());
  m.def("rms_norm_backward", rms_norm_backward, py::arg("grad_y"), py::arg("x"), py::arg("weight"),
        py::arg("scale"), py::arg("dtype"), py::arg("rows"), py::arg("columns"),
        py::arg("from_one"), py::arg("grad_x"), py::arg("stream"), Unlocked());
  m.def("gated", gated, py::arg("gate"), py::arg("up"), py::arg("dtype"), py::arg("numel"),
        py::arg("activation"), py::arg("y"), py::arg("stream"), Unlocked());
  m.def("gated_backward", gated_backward, py::arg("grad_y"), py::arg("gate"), py::arg("up"),
        py::arg("dtype"), py::arg("numel"), py::arg("activation"), py::arg("grad_gate"),
        py::arg("grad_up"), py::arg("stream"), Unlocked());
  m.def("rotary", rotary, py::arg("x"), py::arg("cos"), py::arg("sin"), py::arg("dtype"),
        py::arg("tokens"), py::arg("positions"), py::arg("heads"), py::arg("size"),
        py::arg("backward"), py::arg("out"), py::arg("stream"), Unlocked());
  py::class_<tunesmith_norm>(m, "Norm", py::module_local())
      .def(py::init(&make_norm), py::arg("weight"), py::arg("eps"), py::arg("from_one"));
  py::class_<tunesmith_decode_layer>(m, "DecodeLayer", py::module_local())
      .def(py::init(&make_decode_layer), py::arg("dtype"), py::arg("rows"), py::arg("norms"),
           py::arg("linears"), py::arg("size"), py::arg("scale"), py::arg("activation"),
           py::arg("keys"), py::arg("values"), py::arg("capacity"));
  m.def("decode_layers", decode_layers, py::arg("layers"), py::arg("x"), py::arg("cos"),
        py::arg("sin"), py::arg("first"), py::arg("at"), Unlocked());
  py::class_<tunesmith_decoder_layer>(m, "DecoderLayer", py::module_local())
      .def(py::init(&make_decoder_layer), py::arg("dtype"), py::arg("norms"), py::arg("linears"),
           py::arg("size"), py::arg("scale"), py::arg("activation"))
      .def("on", &on_tokens, py::arg("rows"), py::arg("tokens"), py::arg("cos"), py::arg("sin"),
           py::arg("positions"), py::arg("runs"), py::arg("run_count"))
      .def_property_readonly("kept", &tunesmith_decoder_layer_kept);
  m.def("decoder_layer", decoder_layer, py::arg("layer"), py::arg("x"), py::arg("kept"), py::arg("out"),
        Unlocked());
  m.def("decoder_layer_backward", decoder_layer_backward, py::arg("layer"), py::arg("x"),
        py::arg("kept"), py::arg("grad_out"), py::arg("grad_x"), py::arg("grads"), Unlocked());
  m.def("clip_norm", clip_norm, py::arg("tensors"), py::arg("numels"), py::arg("dtype"), py::arg("most"),
        Unlocked());
  m.def("linear_small", linear_small, py::arg("layer"), py::arg("x"), py::arg("s"), py::arg("y"),
        py::arg("stream"), Unlocked());
  m.def("empty", empty, py::arg("nbytes"));

  m.def("isa", tunesmith_isa);
  m.def("isas", isas);
  m.def("set_isa", set_isa, py::arg("name"));
  m.def("has_openmp", tunesmith_has_openmp);
  m.def("has_cuda", [] { return kCuda; });

  m.def("float16_to_float32", float16_to_float, py::arg("bits"));
  m.def("float32_to_float16", float_to_float16, py::arg("value"));
  m.def("bfloat16_to_float32", bfloat16_to_float, py::arg("bits"));
  m.def("float32_to_bfloat16", float_to_bfloat16, py::arg("value"));
  m.def("nf4_encode", [](float scaled) { return encode_4bit(scaled, kNf4); }, py::arg("scaled"));
  m.def("nf4_decode", [](unsigned code) { return kNf4.values[code & 15u]; }, py::arg("code"));
  m.def("fp4_encode", [](float scaled) { return encode_4bit(scaled, kFp4); }, py::arg("scaled"));
  m.def("fp4_decode", [](unsigned code) { return kFp4.values[code & 15u]; }, py::arg("code"));
  m.def("dynamic_encode", [](float scaled) { return encode_dynamic(scaled, kDynamic); },
        py::arg("scaled"));
  m.def("dynamic_decode", [](unsigned code) { return kDynamic.values[code & 255u]; },
        py::arg("code"));
}
