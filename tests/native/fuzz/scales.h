// The scales of a 4-bit weight, plain or nested.
#pragma once

#include <optional>

#include "../../../csrc/four_bit.h"
#include "input.h"
#include "memory.h"

namespace fuzz {

class Scales {
 public:
  Scales(Input& input, int64_t numel, int64_t blocksize, Kind kind)
      : Scales(input, (numel + blocksize - 1) / blocksize, kind, input.one_in(2)) {}

  const void* absmax() const { return absmax_.data(); }
  const float* nested_absmax() const { return nested_ ? nested_->floats() : nullptr; }
  const float* nested_offset() const { return nested_ ? offset_->floats() : nullptr; }

  // In fp32, whose roundings are part of what a scale is.
  float operator[](int64_t block) const {
    if (!nested_) return absmax_.floats()[block];
    static const tunesmith::DynamicTable table = tunesmith::make_dynamic_table();
    const float product = table.values[absmax_.bytes()[block]] * nested_->floats()[block / 256];
    return product + offset_->floats()[0];
  }

 private:
  Scales(Input& input, int64_t blocks, Kind kind, bool nested)
      : absmax_(Tensor(nested ? Tensor::kBytes : TUNESMITH_FLOAT32, blocks, input.up_to(3))
                    .fill(input.random(), kind)) {
    if (!nested) return;
    nested_.emplace(
        Tensor(TUNESMITH_FLOAT32, (blocks + 255) / 256, input.up_to(3)).fill(input.random(), kind));
    offset_.emplace(Tensor(TUNESMITH_FLOAT32, 1, input.up_to(3)).fill(input.random(), kind));
  }

  Tensor absmax_;
  std::optional<Tensor> nested_, offset_;
};

}  // namespace fuzz
