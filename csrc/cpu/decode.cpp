// One layer of a model that is decoded, made of the functions of kernels.h: calling those one by one from
// Python takes longer than they do.
#include <cstring>

#include "../kernels.h"
#include "isa.h"
#include "pool.h"

namespace tunesmith {
namespace {

// Work space of one call.
class Space {
 public:
  Space(int64_t elements, int dtype) : memory_(size_t(elements * size_of(dtype))) {}
  void* data() const { return memory_.as<void>(); }

 private:
  Scratch memory_;
};

// y = norm(x) over rows of `columns`.
void normalize(const tunesmith_norm& norm, int dtype, const void* x, int64_t rows, int64_t columns,
               void* y) {
  const Space scale(rows, TUNESMITH_FLOAT32);
  tunesmith_rms_norm_cpu(x, norm.weight, dtype, rows, columns, norm.eps, norm.from_one, y,
                         static_cast<float*>(scale.data()));
}

void project(const tunesmith_linear& linear, const void* x, void* y, bool accumulate) {
  const Space s(linear.tokens * linear.rank, TUNESMITH_FLOAT32);
  tunesmith_linear_cpu(&linear, x, static_cast<float*>(s.data()), y, accumulate);
}

// Queries or keys: projected, normalized head by head if the model does that, and turned.
void project_and_turn(const tunesmith_decode_layer& layer, const tunesmith_linear& linear,
                      const tunesmith_norm& norm, const void* h, const void* cos, const void* sin,
                      void* out) {
  const int64_t width = linear.out_features, heads = width / layer.size;
  const Space projected(layer.rows * width, layer.dtype), normalized(layer.rows * width, layer.dtype);
  project(linear, h, projected.data(), false);
  const void* turned = projected.data();
  if (norm.weight != nullptr) {
    normalize(norm, layer.dtype, turned, layer.rows * heads, layer.size, normalized.data());
    turned = normalized.data();
  }
  tunesmith_rotary_cpu(turned, cos, sin, layer.dtype, layer.rows, layer.rows, heads, layer.size, false,
                       out);
}

// Puts [rows, key heads, size] where the `at`-th token of [rows, key heads, capacity, size] is.
void keep(const tunesmith_decode_layer& layer, const void* from, int64_t at, void* cache) {
  const int64_t nbytes = layer.size * size_of(layer.dtype);
  const int64_t rows = layer.rows * (layer.key.out_features / layer.size);
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(static_cast<char*>(cache) + (row * layer.capacity + at) * nbytes,
                static_cast<const char*>(from) + row * nbytes, size_t(nbytes));
  }
}

}  // namespace
}  // namespace tunesmith

using namespace tunesmith;

void tunesmith_decode_layer_cpu(const struct tunesmith_decode_layer* layer, void* x, const void* cos,
                                const void* sin, const int64_t* first, int64_t at) {
  const int dtype = layer->dtype;
  const int64_t rows = layer->rows, hidden = layer->query.in_features;
  const Space h(rows * hidden, dtype);
  normalize(layer->before, dtype, x, rows, hidden, h.data());
  {
    const int64_t width = layer->query.out_features, key_width = layer->key.out_features;
    const Space q(rows * width, dtype), seen(rows * width, dtype);
    const Space k(rows * key_width, dtype), v(rows * key_width, dtype);
    project_and_turn(*layer, layer->query, layer->query_norm, h.data(), cos, sin, q.data());
    project_and_turn(*layer, layer->key, layer->key_norm, h.data(), cos, sin, k.data());
    project(layer->value, h.data(), v.data(), false);
    keep(*layer, k.data(), at, layer->keys);
    keep(*layer, v.data(), at, layer->values);
    tunesmith_attention_decode_cpu(q.data(), layer->keys, layer->values, first, dtype, rows,
                                   width / layer->size, key_width / layer->size, layer->size,
                                   layer->capacity, at + 1, layer->scale, seen.data());
    project(layer->output, seen.data(), x, true);
  }
  normalize(layer->after, dtype, x, rows, hidden, h.data());
  const int64_t inner = rows * layer->gate.out_features;
  const Space gate(inner, dtype), up(inner, dtype);
  project(layer->gate, h.data(), gate.data(), false);
  project(layer->up, h.data(), up.data(), false);
  tunesmith_gated_cpu(gate.data(), up.data(), dtype, inner, layer->activation, gate.data());
  project(layer->down, gate.data(), x, true);
}
