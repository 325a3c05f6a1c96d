// Where Winograd's products may stand for the sums. A result of a tile is made from all 4 × 4 values of its window and
// all 3 × 3 of the kernel, with cancellation, so that its rounding error goes by the largest of them even where the sum
// itself does not read that one. Hence, with sums over the channels:
//
//   tile               Σ|d| of the window is at most `most_of_centre` times that of the pixels which all results read,
//                      and that of no pixel is more than `most_of_pixel` of it
//   weight             no position of the kernel has less than 1/`most_of_position` of another's Σ|g|; at most one kernel
//                      in `kernels_per_partial` has zeros beside other values, as those of a masked convolution do
//   weight's gradient  in no tile have Σ|d| of a channel of the window and Σ|dL/dy| of one of the gradient a product above
//                      `most_of_products` of what the tiles' products of the means over the channels add up to, where
//                      both are more than `most_of_mean` times the mean of all channels and tiles; where one is it, that
//                      is in all results, and `most_of_products_alone` is the bound
//
// and nothing is infinite or NaN, or near enough to overflow on the way. A tile that is not so is left to the vendor's
// convolution, and everything is where many tiles or the weight are not.
#pragma once

#include <cmath>
#include <limits>

#include "winograd.h"

namespace normpass {
namespace winograd {

constexpr int kernel_size = 9;
constexpr int most_of_centre = 8;  // 4 where all pixels are alike
constexpr float most_of_pixel = 0.75f;
constexpr int most_of_position = 32;
constexpr int64_t kernels_per_partial = 4096;
constexpr double most_of_mean = 16, most_of_products = 0.125, most_of_products_alone = 4;

// What the convolution and its gradient return instead of a number of tiles.
constexpr int unknown_type = -1, all_left = -2;

template <class A> NORMPASS_ALWAYS_INLINE Vector<A> magnitude(const Vector<A>& v) {
  typedef std::conditional_t<sizeof(A) == 8, uint64_t, uint32_t> Bits;
  typedef Bits AllBits __attribute__((vector_size(vector_bytes)));
  constexpr Bits all_but_sign = std::numeric_limits<Bits>::max() >> 1;
  return {(typename Vector<A>::Values)((AllBits)v.values & all_but_sign)};
}

template <class A> NORMPASS_ALWAYS_INLINE Vector<A> larger(const Vector<A>& a, const Vector<A>& b) {
  return {a.values > b.values ? a.values : b.values};
}

template <class A> NORMPASS_ALWAYS_INLINE Vector<A> smaller(const Vector<A>& a, const Vector<A>& b) {
  return {a.values < b.values ? a.values : b.values};
}

// One value of all lanes, two vectors at a time becoming one by `f`.
template <class A, class F> NORMPASS_ALWAYS_INLINE A fold_lanes(Vector<A> v, F f) {
  constexpr int n = Vector<A>::lanes;
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> Index;
  typedef Index Indices __attribute__((vector_size(vector_bytes)));
#pragma GCC unroll 4
  for (int step = n / 2; step > 0; step /= 2) {
    Indices other;
    for (int i = 0; i < n; ++i) other[i] = i ^ step;
    v = f(v, Vector<A>{__builtin_shuffle(v.values, other)});
  }
  return v.values[0];
}

template <class A> NORMPASS_ALWAYS_INLINE A sum_of_lanes(const Vector<A>& v) {
  return fold_lanes(v, [](const Vector<A>& a, const Vector<A>& b) NORMPASS_INLINED_LAMBDA { return a + b; });
}

template <class A> NORMPASS_ALWAYS_INLINE A largest_of_lanes(const Vector<A>& v) {
  return fold_lanes(v, [](const Vector<A>& a, const Vector<A>& b) NORMPASS_INLINED_LAMBDA { return larger(a, b); });
}

// --- of a weight ---------------------------------------------------------------------------------------------------

// Of kernels, each a lane of nine vectors.
template <class A> class KernelSums {
  using V = Vector<A>;
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> Count;
  typedef Count Counts __attribute__((vector_size(vector_bytes)));

 public:
  NORMPASS_ALWAYS_INLINE void add(const V* kernel) {
    V low = magnitude(kernel[0]), high = low;
    sums_[0] += low;
#pragma GCC unroll 8
    for (int p = 1; p < kernel_size; ++p) {
      const V value = magnitude(kernel[p]);
      sums_[p] += value;
      low = smaller(low, value), high = larger(high, value);
    }
    largest_ = larger(largest_, high);
    partial_ -= (low.values == A(0)) & (high.values > A(0));
  }

  void merge(const KernelSums& other) {
    for (int p = 0; p < kernel_size; ++p) sums_[p] += other.sums_[p];
    largest_ = larger(largest_, other.largest_);
    partial_ += other.partial_;
  }

  A largest() const { return largest_of_lanes(largest_); }

  bool allow(int64_t kernels) const {
    A low = sum_of_lanes(sums_[0]), high = low, total = low;
    for (int p = 1; p < kernel_size; ++p) {
      const A sum = sum_of_lanes(sums_[p]);
      low = std::min(low, sum), high = std::max(high, sum), total += sum;
    }
    int64_t partial = 0;
    for (int64_t lane = 0; lane < V::lanes; ++lane) partial += partial_[lane];
    return std::isfinite(total) && low * most_of_position >= high && partial * kernels_per_partial <= kernels;
  }

 private:
  V sums_[kernel_size] = {}, largest_ = {};
  Counts partial_ = {};
};

// --- of tiles ------------------------------------------------------------------------------------------------------

// Which of the tiles that are transformed must be left to the vendor's.
template <class A> class Balance {
  using V = Vector<A>;

 public:
  // largest: magnitude of a weight's value.
  explicit Balance(A largest) : most_(std::numeric_limits<A>::max() / (A(64) * std::max(A(1), largest))) {}

  // has_second_row, has_second_column: of results.
  NORMPASS_ALWAYS_INLINE void begin(bool has_second_row, bool has_second_column) {
    one_row_ = !has_second_row, one_column_ = !has_second_column;
    all_ = edge_ = V{};
    for (V& pixel : centre_) pixel = V{};
  }

  NORMPASS_ALWAYS_INLINE void add(const V* d) {
    const V a = magnitude(d[5]), b = magnitude(d[6]), c = magnitude(d[9]), e = magnitude(d[10]);
    const V above = magnitude(d[1]) + magnitude(d[2]), before = magnitude(d[4]) + magnitude(d[8]);
    const V first = magnitude(d[0]);
    const V last = magnitude(d[3]) + magnitude(d[7]) + (magnitude(d[11]) + magnitude(d[12])) +
                   (magnitude(d[13]) + magnitude(d[14]) + magnitude(d[15]));
    centre_[0] += a, centre_[1] += b, centre_[2] += c, centre_[3] += e;
    all_ += (a + b) + (c + e) + above + (before + first) + last;
    if (one_row_) edge_ += above;
    if (one_column_) edge_ += before;
    if (one_row_ && one_column_) edge_ += first;
  }

  NORMPASS_ALWAYS_INLINE void end(int64_t t) {
    A centre = sum_of_lanes(edge_), pixel = 0;
    for (const V& lanes : centre_) {
      const A sum = sum_of_lanes(lanes);
      centre += sum, pixel = std::max(pixel, sum);
    }
    const A all = sum_of_lanes(all_);
    const bool is_flat = all <= most_of_centre * centre && pixel <= most_of_pixel * all;
    if (!(is_flat && all <= most_)) left_.push_back(t);
  }

  std::vector<int64_t>& left() { return left_; }

 private:
  A most_;
  V all_, centre_[4], edge_;  // of all pixels; of those that all results read, the middle ones and others
  bool one_row_, one_column_;
  std::vector<int64_t> left_;
};

// Σ|values| of tiles: the mean of the channels, and the largest.
template <class A, int EDGE> class Magnitudes {
  using V = Vector<A>;

 public:
  struct OfTile {
    A mean, largest;
  };

  Magnitudes(int64_t tiles, int64_t channels) : of_tiles_(tiles), share_(A(1) / static_cast<A>(channels)) {}

  NORMPASS_ALWAYS_INLINE void begin(bool, bool) { sum_ = largest_ = V{}; }

  NORMPASS_ALWAYS_INLINE void add(const V* values) {
    V rows[EDGE];
#pragma GCC unroll 4
    for (int i = 0; i < EDGE; ++i) {
      rows[i] = magnitude(values[i * EDGE]);
#pragma GCC unroll 4
      for (int j = 1; j < EDGE; ++j) rows[i] += magnitude(values[i * EDGE + j]);
    }
    V sum = rows[0];
#pragma GCC unroll 4
    for (int i = 1; i < EDGE; ++i) sum += rows[i];
    sum_ += sum;
    largest_ = larger(largest_, sum);
  }

  NORMPASS_ALWAYS_INLINE void end(int64_t t) { of_tiles_[t] = {sum_of_lanes(sum_) * share_, largest_of_lanes(largest_)}; }

  const OfTile& operator[](int64_t t) const { return of_tiles_[t]; }

 private:
  V sum_, largest_;
  std::vector<OfTile> of_tiles_;
  A share_;
};

// Of many tiles: the sums of the means and of their products, and the largest of each.
class Products {
 public:
  template <class A>
  void add(const Magnitudes<A, window>& inputs, const Magnitudes<A, tile>& gradients, int64_t tiles) {
    for (int64_t t = 0; t < tiles; ++t) {
      const double input = inputs[t].mean, gradient = gradients[t].mean;
      inputs_ += input, gradients_ += gradient, products_ += input * gradient;
      largest_.push_back({inputs[t].largest, gradients[t].largest});
    }
    count_ += tiles;
  }

  void add_sums(const Products& other) {
    inputs_ += other.inputs_, gradients_ += other.gradients_, products_ += other.products_;
    count_ += other.count_;
  }

  // Whether its tiles, from `first` on, are good enough beside the sums of `all`. `growth`: of these sums, expected.
  bool allow(int64_t first, const Products& all, double growth) const {
    const double share = most_of_mean / std::max(1.0, all.count_);
    const double input = share * all.inputs_, gradient = share * all.gradients_;
    const double products = growth * all.products_;
    for (size_t t = first; t < largest_.size(); ++t) {
      const auto& [x, g] = largest_[t];
      const bool both = x > input && g > gradient;
      if (x * g > (both ? most_of_products : most_of_products_alone) * products) return false;
    }
    return std::isfinite(all.inputs_) && std::isfinite(all.gradients_);
  }

 private:
  double inputs_ = 0, gradients_ = 0, products_ = 0, count_ = 0;
  std::vector<std::pair<double, double>> largest_;
};

}  // namespace winograd
}  // namespace normpass
