// What stands between the products of a layer, one pass over its tensors each: norms, gated units,
// rotary embedding; and the log-probabilities of labels. The formulas are those of ../formulas.h.
//
// Each kernel takes eight elements at a time where rows are made of whole eights and lie at
// multiples of 16 bytes, and else one.
#include <initializer_list>
#include <type_traits>

#include "../formulas.h"
#include "common.cuh"

namespace tunesmith {
namespace {

constexpr int kWarpsOfBlock = kThreads / kWarp;
constexpr int64_t kWarpColumns = 1024;  // rows of up to so many are a warp's, longer ones a block's

// Which thread of its row a thread is, and which rows are its own: those of a warp or of all of a
// block.
template <int Warps>
struct Rows {
  int lane;
  int64_t first, step;

  __device__ Rows() {
    if constexpr (Warps == 1) {
      lane = int(threadIdx.x % kWarp);
      first = thread_index() / kWarp;
      step = thread_count() / kWarp;
    } else {
      lane = int(threadIdx.x);
      first = blockIdx.x;
      step = gridDim.x;
    }
  }
};

// The sum over the threads of a row, in each of them.
template <int Warps>
__device__ float row_sum(float value) {
  value = warp_sum(value);
  if constexpr (Warps == 1) {
    return value;
  } else {
    float* const sums = reinterpret_cast<float*>(shared_memory);
    if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
    __syncthreads();
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < Warps; ++warp) sum += sums[warp];
    __syncthreads();  // the next row may write there
    return sum;
  }
}

template <typename T, typename Weight, int Warps, int Count>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const typename T::Storage* __restrict__ x,
                const typename T::Storage* __restrict__ weight, int64_t rows, int64_t columns,
                float eps, typename T::Storage* __restrict__ y, float* __restrict__ scales) {
  const Rows<Warps> mine;
  for (int64_t row = mine.first; row < rows; row += mine.step) {
    const int64_t at = row * columns;
    float squares = 0.0f;
    for (int64_t i = mine.lane * Count; i < columns; i += Warps * kWarp * Count) {
      float of_x[Count];
      load_some<T>(x + at + i, of_x);
#pragma unroll
      for (int e = 0; e < Count; ++e) squares = fmaf(of_x[e], of_x[e], squares);
    }
    const float scale = 1.0f / sqrtf(row_sum<Warps>(squares) / float(columns) + eps);
    if (mine.lane == 0) scales[row] = scale;
    for (int64_t i = mine.lane * Count; i < columns; i += Warps * kWarp * Count) {
      float of_x[Count], of_weight[Count];
      load_some<T>(x + at + i, of_x);
      load_some<T>(weight + i, of_weight);
#pragma unroll
      for (int e = 0; e < Count; ++e) {
        of_x[e] = Weight::template times<T>(of_x[e] * scale, of_weight[e]);
      }
      store_some<T>(of_x, y + at + i);
    }
  }
}

template <typename T, typename Weight, int Warps, int Count>
__global__ void __launch_bounds__(kThreads)
    norm_backward_kernel(const typename T::Storage* __restrict__ grad_y,
                         const typename T::Storage* __restrict__ x,
                         const typename T::Storage* __restrict__ weight,
                         const float* __restrict__ scales, int64_t rows, int64_t columns,
                         typename T::Storage* __restrict__ grad_x) {
  const Rows<Warps> mine;
  for (int64_t row = mine.first; row < rows; row += mine.step) {
    const int64_t at = row * columns;
    float inflow[Count], of_x[Count], of_weight[Count];
    const auto load = [&](int64_t i) {
      load_some<T>(grad_y + at + i, inflow);
      load_some<T>(x + at + i, of_x);
      load_some<T>(weight + i, of_weight);
#pragma unroll
      for (int e = 0; e < Count; ++e) {
        inflow[e] = Weight::template back<T>(inflow[e], of_weight[e]);
      }
    };
    float along = 0.0f;  // the part of the gradient that only changes the length of x
    for (int64_t i = mine.lane * Count; i < columns; i += Warps * kWarp * Count) {
      load(i);
#pragma unroll
      for (int e = 0; e < Count; ++e) along = fmaf(inflow[e], of_x[e], along);
    }
    const float scale = scales[row];
    along = row_sum<Warps>(along) * (scale * scale / float(columns));
    for (int64_t i = mine.lane * Count; i < columns; i += Warps * kWarp * Count) {
      load(i);
#pragma unroll
      for (int e = 0; e < Count; ++e) inflow[e] = scale * (inflow[e] - of_x[e] * along);
      store_some<T>(inflow, grad_x + at + i);
    }
  }
}

template <typename T, typename Activation, int Count>
__global__ void __launch_bounds__(kThreads)
    gated_kernel(const typename T::Storage* __restrict__ gate,
                 const typename T::Storage* __restrict__ up, int64_t numel,
                 typename T::Storage* __restrict__ y) {
  for (int64_t i = thread_index() * Count; i < numel; i += thread_count() * Count) {
    float of_gate[Count], of_up[Count];
    load_some<T>(gate + i, of_gate);
    load_some<T>(up + i, of_up);
#pragma unroll
    for (int e = 0; e < Count; ++e) of_gate[e] = gated_of<T, Activation>(of_gate[e], of_up[e]);
    store_some<T>(of_gate, y + i);
  }
}

template <typename T, typename Activation, int Count>
__global__ void __launch_bounds__(kThreads)
    gated_backward_kernel(const typename T::Storage* __restrict__ grad_y,
                          const typename T::Storage* __restrict__ gate,
                          const typename T::Storage* __restrict__ up, int64_t numel,
                          typename T::Storage* __restrict__ grad_gate,
                          typename T::Storage* __restrict__ grad_up) {
  for (int64_t i = thread_index() * Count; i < numel; i += thread_count() * Count) {
    float inflow[Count], of_gate[Count], of_up[Count];
    load_some<T>(grad_y + i, inflow);
    load_some<T>(gate + i, of_gate);
    load_some<T>(up + i, of_up);
#pragma unroll
    for (int e = 0; e < Count; ++e) {
      const float grad_gate = gated_back<T, Activation>(inflow[e], of_gate[e], of_up[e]);
      of_up[e] = gated_back_up<T, Activation>(inflow[e], of_gate[e]);
      of_gate[e] = grad_gate;
    }
    store_some<T>(of_gate, grad_gate + i);
    store_some<T>(of_up, grad_up + i);
  }
}

// A thread for `Count` pairs (x[i], x[i + size / 2]) of a head.
template <typename T, bool Backward, int Count>
__global__ void __launch_bounds__(kThreads)
    rotary_kernel(const typename T::Storage* __restrict__ x,
                  const typename T::Storage* __restrict__ cos,
                  const typename T::Storage* __restrict__ sin, int64_t tokens, int64_t positions,
                  int64_t heads, int64_t size, typename T::Storage* __restrict__ out) {
  const int64_t half = size / 2, pieces = half / Count, work = tokens * heads * pieces;
  for (int64_t piece = thread_index(); piece < work; piece += thread_count()) {
    const int64_t head = piece / pieces, i = piece % pieces * Count;
    const int64_t low = head * size + i, angle = head / heads % positions * size + i;
    float of_x[2][Count], of_cos[2][Count], of_sin[2][Count];
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      load_some<T>(x + low + part * half, of_x[part]);
      load_some<T>(cos + angle + part * half, of_cos[part]);
      load_some<T>(sin + angle + part * half, of_sin[part]);
    }
#pragma unroll
    for (int e = 0; e < Count; ++e) {
      const float first = of_x[0][e], second = of_x[1][e];
      // back is by the other's sine, and the other way round
      const float into_first = Backward ? -of_sin[1][e] : of_sin[0][e];
      const float into_second = Backward ? -of_sin[0][e] : of_sin[1][e];
      of_x[0][e] = rotated_first<T>(first, second, of_cos[0][e], into_first);
      of_x[1][e] = rotated_second<T>(first, second, of_cos[1][e], into_second);
    }
    store_some<T>(of_x[0], out + low);
    store_some<T>(of_x[1], out + low + half);
  }
}

// The sum of e to the power of some logits less the largest of them (arXiv:1805.02867).
struct LogSum {
  float running_max, sum;

  __device__ void add(const LogSum& other) {
    const float larger = other.running_max > running_max ? other.running_max : running_max;
    sum = sum * exp_of(running_max - larger) + other.sum * exp_of(other.running_max - larger);
    running_max = larger;
  }
};

constexpr int kLogpsThreads = 512;

// A block for a row.
template <typename T, int Count>
__global__ void __launch_bounds__(kLogpsThreads)
    logps_kernel(typename T::Storage* __restrict__ logits, const int64_t* __restrict__ labels,
                 int64_t rows, int64_t columns, bool gradients, float* __restrict__ logps) {
  constexpr float kLowest = -3.40282347e38f;
  LogSum* const of_warps = reinterpret_cast<LogSum*>(shared_memory);
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    typename T::Storage* const of_row = logits + row * columns;
    const int64_t label = labels[row];
    const bool known = label >= 0 && label < columns;
    // read by all before any writes: barriers follow
    const float of_label = known ? T::widen(of_row[label]) : float_of(0x7FC00000u);  // NaN
    LogSum total = {kLowest, 0.0f};
    for (int64_t i = int64_t(threadIdx.x) * Count; i < columns; i += kLogpsThreads * Count) {
      float some[Count];
      load_some<T>(of_row + i, some);
      float running_max = total.running_max;
#pragma unroll
      for (int e = 0; e < Count; ++e) running_max = some[e] > running_max ? some[e] : running_max;
      total.sum *= exp_of(total.running_max - running_max);
      total.running_max = running_max;
#pragma unroll
      for (int e = 0; e < Count; ++e) total.sum += exp_of(some[e] - running_max);
    }
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
      LogSum other;
      other.running_max = __shfl_xor_sync(0xFFFFFFFFu, total.running_max, offset);
      other.sum = __shfl_xor_sync(0xFFFFFFFFu, total.sum, offset);
      total.add(other);
    }
    if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = total;
    __syncthreads();
    total = of_warps[0];
    for (int warp = 1; warp < kLogpsThreads / kWarp; ++warp) total.add(of_warps[warp]);
    __syncthreads();                        // the next row may write there
    const float log_sum = logf(total.sum);  // not added to the largest, beside which it may be lost
    const float logp = (of_label - total.running_max) - log_sum;
    if (threadIdx.x == 0) logps[row] = logp;
    if (!gradients) continue;
    for (int64_t i = int64_t(threadIdx.x) * Count; i < columns; i += kLogpsThreads * Count) {
      float some[Count];
      load_some<T>(of_row + i, some);
#pragma unroll
      for (int e = 0; e < Count; ++e) {
        some[e] =
            i + e == label ? 1.0f - exp_of(logp) : -exp_of((some[e] - total.running_max) - log_sum);
      }
      store_some<T>(some, of_row + i);
    }
  }
}

template <int N>
using Number = std::integral_constant<int, N>;

bool all_aligned(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers) {
    if (!is_aligned(pointer, 16)) return false;
  }
  return true;
}

// Calls use(Weight(), warps of a row, elements at once), the last two as constants.
template <typename Use>
const char* for_norm(bool from_one, int64_t columns, bool by_vectors, Use use) {
  const auto with = [&](auto weight) {
    if (!by_vectors) return use(weight, Number<1>{}, Number<1>{});
    return columns <= kWarpColumns ? use(weight, Number<1>{}, Number<8>{})
                                   : use(weight, Number<kWarpsOfBlock>{}, Number<8>{});
  };
  return from_one ? with(FromOne{}) : with(Plain{});
}

unsigned grid_of_rows(int64_t rows, int warps) { return grid_for(rows, kWarpsOfBlock / warps); }

template <typename Use>
const char* for_activation(int activation, bool by_vectors, Use use) {
  const auto with = [&](auto kind) {
    return by_vectors ? use(kind, Number<8>{}) : use(kind, Number<1>{});
  };
  return activation == TUNESMITH_SILU ? with(Silu{}) : with(GeluTanh{});
}

}  // namespace
}  // namespace tunesmith

using namespace tunesmith;

const char* tunesmith_rms_norm_cuda(const void* x, const void* weight, int dtype, int64_t rows,
                                    int64_t columns, float eps, bool from_one, void* y,
                                    float* scale, void* stream) {
  if (rows == 0) return nullptr;  // CUDA refuses an empty grid
  const bool by_vectors = columns % 8 == 0 && all_aligned({x, weight, y});
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    using Storage = typename T::Storage;
    return for_norm(from_one, columns, by_vectors, [&](auto kind, auto warps, auto count) {
      return launch(norm_kernel<T, decltype(kind), decltype(warps)::value, decltype(count)::value>,
                    grid_of_rows(rows, warps()), kThreads, kWarpsOfBlock * sizeof(float), stream,
                    static_cast<const Storage*>(x), static_cast<const Storage*>(weight), rows,
                    columns, eps, static_cast<Storage*>(y), scale);
    });
  });
}

const char* tunesmith_rms_norm_backward_cuda(const void* grad_y, const void* x, const void* weight,
                                             const float* scale, int dtype, int64_t rows,
                                             int64_t columns, bool from_one, void* grad_x,
                                             void* stream) {
  if (rows == 0) return nullptr;
  const bool by_vectors = columns % 8 == 0 && all_aligned({grad_y, x, weight, grad_x});
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    using Storage = typename T::Storage;
    return for_norm(from_one, columns, by_vectors, [&](auto kind, auto warps, auto count) {
      return launch(
          norm_backward_kernel<T, decltype(kind), decltype(warps)::value, decltype(count)::value>,
          grid_of_rows(rows, warps()), kThreads, kWarpsOfBlock * sizeof(float), stream,
          static_cast<const Storage*>(grad_y), static_cast<const Storage*>(x),
          static_cast<const Storage*>(weight), scale, rows, columns, static_cast<Storage*>(grad_x));
    });
  });
}

const char* tunesmith_gated_cuda(const void* gate, const void* up, int dtype, int64_t numel,
                                 int activation, void* y, void* stream) {
  if (numel == 0) return nullptr;
  const bool by_vectors = numel % 8 == 0 && all_aligned({gate, up, y});
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    using Storage = typename T::Storage;
    return for_activation(activation, by_vectors, [&](auto kind, auto count) {
      return launch(gated_kernel<T, decltype(kind), decltype(count)::value>,
                    grid_for(numel / count(), kThreads), kThreads, 0, stream,
                    static_cast<const Storage*>(gate), static_cast<const Storage*>(up), numel,
                    static_cast<Storage*>(y));
    });
  });
}

const char* tunesmith_gated_backward_cuda(const void* grad_y, const void* gate, const void* up,
                                          int dtype, int64_t numel, int activation, void* grad_gate,
                                          void* grad_up, void* stream) {
  if (numel == 0) return nullptr;
  const bool by_vectors = numel % 8 == 0 && all_aligned({grad_y, gate, up, grad_gate, grad_up});
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    using Storage = typename T::Storage;
    return for_activation(activation, by_vectors, [&](auto kind, auto count) {
      return launch(gated_backward_kernel<T, decltype(kind), decltype(count)::value>,
                    grid_for(numel / count(), kThreads), kThreads, 0, stream,
                    static_cast<const Storage*>(grad_y), static_cast<const Storage*>(gate),
                    static_cast<const Storage*>(up), numel, static_cast<Storage*>(grad_gate),
                    static_cast<Storage*>(grad_up));
    });
  });
}

const char* tunesmith_rotary_cuda(const void* x, const void* cos, const void* sin, int dtype,
                                  int64_t tokens, int64_t positions, int64_t heads, int64_t size,
                                  bool backward, void* out, void* stream) {
  const int64_t pairs = tokens * heads * (size / 2);
  if (pairs == 0) return nullptr;
  const bool by_vectors = size % 16 == 0 && all_aligned({x, cos, sin, out});
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    using Storage = typename T::Storage;
    const auto start = [&](auto back, auto count) {
      return launch(rotary_kernel<T, decltype(back)::value, decltype(count)::value>,
                    grid_for(pairs / count(), kThreads), kThreads, 0, stream,
                    static_cast<const Storage*>(x), static_cast<const Storage*>(cos),
                    static_cast<const Storage*>(sin), tokens, positions, heads, size,
                    static_cast<Storage*>(out));
    };
    const auto with = [&](auto back) {
      return by_vectors ? start(back, Number<8>{}) : start(back, Number<1>{});
    };
    return backward ? with(std::true_type{}) : with(std::false_type{});
  });
}

const char* tunesmith_logps_cuda(void* logits, const int64_t* labels, int dtype, int64_t rows,
                                 int64_t columns, bool gradients, float* logps, void* stream) {
  if (rows == 0) return nullptr;
  const bool by_vectors = columns % 8 == 0 && is_aligned(logits, 16);
  return for_dtype(dtype, [&](auto of) {
    using T = decltype(of);
    const auto start = [&](auto count) {
      return launch(logps_kernel<T, decltype(count)::value>, grid_for(rows, 1), kLogpsThreads,
                    kLogpsThreads / kWarp * sizeof(LogSum), stream,
                    static_cast<typename T::Storage*>(logits), labels, rows, columns, gradients,
                    logps);
    };
    return by_vectors ? start(Number<8>{}) : start(Number<1>{});
  });
}
