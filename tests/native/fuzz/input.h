// What one input of the fuzzer stands for: choices read off its bytes, and numbers grown from them.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <initializer_list>

#include "../../../csrc/kernels.h"

namespace fuzz {

// How the numbers of a tensor are drawn.
enum Kind {
  kTame,    // of like size, some of them zero
  kTiny,    // zeros, denormals, and what is little above
  kUntamed  // any bits at all: NaN, Inf, the largest
};

// splitmix64 (doi:10.1145/2660193.2660195), seeded by bytes of the input.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }

  // An IEEE number of that format, as its bits. A tame one is below 2^(lift + 1).
  uint32_t number(Kind kind, int exponent_bits, int mantissa_bits, unsigned lift = 0) {
    const uint64_t random = bits();
    const uint32_t sign = uint32_t(random >> 63) << (exponent_bits + mantissa_bits);
    const uint32_t all_exponent_bits = (1u << exponent_bits) - 1;
    const uint32_t all_mantissa_bits = (1u << mantissa_bits) - 1;
    const uint32_t chance = uint32_t(random >> 56) % 32;
    uint32_t mantissa = uint32_t(random) & all_mantissa_bits;
    uint32_t exponent = uint32_t(random >> 32) & all_exponent_bits;
    if (mantissa_bits == 23 && chance < 8) {
      // halfway between two numbers of bf16, or of fp16
      const int bits_lost = chance < 4 ? 16 : 13;
      mantissa = mantissa >> bits_lost << bits_lost | 1u << (bits_lost - 1);
    }
    if (kind == kUntamed) {
      if (chance > 28) exponent = all_exponent_bits;
      if (chance == 30) mantissa = all_mantissa_bits;  // a NaN that rounding up would carry over
      if (chance == 31) mantissa = 0;
    } else if (chance > 29) {
      exponent = mantissa = 0;
    } else if (kind == kTame) {
      exponent = (1u << (exponent_bits - 1)) - 1 + lift - exponent % 6;  // 1.0 and a little below
    } else {
      exponent = chance < 16 ? 0 : exponent % 4;
    }
    return sign | exponent << mantissa_bits | mantissa;
  }

 private:
  uint64_t state_;
};

class Input {
 public:
  Input(const uint8_t* data, size_t size) : at_(data), end_(data + size) {}

  // What the bytes do not say is zero.
  unsigned byte() { return at_ == end_ ? 0 : *at_++; }

  uint64_t word() {
    uint64_t out = 0;
    for (int i = 0; i < 8; ++i) out = out << 8 | byte();
    return out;
  }

  bool one_in(unsigned n) { return byte() % n == n - 1; }

  int64_t up_to(int64_t most) {
    const unsigned high = byte();
    return int64_t(high << 8 | byte()) % (most + 1);
  }

  template <typename T>
  T pick(std::initializer_list<T> choices) {
    return *(choices.begin() + byte() % choices.size());
  }

  Random random() { return Random(word()); }

  int dtype() { return pick<int>({TUNESMITH_FLOAT32, TUNESMITH_FLOAT16, TUNESMITH_BFLOAT16}); }
  int type_4bit() { return pick<int>({TUNESMITH_NF4, TUNESMITH_FP4}); }
  // the smallest more often: inputs are small, too
  int64_t blocksize() { return pick<int64_t>({64, 64, 64, 64, 128, 256, 512, 1024, 2048, 4096}); }

  Kind kind() {
    const unsigned chance = byte() % 8;
    return chance < 6 ? kTame : chance == 6 ? kTiny : kUntamed;
  }

 private:
  const uint8_t* at_;
  const uint8_t* end_;
};

}  // namespace fuzz
