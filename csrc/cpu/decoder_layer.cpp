// A decoder layer of a model that is trained, forward and backward, made of the functions of
// kernels.h: what lies between calls of those from Python takes longer than many of them do.
#include <algorithm>
#include <cstring>

#include "../kernels.h"
#include "matrix.h"
#include "parallel.h"
#include "pool.h"

namespace tunesmith {
namespace {

constexpr int64_t kLine = 64;

// What the forward pass keeps for the backward pass, [tokens of all rows, ...] each; without memory
// only how much that is.
struct Activations {
  Activations(const tunesmith_decoder_layer& layer, void* memory)
      : tokens(layer.rows * layer.tokens), memory_(static_cast<char*>(memory)) {
    const int64_t hidden = layer.query.in_features,
                  heads = layer.query.out_features / layer.head_size;
    const int64_t key_heads = layer.key.out_features / layer.head_size;
    attention_in = take(hidden, layer.dtype);
    attention_norm_scale = take_floats(1);
    if (layer.query_norm.weight != nullptr) {
      raw_query = take(layer.query.out_features, layer.dtype);
      query_norm_scale = take_floats(heads);
    }
    if (layer.key_norm.weight != nullptr) {
      raw_key = take(layer.key.out_features, layer.dtype);
      key_norm_scale = take_floats(key_heads);
    }
    query = take(layer.query.out_features, layer.dtype);
    key = take(layer.key.out_features, layer.dtype);
    value = take(layer.value.out_features, layer.dtype);
    attention_out = take(layer.query.out_features, layer.dtype);
    lse = take_floats(heads);
    residual = take(hidden, layer.dtype);
    mlp_in = take(hidden, layer.dtype);
    mlp_norm_scale = take_floats(1);
    gate = take(layer.gate.out_features, layer.dtype);
    up = take(layer.up.out_features, layer.dtype);
    intermediate = take(layer.gate.out_features, layer.dtype);
    const tunesmith_linear* const linears[] = {
        &layer.query, &layer.key, &layer.value, &layer.output, &layer.gate, &layer.up, &layer.down};
    for (int i = 0; i < 7; ++i) s[i] = take_floats(linears[i]->rank);
  }

  int64_t tokens, nbytes = 0;
  void *attention_in, *raw_query = nullptr, *raw_key = nullptr, *query, *key, *value,
                      *attention_out, *residual, *mlp_in;
  void *gate, *up, *intermediate;
  float *attention_norm_scale, *query_norm_scale = nullptr, *key_norm_scale = nullptr,
                               *mlp_norm_scale, *lse;
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

void normalize(const tunesmith_norm& norm, int dtype, const void* x, int64_t rows, int64_t columns,
               void* y, float* scale) {
  tunesmith_rms_norm_cpu(x, norm.weight, dtype, rows, columns, norm.eps, norm.from_one, y, scale);
}

void normalize_backward(const tunesmith_norm& norm, int dtype, const void* grad, const void* x,
                        const float* scale, int64_t rows, int64_t columns, const void* plus,
                        void* grad_x) {
  tunesmith_rms_norm_backward_cpu(grad, x, norm.weight, scale, dtype, rows, columns, norm.from_one,
                                  plus, grad_x);
}

void rotate(const tunesmith_decoder_layer& layer, const void* x, int64_t features, bool backward,
            void* out) {
  tunesmith_rotary_cpu(x, layer.cos, layer.sin, layer.dtype, layer.rows * layer.tokens,
                       layer.positions, features / layer.head_size, layer.head_size, backward, out);
}

// Queries or keys: projected, normalized head by head if the model does that, and rotated.
void make_heads(const tunesmith_decoder_layer& layer, const tunesmith_linear& linear,
                const tunesmith_norm& norm, const Activations& saved, void* raw, float* scale,
                float* s, void* out) {
  const int64_t rows = saved.tokens * (linear.out_features / layer.head_size);
  const Scratch space(size_t(saved.tokens * linear.out_features * size_of(layer.dtype)));
  void* const projected = raw != nullptr ? raw : space.as<void>();
  tunesmith_linear_cpu(&linear, saved.attention_in, s, projected, false);
  if (raw != nullptr)
    normalize(norm, layer.dtype, raw, rows, layer.head_size, space.as<void>(), scale);
  rotate(layer, space.as<void>(), linear.out_features, false, out);
}

// The gradient of what make_heads has made, to that of what the product gave.
void make_heads_backward(const tunesmith_decoder_layer& layer, const tunesmith_linear& linear,
                         const tunesmith_norm& norm, const Activations& saved, const void* raw,
                         const float* scale, const void* grad, void* out) {
  if (raw == nullptr) return rotate(layer, grad, linear.out_features, true, out);
  const int64_t rows = saved.tokens * (linear.out_features / layer.head_size);
  const Scratch rotated(size_t(saved.tokens * linear.out_features * size_of(layer.dtype)));
  rotate(layer, grad, linear.out_features, true, rotated.as<void>());
  normalize_backward(norm, layer.dtype, rotated.as<void>(), raw, scale, rows, layer.head_size,
                     nullptr, out);
}

tunesmith_attention attention_of(const tunesmith_decoder_layer& layer, const Activations& saved,
                                 const void* grad_out) {
  return {layer.rows,
          layer.tokens,
          layer.query.out_features / layer.head_size,
          layer.key.out_features / layer.head_size,
          layer.head_size,
          layer.dtype,
          saved.query,
          saved.key,
          saved.value,
          saved.attention_out,
          grad_out,
          saved.lse,
          layer.scale,
          layer.segments,
          layer.segment_count};
}

// Whether each query is in a segment, and with `keys` each key seen by one, too.
bool covered(const tunesmith_decoder_layer& layer, bool keys) {
  int64_t queries = 0;
  bool causal = true;
  for (int64_t i = 0; i < layer.segment_count; ++i) {
    queries += layer.segments[i].stop - layer.segments[i].start;
    causal = causal && layer.segments[i].causal != 0;
  }
  return queries == layer.rows * layer.tokens && (causal || !keys);
}

// out = x, then out += linear(of).
void add_product(const tunesmith_linear& linear, const void* of, float* s, const void* x,
                 void* out) {
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

int64_t tunesmith_decoder_layer_activation_bytes(const tunesmith_decoder_layer* layer) {
  return Activations(*layer, nullptr).nbytes;
}

void tunesmith_decoder_layer_cpu(const tunesmith_decoder_layer* layer, const void* x, void* memory,
                                 void* out) {
  const Activations saved(*layer, memory);
  const int dtype = layer->dtype;
  const int64_t hidden = layer->query.in_features;
  normalize(layer->attention_norm, dtype, x, saved.tokens, hidden, saved.attention_in,
            saved.attention_norm_scale);
  make_heads(*layer, layer->query, layer->query_norm, saved, saved.raw_query,
             saved.query_norm_scale, saved.s[0], saved.query);
  make_heads(*layer, layer->key, layer->key_norm, saved, saved.raw_key, saved.key_norm_scale,
             saved.s[1], saved.key);
  tunesmith_linear_cpu(&layer->value, saved.attention_in, saved.s[2], saved.value, false);
  if (!covered(*layer, false)) {  // a query of no segment sees nothing
    std::memset(saved.attention_out, 0,
                size_t(saved.tokens * layer->query.out_features * size_of(dtype)));
  }
  const tunesmith_attention attention = attention_of(*layer, saved, nullptr);
  tunesmith_attention_cpu(&attention, saved.attention_out, saved.lse);
  add_product(layer->output, saved.attention_out, saved.s[3], x, saved.residual);
  normalize(layer->mlp_norm, dtype, saved.residual, saved.tokens, hidden, saved.mlp_in,
            saved.mlp_norm_scale);
  tunesmith_linear_cpu(&layer->gate, saved.mlp_in, saved.s[4], saved.gate, false);
  tunesmith_linear_cpu(&layer->up, saved.mlp_in, saved.s[5], saved.up, false);
  tunesmith_gated_cpu(saved.gate, saved.up, dtype, saved.tokens * layer->gate.out_features,
                      layer->activation, saved.intermediate);
  if (out != nullptr) {
    add_product(layer->down, saved.intermediate, saved.s[6], saved.residual, out);
  } else {
    tunesmith_linear_project_cpu(&layer->down, saved.intermediate, saved.s[6]);
  }
}

void tunesmith_decoder_layer_backward_cpu(const tunesmith_decoder_layer* layer, const void* x,
                                          const void* memory, const void* grad_out, void* grad_x,
                                          void* const* grad_adapters) {
  const Activations saved(*layer, const_cast<void*>(memory));
  const int dtype = layer->dtype;
  const int64_t hidden = layer->query.in_features, intermediate = layer->gate.out_features;
  const auto nbytes = [&](int64_t features) {
    return size_t(saved.tokens * features * size_of(dtype));
  };
  const tunesmith_linear* const linears[] = {&layer->query,  &layer->key,  &layer->value,
                                             &layer->output, &layer->gate, &layer->up,
                                             &layer->down};
  // the i-th linear layer, given x and the gradient of its output
  const auto backward_through = [&](int i, const void* of, const void* grad, void* grad_of,
                                    bool accumulate) {
    tunesmith_linear_backward_cpu(linears[i], of, saved.s[i], grad, grad_of, grad_adapters[2 * i],
                                  grad_adapters[2 * i + 1], accumulate);
  };
  const Scratch grad_residual(nbytes(hidden)), grad_normed(nbytes(hidden));
  {
    const Scratch grad_intermediate(nbytes(intermediate)), grad_gate(nbytes(intermediate)),
        grad_up(nbytes(intermediate));
    backward_through(6, saved.intermediate, grad_out, grad_intermediate.as<void>(), false);
    tunesmith_gated_backward_cpu(grad_intermediate.as<void>(), saved.gate, saved.up, dtype,
                                 saved.tokens * intermediate, layer->activation,
                                 grad_gate.as<void>(), grad_up.as<void>());
    backward_through(4, saved.mlp_in, grad_gate.as<void>(), grad_normed.as<void>(), false);
    backward_through(5, saved.mlp_in, grad_up.as<void>(), grad_normed.as<void>(), true);
  }
  normalize_backward(layer->mlp_norm, dtype, grad_normed.as<void>(), saved.residual,
                     saved.mlp_norm_scale, saved.tokens, hidden, grad_out,
                     grad_residual.as<void>());

  const int64_t width = layer->query.out_features, key_width = layer->key.out_features;
  const Scratch grad_attention_out(nbytes(width)), grad_query(nbytes(width)),
      grad_raw_query(nbytes(width));
  const Scratch grad_key(nbytes(key_width)), grad_raw_key(nbytes(key_width)),
      grad_value(nbytes(key_width));
  backward_through(3, saved.attention_out, grad_residual.as<void>(), grad_attention_out.as<void>(),
                   false);
  if (!covered(*layer, true)) {  // what no segment sees or asks for has no gradient
    std::memset(grad_query.as<void>(), 0, nbytes(width));
    std::memset(grad_key.as<void>(), 0, nbytes(key_width));
    std::memset(grad_value.as<void>(), 0, nbytes(key_width));
  }
  const tunesmith_attention attention = attention_of(*layer, saved, grad_attention_out.as<void>());
  tunesmith_attention_backward_cpu(&attention, grad_query.as<void>(), grad_key.as<void>(),
                                   grad_value.as<void>());
  make_heads_backward(*layer, layer->query, layer->query_norm, saved, saved.raw_query,
                      saved.query_norm_scale, grad_query.as<void>(), grad_raw_query.as<void>());
  make_heads_backward(*layer, layer->key, layer->key_norm, saved, saved.raw_key,
                      saved.key_norm_scale, grad_key.as<void>(), grad_raw_key.as<void>());
  void* const into = grad_x == nullptr ? nullptr : grad_normed.as<void>();
  backward_through(0, saved.attention_in, grad_raw_query.as<void>(), into, false);
  backward_through(1, saved.attention_in, grad_raw_key.as<void>(), into, true);
  backward_through(2, saved.attention_in, grad_value.as<void>(), into, true);
  if (grad_x != nullptr) {
    normalize_backward(layer->attention_norm, dtype, grad_normed.as<void>(), x,
                       saved.attention_norm_scale, saved.tokens, hidden, grad_residual.as<void>(),
                       grad_x);
  }
}
