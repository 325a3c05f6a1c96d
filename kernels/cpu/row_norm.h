// Norms over the last values of a tensor (layer norm, RMS norm): every row of `width` values that lie one behind the
// other has a mean and a variance of its own, and the weight and the bias belong to the positions in it.
//
// A row is normalized into a buffer first, x̂ = (x − mean)·r, from which everything else is computed; so it is read from
// memory once. RMS norm has no mean: it is 0, and the variance is the mean square.
#pragma once

#include "activate.h"

namespace normpass {

struct RowNorm {
  int64_t rows, width;
  bool is_centred;  // not of an RMS norm
};

template <class S> constexpr bool is_narrow = !std::is_same<S, Wide<S>>::value;

// Of some lines in the wide type, of all in double.
constexpr int64_t row_part = 4 * tile_size;

// Σ f(i) of a row. By lines, so that a line's sums are one register; and by several, for each waits for the one before.
template <class A, class F> NORMPASS_ALWAYS_INLINE double sum_of_row(int64_t width, F f) {
  constexpr int64_t some = 4 * line<A>;
  double total = 0;
  for (int64_t begin = 0; begin < width; begin += row_part) {
    alignas(64) A sums[some] = {};
    const int64_t end = std::min(width, begin + row_part);
    int64_t at = begin;
    for (; at + some <= end; at += some) {
#pragma GCC ivdep
#pragma GCC unroll 1
      for (int64_t i = 0; i < some; ++i) sums[i] += f(at + i);
    }
    for (; at + line<A> <= end; at += line<A>) {
#pragma GCC ivdep
#pragma GCC unroll 1
      for (int64_t i = 0; i < line<A>; ++i) sums[i] += f(at + i);
    }
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = 0; i < end - at; ++i) sums[line<A> + i] += f(at + i);
    for (int64_t i = 0; i < line<A>; ++i)
      sums[i] = (sums[i] + sums[line<A> + i]) + (sums[2 * line<A> + i] + sums[3 * line<A> + i]);
    total += static_cast<double>(sum_of_line(sums));
  }
  return total;
}

template <class A> struct MomentsOfRow {
  A mean, var;
};

// In two passes over a row in the cache: nothing cancels.
template <class A> NORMPASS_SHARED MomentsOfRow<A> moments_of_row(const RowNorm& norm, const A* x) {
  const double count = static_cast<double>(norm.width);
  A mean = 0;
  if (norm.is_centred) mean = static_cast<A>(sum_of_row<A>(norm.width, [x](int64_t i) { return x[i]; }) / count);
  const double squares = sum_of_row<A>(norm.width, [x, mean](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
  return {mean, static_cast<A>(squares / count)};
}

// The buffers of a thread, each of a row. `ones` and `zeros` stand for a weight or a bias that is not there.
template <class A> struct RowBuffers {
  Values<A> wide, normalized, dy, result, zeros, weight, bias;

  RowBuffers(int64_t width, const A* given_weight, const A* given_bias)
      : wide(width), normalized(width), dy(width), result(width), zeros(width, A(0)), weight(width, A(1)),
        bias(width, A(0)) {
    if (given_weight != nullptr) std::copy(given_weight, given_weight + width, weight.begin());
    if (given_bias != nullptr) std::copy(given_bias, given_bias + width, bias.begin());
  }
};

template <class S> const Wide<S>* read_row(const S* from, Wide<S>* buffer, int64_t width) {
  return read_tile(from, 0, buffer, {0, width, 0}).values;
}

template <class A>
NORMPASS_SHARED void normalize_row(const A* x, A* normalized, int64_t width, A mean, A rstd) {
  each_line<A>(width, [&](int64_t begin, auto values) {
    const int64_t count = values;
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = 0; i < count; ++i) normalized[begin + i] = (x[begin + i] - mean) * rstd;
  });
}

// y itself: the same numbers as by x̂.
template <class A>
NORMPASS_SHARED void affine_row(const A* x, A* y, int64_t width, A mean, A rstd, const A* weight, const A* bias) {
  each_line<A>(width, [&](int64_t begin, auto values) {
    const int64_t count = values;
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = 0; i < count; ++i)
      y[begin + i] = multiply_add((x[begin + i] - mean) * rstd, weight[begin + i], bias[begin + i]);
  });
}

// y = x̂·weight + bias, for the loops of an activation.
template <class A>
Run<A> run_of_row(const RowBuffers<A>& buffers, const A* grad, A* result, int64_t width) {
  const A* const x = buffers.normalized.data();
  return {x, nullptr, grad, result, buffers.zeros.data(), buffers.weight.data(), buffers.bias.data(), 1, width, x, x};
}

}  // namespace normpass
