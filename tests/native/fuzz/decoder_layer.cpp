// A decoder layer, forward and backward: that it stays within its memory whatever its shape, and
// that what is asked for does not change what is written. What its parts make of numbers is for the
// other targets.
#include <algorithm>
#include <cstring>
#include <deque>
#include <vector>

#include "check.h"
#include "input.h"
#include "memory.h"

using fuzz::Input;
using fuzz::Kind;
using fuzz::Tensor;

namespace {

class Drawn {
 public:
  explicit Drawn(Input& input) : input_(input), kind_(input.kind()) {
    layer.dtype = input.dtype();
    layer.rows = input.up_to(2);
    layer.tokens = 1 + input.up_to(input.one_in(4) ? 70 : 12);
    layer.head_size = input.one_in(3) ? 32 : 2 * (1 + input.up_to(7));
    layer.scale = input.pick<float>({0.25f, 1.0f, -0.5f});
    layer.activation = input.pick<int>({TUNESMITH_SILU, TUNESMITH_GELU_TANH});
    hidden = 1 + input.up_to(40);
    const int64_t key_heads = 1 + input.up_to(1), heads = key_heads * (1 + input.up_to(2));
    const int64_t width = heads * layer.head_size, key_width = key_heads * layer.head_size;
    const int64_t inner = 1 + input.up_to(50);
    layer.attention_norm = norm(hidden, true);
    layer.mlp_norm = norm(hidden, true);
    layer.query_norm = norm(layer.head_size, input.one_in(3));
    layer.key_norm = norm(layer.head_size, input.one_in(3));
    layer.query = linear(hidden, width);
    layer.key = linear(hidden, key_width);
    layer.value = linear(hidden, key_width);
    layer.output = linear(width, hidden);
    layer.gate = linear(hidden, inner);
    layer.up = linear(hidden, inner);
    layer.down = linear(inner, hidden);
    layer.positions =
        input.one_in(2) ? layer.tokens : std::max<int64_t>(1, layer.rows) * layer.tokens;
    layer.cos = tensor(layer.dtype, layer.positions * layer.head_size).data();
    layer.sin = tensor(layer.dtype, layer.positions * layer.head_size).data();
    for (int64_t row = 0; row < layer.rows; ++row) {
      const int64_t start = input.one_in(4) ? input.up_to(layer.tokens - 1) : 0;
      const bool causal = !input.one_in(4);
      segments_.push_back({row, start, layer.tokens, causal ? 0 : start, layer.tokens - 1, causal});
    }
    layer.segments = segments_.data();
    layer.segment_count = int64_t(segments_.size());
  }

  const Tensor& tensor(int type, int64_t count) {
    tensors_.push_back(Tensor(type, count, input_.up_to(3)).fill(input_.random(), kind_));
    return tensors_.back();
  }

  // Room for the gradients of A and B of each linear layer.
  std::vector<Tensor> adapters() const {
    std::vector<Tensor> found;
    for (const tunesmith_linear* linear : linears()) {
      found.emplace_back(linear->adapter_dtype, linear->rank * linear->in_features);
      found.emplace_back(linear->adapter_dtype, linear->rank * linear->out_features);
    }
    return found;
  }

  tunesmith_decoder_layer layer = {};
  int64_t hidden;

 private:
  std::vector<const tunesmith_linear*> linears() const {
    return {&layer.query, &layer.key, &layer.value, &layer.output,
            &layer.gate,  &layer.up,  &layer.down};
  }

  tunesmith_norm norm(int64_t features, bool there) {
    if (!there) return {};
    return {tensor(layer.dtype, features).data(), 1e-6f, input_.one_in(3)};
  }

  tunesmith_linear linear(int64_t in, int64_t out) {
    tunesmith_linear made = {};
    made.tokens = layer.rows * layer.tokens;
    made.in_features = in;
    made.out_features = out;
    made.dtype = layer.dtype;
    made.type = TUNESMITH_NF4;
    made.blocksize = 64;
    made.weight = tensor(Tensor::kBytes, (in * out + 1) / 2).data();
    const Tensor& absmax = tensor(TUNESMITH_FLOAT32, (in * out + 63) / 64);
    for (int64_t i = 0; i < absmax.count(); ++i) absmax.floats()[i] = 0.01f * float(1 + i % 7);
    made.absmax = absmax.data();
    if (input_.one_in(3)) made.bias = tensor(layer.dtype, out).data();
    made.rank = input_.up_to(3);
    made.adapter_dtype = input_.one_in(2) ? layer.dtype : TUNESMITH_FLOAT32;
    if (made.rank > 0) {
      made.lora_a = tensor(made.adapter_dtype, made.rank * in).data();
      made.lora_b = tensor(made.adapter_dtype, out * made.rank).data();
    }
    made.scaling = 0.5f;
    made.keep_scale = 1.0f;
    return made;
  }

  Input& input_;
  Kind kind_;
  std::deque<Tensor> tensors_;
  std::vector<tunesmith_segment> segments_;
};

void check_same(const char* what, const Tensor& first, const Tensor& second) {
  if (first.nbytes() == second.nbytes() &&
      std::memcmp(first.data(), second.data(), first.nbytes()) == 0)
    return;
  fuzz::fail("%s depends on what else is asked for", what);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  fuzz::use_threads(input.byte());
  Drawn drawn(input);
  const tunesmith_decoder_layer& layer = drawn.layer;
  const int64_t numel = layer.rows * layer.tokens * drawn.hidden;
  const Tensor& x = drawn.tensor(layer.dtype, numel);
  const Tensor& grad_out = drawn.tensor(layer.dtype, numel);
  const int64_t misaligned = input.up_to(3);
  const uint64_t left_out = input.byte() << 8 | input.byte();

  fuzz::with_every_isa([&] {
    const int64_t nbytes = tunesmith_decoder_layer_activation_bytes(&layer);
    const Tensor activations(Tensor::kBytes, nbytes), again(Tensor::kBytes, nbytes);
    const Tensor out(layer.dtype, numel, misaligned);
    tunesmith_decoder_layer_cpu(&layer, x.data(), activations.data(), out.data());
    tunesmith_decoder_layer_cpu(&layer, x.data(), again.data(), nullptr);
    check_same("what is kept", activations, again);

    const auto backward = [&](const Tensor* grad_x, const std::vector<Tensor>& grads,
                              uint64_t without) {
      void* asked_for[14];
      for (size_t i = 0; i < 14; ++i) {
        asked_for[i] = grads[i].count() == 0 || (without >> i & 1) != 0 ? nullptr : grads[i].data();
      }
      tunesmith_decoder_layer_backward_cpu(&layer, x.data(), activations.data(), grad_out.data(),
                                           grad_x == nullptr ? nullptr : grad_x->data(), asked_for);
    };
    const Tensor grad_x(layer.dtype, numel, misaligned);
    const std::vector<Tensor> all = drawn.adapters(), some = drawn.adapters();
    backward(&grad_x, all, 0);
    check_same("what was kept", activations, again);
    backward(nullptr, some, left_out);
    for (size_t i = 0; i < all.size(); ++i) {
      if (some[i].count() == 0) continue;
      if ((left_out >> i & 1) == 0) {
        check_same("a gradient", all[i], some[i]);
      } else if (!some[i].untouched(0, some[i].count())) {
        fuzz::fail("gradient %zu was written, and not asked for", i);
      }
    }
  });
  return 0;
}
