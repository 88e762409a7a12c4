// What the files of this folder share: pointers from Python, streams, and calling the CPU's
// function or CUDA's. `_native.pyi` documents what they register.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../kernels.h"

namespace tunesmith {

namespace py = pybind11;
using namespace py::literals;

// An address, an int to Python; it becomes a pointer of whatever type is asked for.
struct Pointer {
  uintptr_t address = 0;

  template <typename T>
  operator T*() const {
    return reinterpret_cast<T*>(address);
  }
};

// None: the CPU.
using Stream = std::optional<uintptr_t>;

using Unlocked = py::call_guard<py::gil_scoped_release>;

// Calls the CPU's function, or with a stream CUDA's, which takes it after the same arguments and
// returns null or an error. In a build without CUDA that function is nullptr.
template <typename Cpu, typename Cuda, typename... Args>
void call(const Stream& stream, Cpu cpu, [[maybe_unused]] Cuda cuda, Args... args) {
  if (!stream) return static_cast<void>(cpu(args...));
  if constexpr (std::is_same_v<Cuda, std::nullptr_t>) {
    throw std::runtime_error("this build has no CUDA kernels");
  } else {
    const char* const error = cuda(args..., reinterpret_cast<void*>(*stream));
    if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
  }
}

#ifdef TUNESMITH_CUDA
#define TUNESMITH_ON_CUDA(op) tunesmith_##op##_cuda
#else
#define TUNESMITH_ON_CUDA(op) nullptr
#endif
#define TUNESMITH_EITHER(op) tunesmith_##op##_cpu, TUNESMITH_ON_CUDA(op)

void bind_four_bit(py::module_& m);
void bind_linear(py::module_& m);
void bind_attention(py::module_& m);
void bind_elementwise(py::module_& m);
void bind_layers(py::module_& m);
void bind_runtime(py::module_& m);

}  // namespace tunesmith

template <>
struct pybind11::detail::type_caster<tunesmith::Pointer> {
  PYBIND11_TYPE_CASTER(tunesmith::Pointer, const_name("int"));

  bool load(handle from, bool convert) {
    make_caster<uintptr_t> address;
    if (!address.load(from, convert)) return false;
    value.address = cast_op<uintptr_t>(address);
    return true;
  }
};
