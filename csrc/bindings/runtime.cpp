// What is no arithmetic: instruction sets, and memory that is used again.
#include <new>
#include <vector>

#include "bindings.h"

namespace tunesmith {
namespace {

#ifdef TUNESMITH_CUDA
constexpr bool kCuda = true;
#else
constexpr bool kCuda = false;
#endif

// A vector of bytes from the pool, as DLPack hands it over: the layout of its version 0, which
// torch takes (https://dmlc.github.io/dlpack/latest/c_api.html).
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

void bind_runtime(py::module_& m) {
  m.def("empty", empty, "nbytes"_a);
  m.def("isa", tunesmith_isa);
  m.def("isas", isas);
  m.def("set_isa", set_isa, "name"_a);
  m.def("has_openmp", tunesmith_has_openmp);
  m.def("has_cuda", [] { return kCuda; });
}

}  // namespace tunesmith
