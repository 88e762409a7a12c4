// Attention over segments, and of one query a row.
#include <vector>

#include "bindings.h"

namespace tunesmith {
namespace {

// `shape` is rows, tokens, heads, key heads and head size.
tunesmith_attention make_attention(const std::vector<int64_t>& shape, int dtype, Pointer q,
                                   Pointer k, Pointer v, float scale, Pointer segments,
                                   int64_t segment_count) {
  tunesmith_attention job = {};
  job.rows = shape.at(0);
  job.tokens = shape.at(1);
  job.heads = shape.at(2);
  job.key_heads = shape.at(3);
  job.head_size = shape.at(4);
  job.dtype = dtype;
  job.q = q;
  job.k = k;
  job.v = v;
  job.scale = scale;
  job.segments = segments;
  job.segment_count = segment_count;
  return job;
}

void attention(const std::vector<int64_t>& shape, int dtype, Pointer q, Pointer k, Pointer v,
               float scale, Pointer segments, int64_t segment_count, Pointer out, Pointer lse) {
  const auto job = make_attention(shape, dtype, q, k, v, scale, segments, segment_count);
  tunesmith_attention_cpu(&job, out, lse);
}

void attention_backward(const std::vector<int64_t>& shape, int dtype, Pointer q, Pointer k,
                        Pointer v, Pointer out, Pointer grad_out, Pointer lse, float scale,
                        Pointer segments, int64_t segment_count, Pointer grad_q, Pointer grad_k,
                        Pointer grad_v) {
  auto job = make_attention(shape, dtype, q, k, v, scale, segments, segment_count);
  job.out = out;
  job.grad_out = grad_out;
  job.lse = lse;
  tunesmith_attention_backward_cpu(&job, grad_q, grad_k, grad_v);
}

void attention_decode(Pointer q, Pointer keys, Pointer values, Pointer first, int dtype,
                      int64_t rows, int64_t heads, int64_t key_heads, int64_t head_size,
                      int64_t capacity, int64_t length, float scale, Pointer out) {
  tunesmith_attention_decode_cpu(q, keys, values, first, dtype, rows, heads, key_heads, head_size,
                                 capacity, length, scale, out);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention", attention, "shape"_a, "dtype"_a, "q"_a, "k"_a, "v"_a, "scale"_a, "segments"_a,
        "segment_count"_a, "out"_a, "lse"_a, Unlocked());
  m.def("attention_backward", attention_backward, "shape"_a, "dtype"_a, "q"_a, "k"_a, "v"_a,
        "out"_a, "grad_out"_a, "lse"_a, "scale"_a, "segments"_a, "segment_count"_a, "grad_q"_a,
        "grad_k"_a, "grad_v"_a, Unlocked());
  m.def("attention_decode", attention_decode, "q"_a, "keys"_a, "values"_a, "first"_a, "dtype"_a,
        "rows"_a, "heads"_a, "key_heads"_a, "head_size"_a, "capacity"_a, "length"_a, "scale"_a,
        "out"_a, Unlocked());
}

}  // namespace tunesmith
