// Memory that is used again, so that its pages are touched once and not at every call.
#pragma once

#include <cstddef>

#include "../kernels.h"

namespace tunesmith {

// Memory from the pool for as long as this lives.
class Scratch {
 public:
  explicit Scratch(size_t nbytes) : memory_(tunesmith_take(nbytes)) {}
  ~Scratch() { tunesmith_give_back(memory_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_;
};

}  // namespace tunesmith
