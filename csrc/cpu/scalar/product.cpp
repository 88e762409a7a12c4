// Products without vector instructions but those that every x86-64 has.
#include "../product.h"
#include "../product_fp32.h"
#include "../isa.h"

namespace tunesmith {
namespace {

// Four numbers in a row: what compilers turn into the vectors of the baseline.
struct Float4 {
  float at[4];
};

struct Scalar {
  using V = Float4;
  static constexpr int kLanes = 4;
  static constexpr int kTileRows = 4;
  static constexpr int kDepth = 256;

  using Codes = const FourBitTable&;

  static void fetch_scales(const Matrix& matrix, int64_t first, int64_t count, float* out) {
    tunesmith::fetch_scales(matrix, first, count, out);
  }

  static V set(float value) { return {{value, value, value, value}}; }
  static V broadcast(const float* at) { return set(*at); }
  static V load(const float* at) {
    V values;
    memcpy(values.at, at, sizeof values.at);
    return values;
  }
  static void store(float* at, V values) { memcpy(at, values.at, sizeof values.at); }
  static V add(V a, V b) {
    for (int i = 0; i < 4; ++i) a.at[i] += b.at[i];
    return a;
  }
  static V mul(V a, V b) {
    for (int i = 0; i < 4; ++i) a.at[i] *= b.at[i];
    return a;
  }
  static V fma(V a, V b, V c) {
    for (int i = 0; i < 4; ++i) c.at[i] += a.at[i] * b.at[i];
    return c;
  }

  // Writes the transpose of kLanes x kLanes floats; the rows are as far apart as the strides say.
  static void transpose(const float* from, int64_t stride, float* to, int64_t to_stride) {
    for (int r = 0; r < kLanes; ++r) {
      for (int c = 0; c < kLanes; ++c) to[c * to_stride + r] = from[r * stride + c];
    }
  }

  static V load(const void* data, int type, int64_t at) {
    V values;
    for (int i = 0; i < 4; ++i) values.at[i] = load_float(data, type, at + i);
    return values;
  }
  static void store(void* data, int type, int64_t at, V values) {
    for (int i = 0; i < 4; ++i) store_float(data, type, at + i, values.at[i]);
  }
  static V masked(V values, const uint8_t* keep, float keep_scale) {
    for (int i = 0; i < 4; ++i) values.at[i] = keep[i] ? values.at[i] * keep_scale : 0.0f;
    return values;
  }

  template <typename At>
  static void dequantize64(const uint8_t* packed, const FourBitTable& table, float scale, At at) {
    for (int64_t j = 0; j < 64; j += 4) {
      float* out = at(j);
      for (int i = 0; i < 4; i += 2) {
        const uint8_t pair = packed[(j + i) / 2];
        out[i] = table.values[pair >> 4] * scale;
        out[i + 1] = table.values[pair & 0xF] * scale;
      }
    }
  }
};

}  // namespace

void multiply_scalar(const Product& product) {
  if (product.transposed) return multiply_transposed<Fp32Arithmetic<Scalar>>(product);
  multiply_plain<Fp32Arithmetic<Scalar>>(product);
}

}  // namespace tunesmith
