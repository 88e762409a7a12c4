// The CPU side of kernels.h: picks the instruction set at run time, and shares blocks among
// threads.
#ifdef TUNESMITH_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>

#include "../kernels.h"
#include "../four_bit.h"
#include "dispatch.h"
#include "isa.h"
#include "parallel.h"

namespace tunesmith {
namespace {

constexpr FourBitTable kNf4 = make_nf4_table();
constexpr FourBitTable kFp4 = make_fp4_table();

// below this many elements a thread is not worth waking
constexpr int64_t kGrain = 1 << 15;

#ifdef TUNESMITH_X86
bool has_avx2() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kF16c = 1u << 29;  // which not every compiler can be asked for by name
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & kF16c) != 0;
}
#ifdef TUNESMITH_EMULATED_AVX512
bool has_avx512() { return true; }
bool has_avx512_bf16() { return true; }
bool has_amx_bf16() { return true; }
#else
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_pairs() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Intel's pairs of bf16 take two passes through one port, and so twice the time of fp32 on two.
bool has_avx512_bf16() { return has_pairs() && !__builtin_cpu_is("intel"); }

// Whether the CPU has the tiles and the system saves them; Linux wants to be asked for that first.
bool has_amx_bf16() {
#ifdef __linux__
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  if (!has_pairs() || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kBf16) == 0 || (d & kTiles) == 0) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif
#endif

struct Choice {
  const Isa* isa;
  bool (*supported)();
};

// Best first. The questions are asked here, in code that runs on any CPU.
const Choice kChoices[] = {
#ifdef TUNESMITH_X86
    {&amx_bf16_isa, has_amx_bf16},      {&avx512_bf16_isa, has_avx512_bf16},
    {&avx512_isa, has_avx512},          {&avx2_isa, has_avx2},
#endif
    {&scalar_isa, [] { return true; }},
};

const Isa* find(const char* name) {
  for (const Choice& choice : kChoices) {
    if (choice.supported() && std::strcmp(choice.isa->name, name) == 0) return choice.isa;
  }
  return nullptr;
}

const Isa* best() {
  for (const Choice& choice : kChoices) {
    if (choice.supported()) return choice.isa;
  }
  return &scalar_isa;
}

// TUNESMITH_ISA names the set to use; one that this CPU has not got is passed over.
const Isa* first_choice() {
  const char* wanted = std::getenv("TUNESMITH_ISA");
  const Isa* isa = wanted == nullptr ? nullptr : find(wanted);
  return isa == nullptr ? best() : isa;
}

constexpr int64_t kRowsAtOnce = 512;

void* at_element(const void* data, int type, int64_t element) {
  return const_cast<char*>(static_cast<const char*>(data) + element * size_of(type));
}

// A plain matrix without its first rows.
Matrix after_rows(Matrix matrix, int64_t rows) {
  if (matrix.data == nullptr) return matrix;
  const int64_t elements = rows * matrix.columns;
  matrix.data = at_element(matrix.data, matrix.type, elements);
  if (matrix.keep != nullptr) matrix.keep += elements;
  return matrix;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa{first_choice()};
  return isa;
}

// Does the `count` parts of a job, of so many elements each (none, even), on several threads.
template <typename Job>
void share(void (*Isa::*part)(const Job&, int64_t, int64_t), const Job& job, int64_t count,
           int64_t elements) {
  const auto work = current().load()->*part;
  parallel_for(count, divide_up(kGrain, std::max<int64_t>(elements, 1)),
               [&](int64_t first, int64_t last) { work(job, first, last); });
}

}  // namespace

// The instruction sets pack the whole of `left` first. So that this takes little memory
// beside x itself, the tokens of a long product are multiplied some at a time; a 4-bit factor is
// dequantized anew for each, a small part of the work by then.
void multiply(Product product) {
  if (product.columns <= 0) return;
  const Isa& isa = *current().load();
  const int64_t max_rows = kRowsAtOnce * divide_up(max_threads(), 8);
  for (int64_t left = product.rows; left > 0; left -= max_rows) {
    product.rows = left < max_rows ? left : max_rows;
    isa.multiply(product);
    if (left <= max_rows) return;  // nothing lies behind the end
    product.left = after_rows(product.left, max_rows);
    product.left2 = after_rows(product.left2, max_rows);
    if (product.keep != nullptr) product.keep += max_rows * product.columns;
    product.out = at_element(product.out, product.out_type, max_rows * product.row_stride);
  }
}

void softmax_forward(const SoftmaxForwardJob& job) { current().load()->softmax_forward(job); }

void softmax_backward(const SoftmaxJob& job) { current().load()->softmax_backward(job); }

bool attention_forward(const tunesmith_attention& job, const AttentionGroup& group, int64_t head,
                       void* out, float* lse) {
  const auto own = current().load()->attention_forward;
  return own != nullptr && own(job, group, head, out, lse);
}

bool attention_backward(const tunesmith_attention& job, const AttentionGroup& group,
                        int64_t key_head, void* grad_q, void* grad_k, void* grad_v) {
  const auto own = current().load()->attention_backward;
  return own != nullptr && own(job, group, key_head, grad_q, grad_k, grad_v);
}

const FourBitTable* table_of(int type) {
  if (type == TUNESMITH_NF4) return &kNf4;
  return type == TUNESMITH_FP4 ? &kFp4 : nullptr;
}

}  // namespace tunesmith

using namespace tunesmith;

void tunesmith_quantize_4bit_cpu(const void* weight, int dtype, int64_t numel, int64_t blocksize,
                                 int type, uint8_t* packed, float* absmax) {
  const QuantizeJob job = {weight, dtype, numel, blocksize, table_of(type), packed, absmax};
  const Isa& isa = *current();
  parallel_for(divide_up(numel, blocksize), divide_up(kGrain, blocksize),
               [&](int64_t first, int64_t last) { isa.quantize(job, first, last); });
}

void tunesmith_quantize_absmax_cpu(const float* absmax, int64_t blocks, const float* nested_offset,
                                   uint8_t* codes, float* nested_absmax) {
  const AbsmaxJob job = {absmax, blocks, *nested_offset, codes, nested_absmax};
  parallel_for(divide_up(blocks, kNestedBlocksize), 8,
               [&](int64_t first, int64_t last) { quantize_absmax(job, first, last); });
}

void tunesmith_dequantize_4bit_cpu(const uint8_t* packed, const void* absmax,
                                   const float* nested_absmax, const float* nested_offset,
                                   int64_t numel, int64_t blocksize, int type, int dtype,
                                   void* out) {
  const float offset = nested_offset == nullptr ? 0.0f : *nested_offset;
  const DequantizeJob job = {packed,    absmax,         nested_absmax, offset, numel,
                             blocksize, table_of(type), dtype,         out};
  const Isa& isa = *current();
  parallel_for(divide_up(numel, blocksize), divide_up(kGrain, blocksize),
               [&](int64_t first, int64_t last) { isa.dequantize(job, first, last); });
}

void tunesmith_logps_cpu(void* logits, const int64_t* labels, int dtype, int64_t rows,
                         int64_t columns, bool gradients, float* logps) {
  const LogpsJob job = {logits, labels, columns, dtype, gradients, logps};
  share(&Isa::logps, job, rows, columns);
}

void tunesmith_rms_norm_cpu(const void* x, const void* weight, int dtype, int64_t rows,
                            int64_t columns, float eps, bool from_one, void* y, float* scale) {
  const NormJob job = {x, weight, nullptr, columns, dtype, eps, from_one, scale, y, nullptr};
  share(&Isa::norm, job, rows, columns);
}

void tunesmith_rms_norm_backward_cpu(const void* grad_y, const void* x, const void* weight,
                                     const float* scale, int dtype, int64_t rows, int64_t columns,
                                     bool from_one, const void* plus, void* grad_x) {
  // the backward pass only reads the scale
  const NormJob job = {
      x, weight, grad_y, columns, dtype, 0.0f, from_one, const_cast<float*>(scale), grad_x, plus};
  share(&Isa::norm, job, rows, columns);
}

void tunesmith_gated_cpu(const void* gate, const void* up, int dtype, int64_t numel, int activation,
                         void* y) {
  const GatedJob job = {gate, up, nullptr, dtype, activation, y, nullptr, nullptr};
  share(&Isa::gated, job, numel, 1);
}

void tunesmith_gated_backward_cpu(const void* grad_y, const void* gate, const void* up, int dtype,
                                  int64_t numel, int activation, void* grad_gate, void* grad_up) {
  const GatedJob job = {gate, up, grad_y, dtype, activation, nullptr, grad_gate, grad_up};
  share(&Isa::gated, job, numel, 1);
}

void tunesmith_rotary_cpu(const void* x, const void* cos, const void* sin, int dtype,
                          int64_t tokens, int64_t positions, int64_t heads, int64_t size,
                          bool backward, void* out) {
  const RotaryJob job = {x, cos, sin, positions, heads, size, dtype, backward, out};
  share(&Isa::rotary, job, tokens, heads * size);
}

void tunesmith_attention_decode_cpu(const void* q, const void* keys, const void* values,
                                    const int64_t* first, int dtype, int64_t rows, int64_t heads,
                                    int64_t key_heads, int64_t size, int64_t capacity,
                                    int64_t length, float scale, void* out) {
  const AttentionDecodeJob job = {q,    keys,     values, first, heads, key_heads,
                                  size, capacity, length, scale, dtype, out};
  share(&Isa::attention_decode, job, rows * heads, length * size);
}

const char* tunesmith_isa(void) { return current().load()->name; }

const char* tunesmith_isa_at(int index) {
  for (const Choice& choice : kChoices) {
    if (choice.supported() && index-- == 0) return choice.isa->name;
  }
  return nullptr;
}

bool tunesmith_set_isa(const char* name) {
  const Isa* isa = find(name);
  if (isa != nullptr) current() = isa;
  return isa != nullptr;
}

bool tunesmith_has_openmp(void) { return openmp_loaded(); }
