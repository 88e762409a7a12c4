// The norm of all gradients of a model, and its limit. Memory is what this waits for, so there is
// nothing to gain by an instruction set.
#include <algorithm>
#include <cmath>
#include <vector>

#include "../kernels.h"
#include "parallel.h"
#include "elements.h"

namespace tunesmith {
namespace {

// Some elements of one tensor; a model has small tensors and large ones.
struct Piece {
  void* tensor;
  int64_t first, last;
};

constexpr int64_t kPiece = int64_t(1) << 14;

std::vector<Piece> pieces_of(void* const* tensors, const int64_t* numels, int64_t count) {
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t first = 0; first < numels[i]; first += kPiece) {
      pieces.push_back({tensors[i], first, std::min(numels[i], first + kPiece)});
    }
  }
  return pieces;
}

template <typename Element>
double squares_of(const Piece& piece) {
  const auto* const values = static_cast<const typename Element::Storage*>(piece.tensor);
  double sum = 0.0;
  for (int64_t begin = piece.first; begin < piece.last; begin += kSummedAtOnce) {
    const int64_t end = std::min(piece.last, begin + kSummedAtOnce);
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = begin; i < end; ++i)
      part += Element::widen(values[i]) * Element::widen(values[i]);
    if (!(part > 1e-30f && part < 1e30f)) {  // a square may have gone past what fp32 can hold
      double exact = 0.0;
      for (int64_t i = begin; i < end; ++i)
        exact += double(Element::widen(values[i])) * double(Element::widen(values[i]));
      sum += exact;
    } else {
      sum += part;
    }
  }
  return sum;
}

template <typename Element>
void scale(const Piece& piece, float factor) {
  auto* const values = static_cast<typename Element::Storage*>(piece.tensor);
#pragma omp simd
  for (int64_t i = piece.first; i < piece.last; ++i)
    values[i] = Element::narrow(Element::widen(values[i]) * factor);
}

template <typename Element>
float clip_norm(const std::vector<Piece>& pieces, float max_norm) {
  std::vector<double> squares(pieces.size());
  constexpr int64_t kGrain = 4;
  const auto each_piece = [&](auto work) {
    parallel_for(int64_t(pieces.size()), kGrain, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) work(size_t(i));
    });
  };
  each_piece([&](size_t i) { squares[i] = squares_of<Element>(pieces[i]); });
  double sum = 0.0;  // in one order, however many threads there were
  for (const double each : squares) sum += each;
  const float norm = float(std::sqrt(sum));
  const float factor = max_norm / (norm + 1e-6f);
  if (!(factor >= 1.0f)) {  // also where it is no number: what is then left says so
    each_piece([&](size_t i) { scale<Element>(pieces[i], factor); });
  }
  return norm;
}

}  // namespace
}  // namespace tunesmith

using namespace tunesmith;

float tunesmith_clip_norm_cpu(void* const* tensors, const int64_t* numels, int64_t count, int dtype,
                              float max_norm) {
  float norm = 0.0f;
  with_element(dtype, [&](auto element) {
    norm = clip_norm<decltype(element)>(pieces_of(tensors, numels, count), max_norm);
  });
  return norm;
}
