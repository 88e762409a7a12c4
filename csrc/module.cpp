// Registers the kernels with Python; the only file that knows Python. `_native.pyi` documents it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "nf4.h"

namespace py = pybind11;
using namespace tunesmith;

namespace {

constexpr Nf4Table kNf4 = make_nf4_table();
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

void quantize_nf4(Pointer weight, int dtype, int64_t numel, int64_t blocksize, Pointer packed,
                  Pointer absmax, Stream stream) {
  if (stream) {
    ON_STREAM(quantize_nf4, at<void>(weight), dtype, numel, blocksize, at<uint8_t>(packed),
              at<float>(absmax));
  } else {
    tunesmith_quantize_nf4_cpu(at<void>(weight), dtype, numel, blocksize, at<uint8_t>(packed),
                               at<float>(absmax));
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

void dequantize_nf4(Pointer packed, Pointer absmax, Pointer nested_absmax, Pointer nested_offset,
                    int64_t numel, int64_t blocksize, int dtype, Pointer out, Stream stream) {
  if (stream) {
    ON_STREAM(dequantize_nf4, at<uint8_t>(packed), at<void>(absmax), at<float>(nested_absmax),
              at<float>(nested_offset), numel, blocksize, dtype, at<void>(out));
  } else {
    tunesmith_dequantize_nf4_cpu(at<uint8_t>(packed), at<void>(absmax), at<float>(nested_absmax),
                                 at<float>(nested_offset), numel, blocksize, dtype, at<void>(out));
  }
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

  using Unlocked = py::call_guard<py::gil_scoped_release>;
  m.def("quantize_nf4", quantize_nf4, py::arg("weight"), py::arg("dtype"), py::arg("numel"),
        py::arg("blocksize"), py::arg("packed"), py::arg("absmax"), py::arg("stream"), Unlocked());
  m.def("quantize_absmax", quantize_absmax, py::arg("absmax"), py::arg("blocks"),
        py::arg("nested_offset"), py::arg("codes"), py::arg("nested_absmax"), py::arg("stream"),
        Unlocked());
  m.def("dequantize_nf4", dequantize_nf4, py::arg("packed"), py::arg("absmax"),
        py::arg("nested_absmax"), py::arg("nested_offset"), py::arg("numel"), py::arg("blocksize"),
        py::arg("dtype"), py::arg("out"), py::arg("stream"), Unlocked());

  m.def("isa", tunesmith_isa);
  m.def("isas", isas);
  m.def("set_isa", set_isa, py::arg("name"));
  m.def("has_openmp", tunesmith_has_openmp);
  m.def("has_cuda", [] { return kCuda; });

  m.def("float16_to_float32", float16_to_float, py::arg("bits"));
  m.def("float32_to_float16", float_to_float16, py::arg("value"));
  m.def("bfloat16_to_float32", bfloat16_to_float, py::arg("bits"));
  m.def("float32_to_bfloat16", float_to_bfloat16, py::arg("value"));
  m.def("nf4_encode", [](float scaled) { return encode_nf4(scaled, kNf4); }, py::arg("scaled"));
  m.def("nf4_decode", [](unsigned code) { return kNf4.values[code & 15u]; }, py::arg("code"));
  m.def("dynamic_encode", [](float scaled) { return encode_dynamic(scaled, kDynamic); },
        py::arg("scaled"));
  m.def("dynamic_decode", [](unsigned code) { return kDynamic.values[code & 255u]; },
        py::arg("code"));
}
