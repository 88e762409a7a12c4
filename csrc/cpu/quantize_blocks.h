// Quantizing and dequantizing whole blocks of 4-bit codes, but for what an instruction set does in
// its own way.
//
// The including file has Float32, Float16 and BFloat16 from the header of its instruction set.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../kernels.h"
#include "../four_bit.h"
#include "isa.h"

namespace tunesmith {
namespace {

// Calls use(T()) with the type that stands for a dtype.
template <typename Use>
void by_dtype(int dtype, Use use) {
  switch (dtype) {
    case TUNESMITH_FLOAT32: return use(Float32());
    case TUNESMITH_FLOAT16: return use(Float16());
    case TUNESMITH_BFLOAT16: return use(BFloat16());
  }
}

// Kernels::quantize<T> does full blocks.
template <typename Kernels>
void quantize(const QuantizeJob& job, int64_t first, int64_t last) {
  const int64_t end = std::min(last, job.numel / job.blocksize);
  by_dtype(job.dtype,
           [&](auto type) { Kernels::template quantize<decltype(type)>(job, first, end); });
  if (end < last) scalar_isa.quantize(job, end, last);
}

template <typename Kernels, typename T, bool kStreaming>
void dequantize_full(const DequantizeJob& job, int64_t first, int64_t end) {
  static constexpr DynamicTable kDynamic = make_dynamic_table();
  const typename Kernels::template Lookup<T> lookup(*job.table);
  for (int64_t block = first; block < end; ++block) {
    const int64_t begin = block * job.blocksize;
    const float scale = scale_of(block, job.absmax, job.nested_absmax, job.nested_offset, kDynamic);
    Kernels::template dequantize<T, kStreaming>(job.packed + begin / 2, job.blocksize, lookup,
                                                scale,
                                                static_cast<typename T::Storage*>(job.out) + begin);
  }
  if (kStreaming) Kernels::fence();
}

// Kernels::dequantize<T, kStreaming> does one full block; Lookup<T> is what it makes of a table
// beforehand.
template <typename Kernels>
void dequantize(const DequantizeJob& job, int64_t first, int64_t last) {
  const int64_t end = std::min(last, job.numel / job.blocksize);
  const bool streaming = streams_stores(job, Kernels::kAlignment);
  by_dtype(job.dtype, [&](auto type) {
    using T = decltype(type);
    if (streaming) {
      dequantize_full<Kernels, T, true>(job, first, end);
    } else {
      dequantize_full<Kernels, T, false>(job, first, end);
    }
  });
  if (end < last) scalar_isa.dequantize(job, end, last);
}

}  // namespace
}  // namespace tunesmith
