// The gradient of a depthwise convolution's weight, from one row of the result's gradient.
#pragma once

#include "depthwise.h"

namespace normpass {

#if defined(__AVX512F__)
constexpr int gradients_at_once = 4;  // registers: a row of the kernel, `gradients_at_once` of grad, what they meet
#else
constexpr int gradients_at_once = 2;
#endif

// One row of the kernel's gradient from one row of `grad` and the row of z that it meets.
template <int WIDTH, int STRIDE, class A>
void add_row(const Vector<A>* grad, const Vector<A>* input, int64_t n, Vector<A>* sums) {
  Vector<A> sum[WIDTH];
#pragma GCC unroll 16
  for (int j = 0; j < WIDTH; ++j) sum[j] = sums[j];
  for (int64_t x = 0; x < n; x += gradients_at_once) {
    Vector<A> met[WIDTH + STRIDE * (gradients_at_once - 1)];
#pragma GCC unroll 16
    for (int j = 0; j < WIDTH + STRIDE * (gradients_at_once - 1); ++j) met[j] = input[x * STRIDE + j];
#pragma GCC unroll 4
    for (int i = 0; i < gradients_at_once; ++i) {
      Vector<A> g = grad[x + i];
#pragma GCC unroll 16
      for (int j = 0; j < WIDTH; ++j) sum[j].add_product(g, met[STRIDE * i + j]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < WIDTH; ++j) sums[j] = sum[j];
}

template <class A>
using AddRow = void (*)(const Vector<A>* grad, const Vector<A>* input, int64_t n, Vector<A>* sums);

// Null for a width or a stride that it is not written for.
template <class A> AddRow<A> add_row_function(int64_t width, int64_t stride) {
  switch (width * 10 + stride) {
    case 31: return add_row<3, 1, A>;
    case 32: return add_row<3, 2, A>;
    case 51: return add_row<5, 1, A>;
    case 52: return add_row<5, 2, A>;
    case 71: return add_row<7, 1, A>;
    case 72: return add_row<7, 2, A>;
  }
  return nullptr;
}

// Sums of `size` vectors for every vector of channels, to `total`, where a channel's lie together.
template <class A> void add_lanes(const Values<Vector<A>>& sums, int64_t size, int64_t channels, double* total) {
  constexpr int64_t n = Vector<A>::lanes;
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t k = 0; k < size; ++k) total[c * size + k] += sums[c / n * size + k].values[c % n];
}

// The sum over threads, each with sums of its own.
template <class A> void add_shares(const std::vector<std::vector<double>>& shares, A* to) {
  for (size_t i = 0; i < shares[0].size(); ++i) {
    double sum = 0;
    for (const std::vector<double>& share : shares) sum += share[i];
    to[i] = static_cast<A>(sum);
  }
}

}  // namespace normpass
