// One layer of a model that generates, one token of each row: made of the functions of kernels.h:
// calling those one by one from Python takes longer than they do.
#include <cstring>

#include "../kernels.h"
#include "matrix.h"
#include "pool.h"

namespace tunesmith {
namespace {

// Work space of one call.
class Buffer {
 public:
  Buffer(int64_t elements, int dtype) : memory_(size_t(elements * size_of(dtype))) {}
  void* data() const { return memory_.as<void>(); }

 private:
  Scratch memory_;
};

// y = norm(x) over rows of `columns`.
void normalize(const tunesmith_norm& norm, int dtype, const void* x, int64_t rows, int64_t columns,
               void* y) {
  const Buffer scale(rows, TUNESMITH_FLOAT32);
  tunesmith_rms_norm_cpu(x, norm.weight, dtype, rows, columns, norm.eps, norm.from_one, y,
                         static_cast<float*>(scale.data()));
}

void project(const tunesmith_linear& linear, const void* x, void* y, bool accumulate) {
  const Buffer s(linear.tokens * linear.rank, TUNESMITH_FLOAT32);
  tunesmith_linear_cpu(&linear, x, static_cast<float*>(s.data()), y, accumulate);
}

// Queries or keys: projected, normalized head by head if the model does that, and rotated.
void project_and_rotate(const tunesmith_decode_layer& layer, const tunesmith_linear& linear,
                        const tunesmith_norm& norm, const void* h, const void* cos, const void* sin,
                        void* out) {
  const int64_t width = linear.out_features, heads = width / layer.head_size;
  const Buffer projected(layer.rows * width, layer.dtype),
      normalized(layer.rows * width, layer.dtype);
  project(linear, h, projected.data(), false);
  const void* rotated = projected.data();
  if (norm.weight != nullptr) {
    normalize(norm, layer.dtype, rotated, layer.rows * heads, layer.head_size, normalized.data());
    rotated = normalized.data();
  }
  tunesmith_rotary_cpu(rotated, cos, sin, layer.dtype, layer.rows, layer.rows, heads,
                       layer.head_size, false, out);
}

// Puts [rows, key heads, head size] at `position` of [rows, key heads, capacity, head size].
void append_to_cache(const tunesmith_decode_layer& layer, const void* from, int64_t position,
                     void* cache) {
  const int64_t nbytes = layer.head_size * size_of(layer.dtype);
  const int64_t rows = layer.rows * (layer.key.out_features / layer.head_size);
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(static_cast<char*>(cache) + (row * layer.capacity + position) * nbytes,
                static_cast<const char*>(from) + row * nbytes, size_t(nbytes));
  }
}

}  // namespace
}  // namespace tunesmith

using namespace tunesmith;

void tunesmith_decode_layer_cpu(const struct tunesmith_decode_layer* layer, void* x,
                                const void* cos, const void* sin, const int64_t* first,
                                int64_t position) {
  const int dtype = layer->dtype;
  const int64_t rows = layer->rows, hidden = layer->query.in_features;
  const Buffer h(rows * hidden, dtype);
  normalize(layer->attention_norm, dtype, x, rows, hidden, h.data());
  {
    const int64_t width = layer->query.out_features, key_width = layer->key.out_features;
    const Buffer q(rows * width, dtype), attention_out(rows * width, dtype);
    const Buffer k(rows * key_width, dtype), v(rows * key_width, dtype);
    project_and_rotate(*layer, layer->query, layer->query_norm, h.data(), cos, sin, q.data());
    project_and_rotate(*layer, layer->key, layer->key_norm, h.data(), cos, sin, k.data());
    project(layer->value, h.data(), v.data(), false);
    append_to_cache(*layer, k.data(), position, layer->keys);
    append_to_cache(*layer, v.data(), position, layer->values);
    tunesmith_attention_decode_cpu(q.data(), layer->keys, layer->values, first, dtype, rows,
                                   width / layer->head_size, key_width / layer->head_size,
                                   layer->head_size, layer->capacity, position + 1, layer->scale,
                                   attention_out.data());
    project(layer->output, attention_out.data(), x, true);
  }
  normalize(layer->mlp_norm, dtype, x, rows, hidden, h.data());
  const int64_t intermediate = rows * layer->gate.out_features;
  const Buffer gate(intermediate, dtype), up(intermediate, dtype);
  project(layer->gate, h.data(), gate.data(), false);
  project(layer->up, h.data(), up.data(), false);
  tunesmith_gated_cpu(gate.data(), up.data(), dtype, intermediate, layer->activation, gate.data());
  project(layer->down, gate.data(), x, true);
}
