// A decoder layer of a model that is trained, forward and backward, made of the functions of kernels.h: what
// lies between calls of those from Python takes longer than many of them do.
#include <algorithm>
#include <cstring>

#include "../kernels.h"
#include "isa.h"
#include "parallel.h"
#include "pool.h"

namespace tunesmith {
namespace {

constexpr int64_t kLine = 64;

// Where everything lies that the forward pass keeps, [tokens of all rows, ...] each; without memory only how
// much it is.
struct Kept {
  Kept(const tunesmith_decoder_layer& layer, void* memory)
      : tokens(layer.rows * layer.tokens), memory_(static_cast<char*>(memory)) {
    const int64_t hidden = layer.query.in_features, heads = layer.query.out_features / layer.size;
    const int64_t key_heads = layer.key.out_features / layer.size;
    before = take(hidden, layer.dtype);
    scale_before = take_floats(1);
    if (layer.query_norm.weight != nullptr) {
      raw_query = take(layer.query.out_features, layer.dtype);
      scale_query = take_floats(heads);
    }
    if (layer.key_norm.weight != nullptr) {
      raw_key = take(layer.key.out_features, layer.dtype);
      scale_key = take_floats(key_heads);
    }
    query = take(layer.query.out_features, layer.dtype);
    key = take(layer.key.out_features, layer.dtype);
    value = take(layer.value.out_features, layer.dtype);
    seen = take(layer.query.out_features, layer.dtype);
    log_sums = take_floats(heads);
    middle = take(hidden, layer.dtype);
    after = take(hidden, layer.dtype);
    scale_after = take_floats(1);
    gate = take(layer.gate.out_features, layer.dtype);
    up = take(layer.up.out_features, layer.dtype);
    inner = take(layer.gate.out_features, layer.dtype);
    const tunesmith_linear* const linears[] = {&layer.query, &layer.key, &layer.value, &layer.output,
                                               &layer.gate,  &layer.up,  &layer.down};
    for (int i = 0; i < 7; ++i) s[i] = take_floats(linears[i]->rank);
  }

  int64_t tokens, nbytes = 0;
  void *before, *raw_query = nullptr, *raw_key = nullptr, *query, *key, *value, *seen, *middle, *after;
  void *gate, *up, *inner;
  float *scale_before, *scale_query = nullptr, *scale_key = nullptr, *scale_after, *log_sums;
  float* s[7];  // of each linear layer

 private:
  void* take(int64_t features, int dtype) {
    char* const taken = memory_ == nullptr ? nullptr : memory_ + nbytes;
    nbytes += (tokens * features * size_of(dtype) + kLine - 1) / kLine * kLine;
    return taken;
  }
  float* take_floats(int64_t features) {
    return static_cast<float*>(take(features, TUNESMITH_FLOAT32));
  }

  char* memory_;
};

void normalize(const tunesmith_norm& norm, int dtype, const void* x, int64_t rows, int64_t columns, void* y,
               float* scale) {
  tunesmith_rms_norm_cpu(x, norm.weight, dtype, rows, columns, norm.eps, norm.from_one, y, scale);
}

void normalize_backward(const tunesmith_norm& norm, int dtype, const void* grad, const void* x,
                        const float* scale, int64_t rows, int64_t columns, const void* plus, void* grad_x) {
  tunesmith_rms_norm_backward_cpu(grad, x, norm.weight, scale, dtype, rows, columns, norm.from_one, plus,
                                  grad_x);
}

void turn(const tunesmith_decoder_layer& layer, const void* x, int64_t features, bool backward, void* out) {
  tunesmith_rotary_cpu(x, layer.cos, layer.sin, layer.dtype, layer.rows * layer.tokens, layer.positions,
                       features / layer.size, layer.size, backward, out);
}

// Queries or keys: projected, normalized head by head if the model does that, and turned.
void make_heads(const tunesmith_decoder_layer& layer, const tunesmith_linear& linear,
                const tunesmith_norm& norm, const Kept& kept, void* raw, float* scale, float* s, void* out) {
  const int64_t rows = kept.tokens * (linear.out_features / layer.size);
  const Scratch space(size_t(kept.tokens * linear.out_features * size_of(layer.dtype)));
  void* const projected = raw != nullptr ? raw : space.as<void>();
  tunesmith_linear_cpu(&linear, kept.before, s, projected, false);
  if (raw != nullptr) normalize(norm, layer.dtype, raw, rows, layer.size, space.as<void>(), scale);
  turn(layer, space.as<void>(), linear.out_features, false, out);
}

// The gradient of what make_heads has made, to that of what the product gave.
void make_heads_backward(const tunesmith_decoder_layer& layer, const tunesmith_linear& linear,
                         const tunesmith_norm& norm, const Kept& kept, const void* raw, const float* scale,
                         const void* grad, void* out) {
  if (raw == nullptr) return turn(layer, grad, linear.out_features, true, out);
  const int64_t rows = kept.tokens * (linear.out_features / layer.size);
  const Scratch turned(size_t(kept.tokens * linear.out_features * size_of(layer.dtype)));
  turn(layer, grad, linear.out_features, true, turned.as<void>());
  normalize_backward(norm, layer.dtype, turned.as<void>(), raw, scale, rows, layer.size, nullptr, out);
}

tunesmith_attention attention_of(const tunesmith_decoder_layer& layer, const Kept& kept,
                                 const void* grad_out) {
  return {layer.rows,
          layer.tokens,
          layer.query.out_features / layer.size,
          layer.key.out_features / layer.size,
          layer.size,
          layer.dtype,
          kept.query,
          kept.key,
          kept.value,
          kept.seen,
          grad_out,
          kept.log_sums,
          layer.scale,
          layer.runs,
          layer.run_count};
}

// Whether each query is in a run, and with `keys` each key seen by one, too.
bool covered(const tunesmith_decoder_layer& layer, bool keys) {
  int64_t queries = 0;
  bool causal = true;
  for (int64_t i = 0; i < layer.run_count; ++i) {
    queries += layer.runs[i].stop - layer.runs[i].start;
    causal = causal && layer.runs[i].causal != 0;
  }
  return queries == layer.rows * layer.tokens && (causal || !keys);
}

// out = x, then out += linear(of).
void add_product(const tunesmith_linear& linear, const void* of, float* s, const void* x, void* out) {
  const int64_t nbytes = linear.tokens * linear.out_features * size_of(linear.dtype);
  parallel_for(nbytes, int64_t(1) << 16, [&](int64_t first, int64_t last) {
    std::memcpy(static_cast<char*>(out) + first, static_cast<const char*>(x) + first,
                size_t(last - first));
  });
  tunesmith_linear_cpu(&linear, of, s, out, true);
}

}  // namespace
}  // namespace tunesmith

using namespace tunesmith;

int64_t tunesmith_decoder_layer_kept(const tunesmith_decoder_layer* layer) {
  return Kept(*layer, nullptr).nbytes;
}

void tunesmith_decoder_layer_cpu(const tunesmith_decoder_layer* layer, const void* x, void* memory,
                                 void* out) {
  const Kept kept(*layer, memory);
  const int dtype = layer->dtype;
  const int64_t hidden = layer->query.in_features;
  normalize(layer->before, dtype, x, kept.tokens, hidden, kept.before, kept.scale_before);
  make_heads(*layer, layer->query, layer->query_norm, kept, kept.raw_query, kept.scale_query, kept.s[0],
             kept.query);
  make_heads(*layer, layer->key, layer->key_norm, kept, kept.raw_key, kept.scale_key, kept.s[1], kept.key);
  tunesmith_linear_cpu(&layer->value, kept.before, kept.s[2], kept.value, false);
  if (!covered(*layer, false)) {  // a query of no run sees nothing
    std::memset(kept.seen, 0, size_t(kept.tokens * layer->query.out_features * size_of(dtype)));
  }
  const tunesmith_attention attention = attention_of(*layer, kept, nullptr);
  tunesmith_attention_cpu(&attention, kept.seen, kept.log_sums);
  add_product(layer->output, kept.seen, kept.s[3], x, kept.middle);
  normalize(layer->after, dtype, kept.middle, kept.tokens, hidden, kept.after, kept.scale_after);
  tunesmith_linear_cpu(&layer->gate, kept.after, kept.s[4], kept.gate, false);
  tunesmith_linear_cpu(&layer->up, kept.after, kept.s[5], kept.up, false);
  tunesmith_gated_cpu(kept.gate, kept.up, dtype, kept.tokens * layer->gate.out_features, layer->activation,
                      kept.inner);
  if (out != nullptr) {
    add_product(layer->down, kept.inner, kept.s[6], kept.middle, out);
  } else {
    tunesmith_linear_project_cpu(&layer->down, kept.inner, kept.s[6]);
  }
}

void tunesmith_decoder_layer_backward_cpu(const tunesmith_decoder_layer* layer, const void* x,
                                          const void* memory, const void* grad_out, void* grad_x,
                                          void* const* grad_adapters) {
  const Kept kept(*layer, const_cast<void*>(memory));
  const int dtype = layer->dtype;
  const int64_t hidden = layer->query.in_features, inner = layer->gate.out_features;
  const auto nbytes = [&](int64_t features) { return size_t(kept.tokens * features * size_of(dtype)); };
  const tunesmith_linear* const linears[] = {&layer->query, &layer->key, &layer->value, &layer->output,
                                             &layer->gate,  &layer->up,  &layer->down};
  // the i-th linear layer, given x and the gradient of its output
  const auto through = [&](int i, const void* of, const void* grad, void* grad_of, bool accumulate) {
    tunesmith_linear_backward_cpu(linears[i], of, kept.s[i], grad, grad_of, grad_adapters[2 * i],
                                  grad_adapters[2 * i + 1], accumulate);
  };
  const Scratch middle(nbytes(hidden)), flow(nbytes(hidden));
  {
    const Scratch of_inner(nbytes(inner)), of_gate(nbytes(inner)), of_up(nbytes(inner));
    through(6, kept.inner, grad_out, of_inner.as<void>(), false);
    tunesmith_gated_backward_cpu(of_inner.as<void>(), kept.gate, kept.up, dtype, kept.tokens * inner,
                                 layer->activation, of_gate.as<void>(), of_up.as<void>());
    through(4, kept.after, of_gate.as<void>(), flow.as<void>(), false);
    through(5, kept.after, of_up.as<void>(), flow.as<void>(), true);
  }
  normalize_backward(layer->after, dtype, flow.as<void>(), kept.middle, kept.scale_after, kept.tokens,
                     hidden, grad_out, middle.as<void>());

  const int64_t width = layer->query.out_features, key_width = layer->key.out_features;
  const Scratch of_seen(nbytes(width)), of_query(nbytes(width)), of_raw_query(nbytes(width));
  const Scratch of_key(nbytes(key_width)), of_raw_key(nbytes(key_width)), of_value(nbytes(key_width));
  through(3, kept.seen, middle.as<void>(), of_seen.as<void>(), false);
  if (!covered(*layer, true)) {  // what no run sees or asks for has no gradient
    std::memset(of_query.as<void>(), 0, nbytes(width));
    std::memset(of_key.as<void>(), 0, nbytes(key_width));
    std::memset(of_value.as<void>(), 0, nbytes(key_width));
  }
  const tunesmith_attention attention = attention_of(*layer, kept, of_seen.as<void>());
  tunesmith_attention_backward_cpu(&attention, of_query.as<void>(), of_key.as<void>(), of_value.as<void>());
  make_heads_backward(*layer, layer->query, layer->query_norm, kept, kept.raw_query, kept.scale_query,
                      of_query.as<void>(), of_raw_query.as<void>());
  make_heads_backward(*layer, layer->key, layer->key_norm, kept, kept.raw_key, kept.scale_key,
                      of_key.as<void>(), of_raw_key.as<void>());
  void* const into = grad_x == nullptr ? nullptr : flow.as<void>();
  through(0, kept.before, of_raw_query.as<void>(), into, false);
  through(1, kept.before, of_raw_key.as<void>(), into, true);
  through(2, kept.before, of_value.as<void>(), into, true);
  if (grad_x != nullptr) {
    normalize_backward(layer->before, dtype, flow.as<void>(), x, kept.scale_before, kept.tokens, hidden,
                       middle.as<void>(), grad_x);
  }
}
