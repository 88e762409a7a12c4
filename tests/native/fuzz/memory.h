// Tensors that end where their memory ends, so that the sanitizer sees one byte too far.
#pragma once

#include <cstdlib>
#include <utility>

#include "check.h"
#include "input.h"
#include "numbers.h"

namespace fuzz {

class Tensor {
 public:
  // One byte per element if `type` is kBytes; `misaligned` elements beside a multiple of 64 bytes.
  static constexpr int kBytes = -1;

  Tensor(int type, int64_t count, int64_t misaligned = 0)
      : type_(type), count_(count), gap_(size_t(misaligned) * size_of(type)) {
    const size_t nbytes = this->nbytes() + gap_;
    // of none at all a byte would be made: the end of a few is a place without any
    void* memory = nullptr;
    if (posix_memalign(&memory, kAlignment, nbytes == 0 ? kFew : nbytes) != 0) std::abort();
    memory_ = static_cast<uint8_t*>(memory);
    data_ = memory_ + (nbytes == 0 ? kFew : gap_);
    std::memset(memory_, kPattern, gap_);
    std::memset(data_, kPattern, this->nbytes());
  }
  Tensor(const Tensor& other)
      : Tensor(other.type_, other.count_, int64_t(other.gap_ / size_of(other.type_))) {
    std::memcpy(data_, other.data_, nbytes());
  }
  Tensor(Tensor&& other) noexcept
      : type_(other.type_),
        count_(other.count_),
        gap_(other.gap_),
        memory_(other.memory_),
        data_(other.data_) {
    other.memory_ = nullptr;
  }
  Tensor& operator=(const Tensor&) = delete;
  ~Tensor() {
    if (memory_ == nullptr) return;
    for (size_t i = 0; i < gap_; ++i) {
      if (memory_[i] != kPattern) fail("a byte in front of a tensor was written");
    }
    std::free(memory_);
  }

  Tensor&& fill(Random random, Kind kind, unsigned lift = 0) && {
    for (int64_t i = 0; i < count_; ++i) {
      if (type_ == TUNESMITH_FLOAT32) {
        const uint32_t bits = random.number(kind, 8, 23, lift);
        std::memcpy(data_ + 4 * i, &bits, 4);
      } else if (type_ == kBytes) {
        data_[i] = uint8_t(random.bits());
      } else {
        const uint32_t wide = type_ == TUNESMITH_FLOAT16 ? random.number(kind, 5, 10, lift)
                                                         : random.number(kind, 8, 7, lift);
        const auto bits = uint16_t(wide);
        std::memcpy(data_ + 2 * i, &bits, 2);
      }
    }
    return std::move(*this);
  }

  void* data() const { return data_; }
  uint8_t* bytes() const { return data_; }
  float* floats() const { return reinterpret_cast<float*>(data_); }
  int64_t count() const { return count_; }
  size_t nbytes() const { return size_t(count_) * size_of(type_); }
  double operator[](int64_t i) const {
    return type_ == kBytes ? double(data_[i]) : read(data_, type_, i);
  }

  // Whether nothing was written since it was made, from one element to another.
  bool untouched(int64_t first, int64_t last) const {
    const size_t size = size_of(type_);
    for (size_t i = size_t(first) * size; i < size_t(last) * size; ++i) {
      if (data_[i] != kPattern) return false;
    }
    return true;
  }

 private:
  static constexpr uint8_t kPattern = 0xA5;
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kFew = 64;

  static size_t size_of(int type) { return type == kBytes ? 1 : type == TUNESMITH_FLOAT32 ? 4 : 2; }

  int type_;
  int64_t count_;
  size_t gap_;
  uint8_t* memory_;
  uint8_t* data_;
};

}  // namespace fuzz
