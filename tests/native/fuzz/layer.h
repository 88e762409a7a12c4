// A random linear layer as kernels.h describes it, its parts in double precision, and how far from
// exact a kernel may be.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include "../../../csrc/four_bit.h"
#include "input.h"
#include "memory.h"
#include "scales.h"

namespace fuzz {

class Layer {
 public:
  explicit Layer(Input& input)
      : dtype(input.dtype()),
        adapter_dtype(input.dtype()),
        rank(input.one_in(3) ? 0 : input.up_to(40)),
        scaling(float(input.byte()) / 64 - 1),
        mixed_(input.one_in(8)) {
    choose_sizes(input);
    blocksize_ = input.blocksize();
    type_ = input.one_in(3) ? input.dtype() : input.type_4bit();
    if (is_4bit()) {
      table_ = type_ == TUNESMITH_NF4 ? tunesmith::make_nf4_table() : tunesmith::make_fp4_table();
      scales_.emplace(input, out * in, blocksize_, kind(input));
      weight_.emplace(tensor(input, Tensor::kBytes, (out * in + 1) / 2));
    } else {
      weight_.emplace(tensor(input, type_, out * in));
    }
    x.emplace(tensor(input, dtype, tokens * in));
    lora_a_.emplace(tensor(input, adapter_dtype, rank * in));
    lora_b_.emplace(tensor(input, adapter_dtype, out * rank));
    if (input.one_in(3)) bias_.emplace(tensor(input, dtype, out));
    if (input.one_in(4)) weight_.reset();
    if (rank > 0 && input.one_in(3)) {
      keep_.emplace(Tensor::kBytes, tokens * in, input.up_to(3));
      Random random = input.random();
      for (int64_t i = 0; i < tokens * in; ++i) keep_->bytes()[i] = random.bits() % 4 != 0;
      keep_scale_ = input.pick<float>({1.0f, 1.25f, 0.0f});
    }
    note(*x);
    note(*lora_a_);
    note(*lora_b_);
    if (bias_) note(*bias_);
    if (weight_ && !is_4bit()) note(*weight_);
    if (weight_ && is_4bit()) {
      for (int64_t b = 0; b * blocksize_ < out * in; ++b) note((*scales_)[b]);
    }
  }

  tunesmith_linear describe() const {
    tunesmith_linear linear = {};
    linear.tokens = tokens;
    linear.in_features = in;
    linear.out_features = out;
    linear.dtype = dtype;
    linear.type = type_;
    linear.weight = weight_ ? weight_->data() : nullptr;
    if (is_4bit()) {
      linear.absmax = scales_->absmax();
      linear.nested_absmax = scales_->nested_absmax();
      linear.nested_offset = scales_->nested_offset();
      linear.blocksize = blocksize_;
    }
    linear.bias = bias_ ? bias_->data() : nullptr;
    linear.rank = rank;
    linear.adapter_dtype = adapter_dtype;
    linear.lora_a = lora_a_->data();
    linear.lora_b = lora_b_->data();
    linear.scaling = scaling;
    linear.keep = keep_ ? keep_->bytes() : nullptr;
    linear.keep_scale = keep_scale_;
    return linear;
  }

  // A tensor that the layer has not got itself, of its kind of numbers.
  Tensor more(Input& input, int type, int64_t count) {
    Tensor out = tensor(input, type, count);
    note(out);
    return out;
  }

  double weight(int64_t n, int64_t k) const {
    if (!weight_) return 0;
    const int64_t at = n * in + k;
    if (!is_4bit()) return (*weight_)[at];
    const unsigned code = weight_->bytes()[at / 2] >> (at % 2 == 0 ? 4 : 0) & 0xF;
    return double(table_.values[code]) * (*scales_)[at / blocksize_];
  }
  double a(int64_t r, int64_t k) const { return (*lora_a_)[r * in + k]; }
  double b(int64_t n, int64_t r) const { return (*lora_b_)[n * rank + r]; }
  double bias(int64_t n) const { return bias_ ? (*bias_)[n] : 0; }
  // What dropout multiplies an element of x with.
  double kept(int64_t m, int64_t k) const {
    return !keep_ ? 1 : keep_->bytes()[m * in + k] ? keep_scale_ : 0;
  }

  // Whether sums can be compared: nothing that goes in is NaN or Inf, nor does anything overflow.
  bool comparable() const {
    return std::isfinite(largest_) && terms() * std::pow(std::max(1.0, largest_), 4) < 1e37;
  }

  // Whether the instruction set in use rounds factors to bf16: the weight and what belongs to the
  // adapter.
  bool narrow() const {
    return dtype == TUNESMITH_BFLOAT16 && std::strstr(tunesmith_isa(), "bf16") != nullptr;
  }

  // Fails unless `actual` is what a sum of `terms` terms in fp32, rounded to `type`, may be.
  // `narrow` is the part of its size that is made of products with a factor rounded to bf16, once
  // for each factor.
  void compare(const char* what, int64_t at, double actual, const Sum& sum, int64_t terms,
               double narrow, int type) const {
    const double underflow = this->terms() * 0x1p-126 * std::pow(std::max(1.0, largest_), 3);
    double limit = double(terms + 32) * 0x1p-24 * sum.size + 0x1p-8 * narrow + underflow;
    limit += half_unit(std::fabs(sum.value) + limit, type);
    if (std::fabs(actual - sum.value) <= limit || is_overflow(actual, sum.value, limit, type))
      return;
    fail("%s[%lld] is %.9g, not %.9g within %.3g (tokens %lld, in %lld, out %lld, rank %lld)", what,
         static_cast<long long>(at), actual, sum.value, limit, static_cast<long long>(tokens),
         static_cast<long long>(in), static_cast<long long>(out), static_cast<long long>(rank));
  }

  int64_t tokens = 0, in = 0, out = 0;
  int dtype, adapter_dtype;
  int64_t rank;
  float scaling;
  std::optional<Tensor> x;

 private:
  // Most inputs are small, so that there can be many; each of the others asks for code of its own.
  void choose_sizes(Input& input) {
    constexpr unsigned kForms = 32;
    unsigned form = input.byte() % kForms;
    if (tunesmith_has_openmp() && input.one_in(4)) form = kForms - 1 - input.up_to(1);
    const auto a_few = [&] { return input.up_to(7); };
    if (form < 18) {
      set_sizes(input.up_to(40), input.up_to(40), input.up_to(40));
    } else if (form < 22) {  // tokens so few that each is multiplied by itself
      set_sizes(1 + a_few(), 64 * (1 + input.up_to(4)), input.up_to(60));
    } else if (form < 26) {  // rows of whole groups of 4-bit codes
      set_sizes(input.up_to(60), 128 * (1 + input.up_to(2)), input.up_to(24));
    } else if (form == 26) {  // more tokens than are multiplied at once
      set_sizes(input.up_to(1300), a_few(), a_few());
    } else if (form == 27) {
      set_sizes(a_few(), input.up_to(1300), a_few());
    } else if (form == 28) {
      set_sizes(a_few(), a_few(), input.up_to(1300));
    } else if (form == 29) {
      set_sizes(input.up_to(70), input.up_to(70), input.up_to(70));
    } else if (form == 30) {  // few tokens, but rows enough for several threads
      set_sizes(9 + a_few(), 64 * (2 + input.up_to(2)), 90 + input.up_to(60));
    } else {  // enough for several threads
      set_sizes(40 + input.up_to(200), 10 + input.up_to(70), 40 + input.up_to(60));
    }
  }

  void set_sizes(int64_t a, int64_t b, int64_t c) {
    tokens = a;
    in = b;
    out = c;
  }

  Kind kind(Input& input) const { return mixed_ ? input.kind() : kTame; }

  Tensor tensor(Input& input, int type, int64_t count) const {
    return Tensor(type, count, input.up_to(3)).fill(input.random(), kind(input));
  }

  void note(double value) {
    // once it is infinite it stays so
    largest_ = std::isfinite(value) ? std::max(largest_, std::fabs(value)) : INFINITY;
  }
  void note(const Tensor& tensor) {
    for (int64_t i = 0; i < tensor.count() && std::isfinite(largest_); ++i) note(tensor[i]);
  }

  double terms() const { return double(tokens + in + out + rank + 8); }
  bool is_4bit() const { return type_ == TUNESMITH_NF4 || type_ == TUNESMITH_FP4; }

  bool mixed_;  // whether each tensor has a kind of its own
  int64_t blocksize_ = 0;
  int type_ = 0;
  tunesmith::FourBitTable table_ = {};
  float keep_scale_ = 1;
  double largest_ = 0;
  std::optional<Scales> scales_;
  std::optional<Tensor> weight_, lora_a_, lora_b_, bias_, keep_;
};

}  // namespace fuzz
