// What a device implements: plain C, pointers and sizes. Nothing is checked here.
//
// Blocks run over the flattened tensor; the last may be short. Code 2i is the high nibble of byte
// i; the nibble beside an odd last element is the code of zero. A matrix is row-major, without
// gaps.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

// The 4-bit types only where a `type` is asked for, the others also where a `dtype` is.
enum tunesmith_type {
  TUNESMITH_FLOAT32 = 0,
  TUNESMITH_FLOAT16 = 1,
  TUNESMITH_BFLOAT16 = 2,
  TUNESMITH_NF4 = 3,
  TUNESMITH_FP4 = 4
};

// Writes packed [ceil(numel / 2)] and absmax [blocks]. A block that holds NaN or Inf gets such an
// absmax and codes without meaning.
void tunesmith_quantize_4bit_cpu(const void* weight, int dtype, int64_t numel, int64_t blocksize,
                                 int type, uint8_t* packed, float* absmax);

// Writes codes [blocks] and nested_absmax [ceil(blocks / 256)] of absmax less the offset.
void tunesmith_quantize_absmax_cpu(const float* absmax, int64_t blocks, const float* nested_offset,
                                   uint8_t* codes, float* nested_absmax);

// Writes out [numel]. absmax is fp32 when nested_absmax is null, uint8 codes otherwise.
void tunesmith_dequantize_4bit_cpu(const uint8_t* packed, const void* absmax,
                                   const float* nested_absmax, const float* nested_offset,
                                   int64_t numel, int64_t blocksize, int type, int dtype,
                                   void* out);

// A frozen weight W [out_features, in_features] with an adapter of `rank` beside it:
//   y = x Wt + bias + scaling s Bt,  s = (keep_scale keep x) At
// Products and sums are fp32 or exacter, or fp32 sums of bf16 products where x is bf16.
struct tunesmith_linear {
  int64_t tokens;  // rows of x, y and their gradients
  int64_t in_features;
  int64_t out_features;
  int dtype;           // of x, y, their gradients and bias
  int type;            // of the weight, 4-bit or plain
  const void* weight;  // packed, or [out_features, in_features]; null leaves x Wt out
  const void* absmax;  // as for dequantize; not read for a plain weight
  const float* nested_absmax;
  const float* nested_offset;
  int64_t blocksize;
  const void* bias;    // [out_features]; may be null
  int64_t rank;        // 0 leaves the adapter out
  int adapter_dtype;   // of lora_a, lora_b and their gradients
  const void* lora_a;  // A [rank, in_features]
  const void* lora_b;  // B [out_features, rank]
  float scaling;
  const uint8_t* keep;  // dropout's mask [tokens, in_features], 1 keeps; null keeps all
  float keep_scale;
};

// Queries [start, stop) of a row of a batch see the keys from first_key on, each up to itself if
// causal and all up to last_key otherwise. The last query of a causal segment is its last key.
struct tunesmith_segment {
  int64_t row, start, stop, first_key, last_key, causal;
};

// What attention was computed from and gave: q, out and grad_out [rows, tokens, heads, head_size],
// k and v the same with key_heads, of which heads is a multiple; lse [rows, heads, tokens] is the
// log-sum-exp of each query's scores, which are `scale` q kt.
struct tunesmith_attention {
  int64_t rows, tokens, heads, key_heads, head_size;
  int dtype;
  const void* q;
  const void* k;
  const void* v;
  const void* out;
  const void* grad_out;
  const float* lse;
  float scale;
  const struct tunesmith_segment* segments;
  int64_t segment_count;
};

// Writes out and lse, of the queries of all segments; those of the struct and its grad_out are not
// read.
void tunesmith_attention_cpu(const struct tunesmith_attention* attention, void* out, float* lse);

// Writes the gradients of q, k and v, shaped as those; not of keys that no segment sees.
void tunesmith_attention_backward_cpu(const struct tunesmith_attention* attention, void* grad_q,
                                      void* grad_k, void* grad_v);

// Writes s [tokens, rank] (fp32) and y [tokens, out_features], which it adds to if `accumulate`.
void tunesmith_linear_cpu(const struct tunesmith_linear* linear, const void* x, float* s, void* y,
                          bool accumulate);

// Writes s alone.
void tunesmith_linear_project_cpu(const struct tunesmith_linear* linear, const void* x, float* s);

// Writes what is not null of grad_x [tokens, in_features] (adds to it if `accumulate`), grad_a and
// grad_b. s is what the forward wrote.
void tunesmith_linear_backward_cpu(const struct tunesmith_linear* linear, const void* x,
                                   const float* s, const void* grad_y, void* grad_x, void* grad_a,
                                   void* grad_b, bool accumulate);

// Attention of one query a row: q and out [rows, heads, size], keys and values [rows, key_heads,
// capacity, size], of which row r sees [first[r], length); size is 512 at most. A row that sees
// none gets zeros.
void tunesmith_attention_decode_cpu(const void* q, const void* keys, const void* values,
                                    const int64_t* first, int dtype, int64_t rows, int64_t heads,
                                    int64_t key_heads, int64_t size, int64_t capacity,
                                    int64_t length, float scale, void* out);

// Writes logps [rows], the log-softmax of logits [rows, columns] at a label each (0 to columns -
// 1). With `gradients` the derivatives of each by its row of logits take the place of those.
void tunesmith_logps_cpu(void* logits, const int64_t* labels, int dtype, int64_t rows,
                         int64_t columns, bool gradients, float* logps);

// RMSNorm (arXiv:1910.07467) of rows of `columns` elements: y = x scale weight, and scale [rows] =
// one over the root mean square. With `from_one` the weight is what is added to one. x, weight, y
// and the gradients are of `dtype`; `plus`, if not null, is added to grad_x.
void tunesmith_rms_norm_cpu(const void* x, const void* weight, int dtype, int64_t rows,
                            int64_t columns, float eps, bool from_one, void* y, float* scale);
void tunesmith_rms_norm_backward_cpu(const void* grad_y, const void* x, const void* weight,
                                     const float* scale, int dtype, int64_t rows, int64_t columns,
                                     bool from_one, const void* plus, void* grad_x);

enum tunesmith_activation { TUNESMITH_SILU = 0, TUNESMITH_GELU_TANH = 1 };

// A gated unit (arXiv:2002.05202): y = activation(gate) up, all [numel] of `dtype`.
void tunesmith_gated_cpu(const void* gate, const void* up, int dtype, int64_t numel, int activation,
                         void* y);
void tunesmith_gated_backward_cpu(const void* grad_y, const void* gate, const void* up, int dtype,
                                  int64_t numel, int activation, void* grad_gate, void* grad_up);

// Rotary position embedding (arXiv:2104.09864) of x [tokens, heads, size] by cos and sin
// [positions, size], of which token t takes row t % positions; element i of a head goes with i +
// size / 2. With `backward` the gradient of out to that of x.
void tunesmith_rotary_cpu(const void* x, const void* cos, const void* sin, int dtype,
                          int64_t tokens, int64_t positions, int64_t heads, int64_t size,
                          bool backward, void* out);

struct tunesmith_norm {
  const void* weight;  // null for none
  float eps;
  bool from_one;
};

// A layer of a model that generates, with all that it holds: h = norm(x), then attention over what
// the cache holds of the rows' earlier tokens, added to x; and h = norm(x), then an MLP with a
// gated unit, added to x.
struct tunesmith_decode_layer {
  int dtype;     // of x, norms, cache, cos and sin
  int64_t rows;  // of x; each is another row of the batch
  struct tunesmith_norm attention_norm, query_norm, key_norm, mlp_norm;
  struct tunesmith_linear query, key, value, output, gate, up, down;  // for `rows` tokens
  int64_t head_size;                                                  // 512 at most
  float scale;
  int activation;
  void* keys;  // [rows, key heads, capacity, size]
  void* values;
  int64_t capacity;
};

// Adds to x [rows, hidden] what the layer adds for the tokens that are at `position` of their rows,
// and appends their keys and values to the cache. cos and sin are [rows, size]; row r sees its
// tokens from first[r] on.
void tunesmith_decode_layer_cpu(const struct tunesmith_decode_layer* layer, void* x,
                                const void* cos, const void* sin, const int64_t* first,
                                int64_t position);

// A decoder layer of a model that is trained, with all that it works on but x: h = norm(x), then
// attention, added to x; and h = norm(x), then an MLP with a gated unit, added to x. Query and key
// may have norms of heads.
struct tunesmith_decoder_layer {
  int dtype;  // of all but adapters and weights
  int64_t rows, tokens;
  struct tunesmith_norm attention_norm, query_norm, key_norm, mlp_norm;
  struct tunesmith_linear query, key, value, output, gate, up, down;  // for rows times tokens
  int64_t head_size;
  float scale;
  int activation;
  const void* cos;  // [positions, size], of which token t of all takes row t % positions
  const void* sin;
  int64_t positions;
  const struct tunesmith_segment* segments;
  int64_t segment_count;
};

// How many bytes of memory the forward pass fills for the backward pass.
int64_t tunesmith_decoder_layer_activation_bytes(const struct tunesmith_decoder_layer* layer);

// Writes out [rows, tokens, hidden] and `activations`, which begins at a multiple of 64 bytes.
// Without out (null) all is done that the backward pass needs.
void tunesmith_decoder_layer_cpu(const struct tunesmith_decoder_layer* layer, const void* x,
                                 void* activations, void* out);

// Writes what is not null of grad_x and of the gradients of A and B of each linear layer, in their
// order.
void tunesmith_decoder_layer_backward_cpu(const struct tunesmith_decoder_layer* layer,
                                          const void* x, const void* activations,
                                          const void* grad_out, void* grad_x,
                                          void* const* grad_adapters);

// Returns the 2-norm of all elements of `count` tensors of `numels` elements. If it is more than
// `max_norm`, all are multiplied by max_norm / (norm + 1e-6), and so are those of which one is no
// number.
float tunesmith_clip_norm_cpu(void* const* tensors, const int64_t* numels, int64_t count, int dtype,
                              float max_norm);

// Memory that is used again: what is given back is kept, up to a limit, and handed out next time,
// so that its pages need not be touched anew. Aligned to 64 bytes; null when there is none left.
void* tunesmith_take(size_t nbytes);
void tunesmith_give_back(void* memory);

// Which instruction set the CPU kernels use; null beyond the last that this CPU can run.
const char* tunesmith_isa(void);
const char* tunesmith_isa_at(int index);
// Returns whether that one can be used; if so it is from now on.
bool tunesmith_set_isa(const char* name);
bool tunesmith_has_openmp(void);

#ifdef TUNESMITH_CUDA
// The same on the current CUDA device, put on a stream (a cudaStream_t). Returns null, or what CUDA
// calls the error of the launch.
const char* tunesmith_quantize_4bit_cuda(const void* weight, int dtype, int64_t numel,
                                         int64_t blocksize, int type, uint8_t* packed,
                                         float* absmax, void* stream);
const char* tunesmith_quantize_absmax_cuda(const float* absmax, int64_t blocks,
                                           const float* nested_offset, uint8_t* codes,
                                           float* nested_absmax, void* stream);
const char* tunesmith_dequantize_4bit_cuda(const uint8_t* packed, const void* absmax,
                                           const float* nested_absmax, const float* nested_offset,
                                           int64_t numel, int64_t blocksize, int type, int dtype,
                                           void* out, void* stream);
// A label that is none gives NaN.
const char* tunesmith_logps_cuda(void* logits, const int64_t* labels, int dtype, int64_t rows,
                                 int64_t columns, bool gradients, float* logps, void* stream);
const char* tunesmith_rms_norm_cuda(const void* x, const void* weight, int dtype, int64_t rows,
                                    int64_t columns, float eps, bool from_one, void* y,
                                    float* scale, void* stream);
const char* tunesmith_rms_norm_backward_cuda(const void* grad_y, const void* x, const void* weight,
                                             const float* scale, int dtype, int64_t rows,
                                             int64_t columns, bool from_one, void* grad_x,
                                             void* stream);
const char* tunesmith_gated_cuda(const void* gate, const void* up, int dtype, int64_t numel,
                                 int activation, void* y, void* stream);
const char* tunesmith_gated_backward_cuda(const void* grad_y, const void* gate, const void* up,
                                          int dtype, int64_t numel, int activation, void* grad_gate,
                                          void* grad_up, void* stream);
const char* tunesmith_rotary_cuda(const void* x, const void* cos, const void* sin, int dtype,
                                  int64_t tokens, int64_t positions, int64_t heads, int64_t size,
                                  bool backward, void* out, void* stream);
// Forward only, without dropout, for at most tunesmith_small_tokens() rows of x; 4-bit weights
// only. s is scratch [tokens, rank] and is written, too. Nothing is allocated and nothing waits:
// the calls can be captured in a CUDA graph.
int64_t tunesmith_small_tokens(void);
const char* tunesmith_linear_small_cuda(const struct tunesmith_linear* linear, const void* x,
                                        float* s, void* y, void* stream);
#endif
}
