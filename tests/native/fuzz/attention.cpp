// Attention over segments, forward and backward, and for one query a row, against their formulas.
#include <algorithm>
#include <cmath>
#include <vector>

#include "check.h"
#include "close.h"
#include "input.h"
#include "memory.h"

using fuzz::check_close;
using fuzz::Input;
using fuzz::kUnit;
using fuzz::Sum;
using fuzz::Tensor;

namespace {

float scale_of(Input& input) { return input.pick<float>({0.125f, 1.0f, 0.0f, -0.5f}); }

bool comparable(std::initializer_list<const Tensor*> tensors) {
  return fuzz::largest(tensors) < 1e3;
}

void decode(Input& input) {
  const int dtype = input.dtype();
  const fuzz::Kind kind = input.kind();
  const bool long_ago = input.one_in(6);
  const int64_t rows = input.up_to(4), key_heads = 1 + input.up_to(2), shared = 1 + input.up_to(3);
  const int64_t size = input.one_in(8) ? 512 - input.up_to(3) : 1 + input.up_to(80);
  const int64_t capacity = input.up_to(long_ago ? 300 : 40), length = input.up_to(capacity);
  const int64_t heads = key_heads * shared, misaligned = input.up_to(3);
  const float scale = scale_of(input);
  std::vector<int64_t> first(static_cast<size_t>(rows));
  for (int64_t& key : first) key = input.up_to(length);
  const auto tensor = [&](int64_t count) {
    return Tensor(dtype, count, input.up_to(3)).fill(input.random(), kind);
  };
  const int64_t cached = rows * key_heads * capacity * size;
  const Tensor q = tensor(rows * heads * size), keys = tensor(cached), values = tensor(cached);

  fuzz::with_every_isa([&] {
    const Tensor out(dtype, rows * heads * size, misaligned);
    tunesmith_attention_decode_cpu(q.data(), keys.data(), values.data(), first.data(), dtype, rows,
                                   heads, key_heads, size, capacity, length, scale, out.data());
    if (!comparable({&q, &keys, &values})) return;
    for (int64_t head = 0; head < rows * heads; ++head) {
      const int64_t row = head / heads;
      const int64_t cache = (row * key_heads + head % heads / shared) * capacity * size;
      const int64_t begin = first[size_t(row)];
      std::vector<Sum> scores(static_cast<size_t>(length));
      double most = -INFINITY, most_size = 0;
      for (int64_t key = begin; key < length; ++key) {
        Sum& score = scores[size_t(key)];
        for (int64_t d = 0; d < size; ++d) {
          score.add(scale * q[head * size + d] * keys[cache + key * size + d]);
        }
        most = std::max(most, score.value);
        most_size = std::max(most_size, score.size);
      }
      double whole = 0;
      for (int64_t key = begin; key < length; ++key)
        whole += std::exp(scores[size_t(key)].value - most);
      const double off = (2 * double(size + 8) * most_size + double(length) + 64) * kUnit;
      for (int64_t d = 0; d < size; ++d) {
        Sum exact;
        for (int64_t key = begin; key < length; ++key) {
          exact.add(std::exp(scores[size_t(key)].value - most) / whole *
                    values[cache + key * size + d]);
        }
        check_close("out", head * size + d, out[head * size + d], exact.value,
                    2 * off * exact.size + 0x1p-120, dtype);
      }
    }
  });
}

// Segments of `tokens` tokens of each row, in `one` stretch or several: some see themselves, some
// share the keys of a stretch.
std::vector<tunesmith_segment> draw_segments(Input& input, int64_t rows, int64_t tokens, bool one) {
  std::vector<tunesmith_segment> segments;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t start = 0; start < tokens;) {
      const int64_t stop = one ? tokens : start + 1 + input.up_to(tokens - start - 1);
      const unsigned form = input.byte() % 8;
      if (form < 4) {
        segments.push_back({row, start, stop, start, stop - 1, 1});
      } else if (form < 5) {  // the first of them are seen, and do not look
        const int64_t late = start + input.up_to(stop - start - 1);
        segments.push_back({row, late, stop, start, stop - 1, 1});
      } else if (form < 7) {  // two segments on the same keys, the second sees all of them
        const int64_t middle = start + input.up_to(stop - start);
        if (middle > start) segments.push_back({row, start, middle, start, stop - 1, 0});
        if (middle < stop)
          segments.push_back({row, middle, stop, start, stop - 1, input.byte() % 2});
      }  // else a gap
      start = stop;
    }
  }
  return segments;
}

void forward(Input& input) {
  const bool by_tiles = input.one_in(2);
  const int dtype = by_tiles ? TUNESMITH_BFLOAT16 : input.dtype();
  const fuzz::Kind kind = input.kind();
  const int64_t rows = input.up_to(2), tokens = 1 + input.up_to(input.one_in(3) ? 150 : 50);
  const int64_t key_heads = 1 + input.up_to(1), heads = key_heads * (1 + input.up_to(2));
  const int64_t size = by_tiles ? 32 * (1 + input.up_to(2)) : 1 + input.up_to(40);
  const float scale = scale_of(input);
  const std::vector<tunesmith_segment> segments =
      draw_segments(input, rows, tokens, input.one_in(4));
  const auto tensor = [&](int64_t of_heads) {
    return Tensor(dtype, rows * tokens * of_heads * size, input.up_to(3))
        .fill(input.random(), kind);
  };
  const Tensor q = tensor(heads), k = tensor(key_heads), v = tensor(key_heads);
  const tunesmith_attention job = {
      rows,    tokens,   heads,    key_heads,       size,
      dtype,   q.data(), k.data(), v.data(),        nullptr,
      nullptr, nullptr,  scale,    segments.data(), int64_t(segments.size())};
  const int64_t misaligned = input.up_to(3);
  const bool compared = comparable({&q, &k, &v});

  fuzz::with_every_isa([&] {
    const Tensor out(dtype, q.count(), misaligned), lse(TUNESMITH_FLOAT32, rows * heads * tokens);
    tunesmith_attention_cpu(&job, out.data(), lse.floats());
    std::vector<bool> written(size_t(rows * heads * tokens));
    for (const tunesmith_segment& segment : segments) {
      for (int64_t i = 0; i < heads * (segment.stop - segment.start); ++i) {
        const int64_t head = i % heads, query = segment.start + i / heads;
        const int64_t begin = segment.first_key,
                      end = (segment.causal ? query : segment.last_key) + 1;
        const int64_t at = ((segment.row * tokens + query) * heads + head) * size;
        const auto at_key = [&](int64_t key) {
          return ((segment.row * tokens + key) * key_heads + head / (heads / key_heads)) * size;
        };
        written[size_t((segment.row * tokens + query) * heads + head)] = true;
        if (!compared) continue;
        std::vector<Sum> scores;
        double most = -INFINITY, most_size = 0, whole = 0;
        for (int64_t key = begin; key < end; ++key) {
          Sum score;
          for (int64_t d = 0; d < size; ++d) score.add(scale * q[at + d] * k[at_key(key) + d]);
          most = std::max(most, score.value);
          most_size = std::max(most_size, score.size);
          scores.push_back(score);
        }
        for (const Sum& score : scores) whole += std::exp(score.value - most);
        // a score is scaled down by a rounded log of two, and each sum scaled once a turn
        const double off = (2 * double(size + 16) * most_size + 2 * double(tokens) + 64) * kUnit;
        const int64_t of_lse = (segment.row * heads + head) * tokens + query;
        const double its_lse = most + std::log(whole);
        check_close("lse", of_lse, lse[of_lse], its_lse, off + 8 * kUnit * std::fabs(its_lse),
                    TUNESMITH_FLOAT32);
        for (int64_t d = 0; d < size; ++d) {
          Sum exact;
          double rounding =
              0;  // shares are rounded to what the products take: a small one to a fixed unit
          for (int64_t key = begin; key < end; ++key) {
            const double p = std::exp(scores[size_t(key - begin)].value - most) / whole;
            exact.add(p * v[at_key(key) + d]);
            rounding += fuzz::half_unit(p, dtype) * std::fabs(v[at_key(key) + d]);
          }
          const double slack = 2 * off * exact.size + rounding + 0x1p-110;
          check_close("out", at + d, out[at + d], exact.value, slack, dtype);
        }
      }
    }
    for (int64_t i = 0; i < rows * tokens * heads; ++i) {
      if (written[size_t(i)]) continue;
      if (!out.untouched(i * size, (i + 1) * size))
        fuzz::fail("out of %lld was written", (long long)i);
    }
  });
}

void backward(Input& input) {
  const int dtype = input.dtype();
  const fuzz::Kind kind = input.kind();
  const bool by_tiles = input.one_in(3);  // heads of whole tiles, and enough tokens for several
  const int64_t rows = input.up_to(by_tiles ? 1 : 3);
  const int64_t tokens = 1 + input.up_to(by_tiles          ? (input.one_in(8) ? 140 : 70)
                                         : input.one_in(4) ? 50
                                                           : 20);
  const int64_t key_heads = 1 + input.up_to(1), heads = key_heads * (1 + input.up_to(2));
  const int64_t size = by_tiles ? 32 * (1 + input.up_to(1)) : 1 + input.up_to(40);
  const float scale = scale_of(input);
  const std::vector<tunesmith_segment> segments =
      draw_segments(input, rows, tokens, input.one_in(4));
  const auto tensor = [&](int64_t of_heads) {
    return Tensor(dtype, rows * tokens * of_heads * size, input.up_to(3))
        .fill(input.random(), kind);
  };
  const Tensor q = tensor(heads), k = tensor(key_heads), v = tensor(key_heads);
  const Tensor out = tensor(heads), grad_out = tensor(heads);
  const Tensor lse = Tensor(TUNESMITH_FLOAT32, rows * heads * tokens);
  const auto at = [&](int64_t row, int64_t token, int64_t of_heads, int64_t head) {
    return ((row * tokens + token) * of_heads + head) * size;
  };
  const auto dot = [&](const Tensor& a, int64_t i, const Tensor& b, int64_t j, double factor) {
    Sum sum;
    for (int64_t d = 0; d < size; ++d) sum.add(factor * a[i + d] * b[j + d]);
    return sum;
  };

  // value: the gradient; size: by how much it may be off before it is rounded
  std::vector<Sum> grad_q(q.count()), grad_k(k.count()), grad_v(v.count());
  std::vector<bool> of_query(size_t(q.count())), of_key(size_t(k.count()));
  const bool compared = comparable({&q, &k, &v, &out, &grad_out});
  const double wide = double(size + 16) * kUnit, sums = double(3 * tokens + 32) * kUnit;
  const auto add = [&](Sum& sum, double factor, double off, double number) {
    sum.value += factor * number;
    sum.size += (off + sums * std::fabs(factor)) * std::fabs(number);
  };
  for (const tunesmith_segment& segment : segments) {
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t key_head = head / (heads / key_heads);
      for (int64_t query = segment.start; query < segment.stop; ++query) {
        const int64_t at_q = at(segment.row, query, heads, head);
        const int64_t seen = (segment.causal ? query : segment.last_key) + 1;
        std::vector<Sum> scores;
        double most = -INFINITY, whole = 0;
        for (int64_t key = segment.first_key; key < seen; ++key) {
          scores.push_back(dot(q, at_q, k, at(segment.row, key, key_heads, key_head), scale));
          most = std::max(most, scores.back().value);
        }
        for (const Sum& score : scores) whole += std::exp(score.value - most);
        float& its_lse = lse.floats()[(segment.row * heads + head) * tokens + query];
        its_lse = float(most + std::log(whole));
        const Sum delta = dot(out, at_q, grad_out, at_q, 1);
        for (int64_t d = 0; d < size; ++d) of_query[size_t(at_q + d)] = true;
        for (int64_t key = segment.first_key; key <= segment.last_key; ++key) {
          const int64_t at_k = at(segment.row, key, key_heads, key_head);
          for (int64_t d = 0; d < size; ++d) of_key[size_t(at_k + d)] = true;
          if (key >= seen || !compared) continue;
          const Sum& score = scores[size_t(key - segment.first_key)];
          const double p = std::exp(score.value - double(its_lse));
          const double off_p =
              p * (wide * score.size + 16 * kUnit + 2 * kUnit * std::fabs(its_lse)) + 0x1p-124;
          const Sum flow = dot(grad_out, at_q, v, at_k, 1);
          const double slope = p * (flow.value - delta.value) * scale;
          const double reach = (flow.size + delta.size) * std::fabs(scale);
          double off_slope = off_p * reach + p * 2 * wide * reach;
          off_slope += fuzz::half_unit(std::fabs(slope) + off_slope, dtype);
          const double rounded_p = off_p + fuzz::half_unit(p + off_p, dtype);
          for (int64_t d = 0; d < size; ++d) {
            add(grad_v[size_t(at_k + d)], p, rounded_p, grad_out[at_q + d]);
            add(grad_k[size_t(at_k + d)], slope, off_slope, q[at_q + d]);
            add(grad_q[size_t(at_q + d)], slope, off_slope, k[at_k + d]);
          }
        }
      }
    }
  }
  const tunesmith_attention job = {rows,
                                   tokens,
                                   heads,
                                   key_heads,
                                   size,
                                   dtype,
                                   q.data(),
                                   k.data(),
                                   v.data(),
                                   out.data(),
                                   grad_out.data(),
                                   lse.floats(),
                                   scale,
                                   segments.data(),
                                   int64_t(segments.size())};
  const int64_t misaligned = input.up_to(3);

  fuzz::with_every_isa([&] {
    const Tensor our_q(dtype, q.count(), misaligned), our_k(dtype, k.count(), misaligned);
    const Tensor our_v(dtype, v.count(), misaligned);
    tunesmith_attention_backward_cpu(&job, our_q.data(), our_k.data(), our_v.data());
    const auto check = [&](const char* what, const Tensor& ours, const std::vector<Sum>& exact,
                           const std::vector<bool>& written) {
      for (int64_t i = 0; i < ours.count(); ++i) {
        if (!written[size_t(i)]) {
          if (!ours.untouched(i, i + 1)) fuzz::fail("%s[%lld] was written", what, (long long)i);
        } else if (compared) {
          check_close(what, i, ours[i], exact[size_t(i)].value, exact[size_t(i)].size + 0x1p-120,
                      dtype);
        }
      }
    };
    check("grad_q", our_q, grad_q, of_query);
    check("grad_k", our_k, grad_k, of_key);
    check("grad_v", our_v, grad_v, of_key);
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input input(data, size);
  fuzz::use_threads(input.byte());
  const unsigned part = input.byte() % 8;
  if (part < 3) {
    decode(input);
  } else if (part < 5) {
    forward(input);
  } else {
    backward(input);
  }
  return 0;
}
