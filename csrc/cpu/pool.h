// Memory that is used again, so that its pages are touched once and not at every call.
#pragma once

#include <cstddef>

#include "../kernels.h"

namespace tunesmith {

// Memory of the calling thread's own, or from the pool where that does not suffice.
void* take_scratch(size_t nbytes);
void give_back_scratch(void* memory, size_t nbytes);

// Such memory for as long as this lives, in the thread that has made it.
class Scratch {
 public:
  explicit Scratch(size_t nbytes) : memory_(take_scratch(nbytes)), nbytes_(nbytes) {}
  ~Scratch() { give_back_scratch(memory_, nbytes_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename T>
  T* as() const {
    return static_cast<T*>(memory_);
  }

 private:
  void* memory_;
  size_t nbytes_;
};

}  // namespace tunesmith
