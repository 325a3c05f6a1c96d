// Where Winograd's products may stand for the sums. A result of a tile is made from all 4 × 4 values of its window and
// all 3 × 3 of the kernel, with cancellation, so that its rounding error goes by the largest of them even where the sum
// itself does not read that one. Hence, with Σ over the channels:
//
//   tile               Σd² of the window is at most `most_of_centre` times that of the 2 × 2 pixels in its middle, which
//                      all results read, and neither column of these has more than `most_of_column` of it
//   weight             no position of the kernel has less than 1/`most_of_position` of another's Σ|g|; at most one kernel
//                      in `kernels_per_partial` has zeros beside other values, as those of a masked convolution do
//   weight's gradient  the largest |d·dL/dy|, of any two values, is at most `most_of_products` times the sum that one
//                      result has if all values are as large as their mean
//
// and nothing is infinite or NaN, or so large that its square is. A tile that is not so is left to the vendor's
// convolution, and everything is where many tiles or the weight are not. Squares, for one instruction adds them up. In
// float they vanish below 10⁻²²: such values count as zeros here.
#pragma once

#include <cmath>
#include <limits>

#include "winograd.h"

namespace normpass {
namespace winograd {

constexpr int kernel_size = 9;
constexpr float most_of_centre = 16, most_of_column = 0.9f;  // 4 and 1/8 where all pixels are alike
constexpr int most_of_position = 32;
constexpr double largest_weight = 1e12;
constexpr int64_t kernels_per_partial = 4096;
constexpr double most_of_products = 16;

// What the convolution and its gradient return instead of a number of tiles.
constexpr int unknown_type = -1, all_left = -2;

template <class A> struct IndicesOf {
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> Index;
  typedef Index Type __attribute__((vector_size(vector_bytes)));
};
template <class A> using Indices = typename IndicesOf<A>::Type;

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

// The lanes of a and b, half as many as sums of two, side by side.
template <class A> NORMPASS_ALWAYS_INLINE Vector<A> add_halves(const Vector<A>& a, const Vector<A>& b) {
  constexpr int n = Vector<A>::lanes;
  Indices<A> even, odd;
  for (int i = 0; i < n; ++i) even[i] = 2 * i, odd[i] = 2 * i + 1;
  return {__builtin_shuffle(a.values, b.values, even) + __builtin_shuffle(a.values, b.values, odd)};
}

template <class A> NORMPASS_ALWAYS_INLINE Vector<A> exchanged(const Vector<A>& v, int step) {
  Indices<A> other;
  for (int i = 0; i < Vector<A>::lanes; ++i) other[i] = i ^ step;
  return {__builtin_shuffle(v.values, other)};
}

template <class A> NORMPASS_ALWAYS_INLINE A sum_of_lanes(Vector<A> v) {
#pragma GCC unroll 4
  for (int step = Vector<A>::lanes / 2; step > 0; step /= 2) v += exchanged(v, step);
  return v.values[0];
}

// The same of four vectors.
template <class A> NORMPASS_ALWAYS_INLINE void sums_of_lanes(const Vector<A>* v, A* sums) {
  constexpr int n = Vector<A>::lanes;
  const Vector<A> first = add_halves(v[0], v[1]), second = add_halves(v[2], v[3]);
  if constexpr (n == 2) {
    for (int i = 0; i < 2; ++i) sums[i] = first.values[i], sums[2 + i] = second.values[i];
  } else {
    Vector<A> all = add_halves(first, second);
#pragma GCC unroll 2
    for (int step = n / 8; step > 0; step /= 2) all += exchanged(all, step);
    for (int i = 0; i < 4; ++i) sums[i] = all.values[i * n / 4];
  }
}

template <class A> NORMPASS_ALWAYS_INLINE A largest_of_lanes(Vector<A> v) {
#pragma GCC unroll 4
  for (int step = Vector<A>::lanes / 2; step > 0; step /= 2) v = larger(v, exchanged(v, step));
  return v.values[0];
}

// --- of a weight ---------------------------------------------------------------------------------------------------

// Of kernels, each a lane of nine vectors.
template <class A> class KernelSums {
  using V = Vector<A>;
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

  bool allow(int64_t kernels) const {
    double low = std::numeric_limits<double>::infinity(), high = 0, total = 0;
    for (const V& lanes : sums_) {
      double sum = 0;
      for (int64_t lane = 0; lane < V::lanes; ++lane) sum += lanes.values[lane];
      low = std::min(low, sum), high = std::max(high, sum), total += sum;
    }
    int64_t partial = 0;
    for (int64_t lane = 0; lane < V::lanes; ++lane) partial += partial_[lane];
    const bool has_size = std::isfinite(total) && static_cast<double>(largest_of_lanes(largest_)) <= largest_weight;
    return has_size && low * most_of_position >= high && partial * kernels_per_partial <= kernels;
  }

 private:
  V sums_[kernel_size] = {}, largest_ = {};
  Indices<A> partial_ = {};
};

// --- of tiles ------------------------------------------------------------------------------------------------------

// Where a tile lies.
struct Place {
  bool is_first, is_at_top;                // of tiles side by side; of a sample
  bool has_second_row, has_second_column;  // of results
};

// Which of the tiles that are transformed must be left to the vendor's. They stand side by side: what is in the left
// half of a window was in the right half of the one before.
template <class A> class Balance {
  using V = Vector<A>;

 public:
  // Of one tile.
  struct Sums {
    V columns[4] = {};  // of the right half: both pixels of each column that lie in the middle rows, and all others
    V* pixels;          // of all, where the left half is not known or more than the middle is read by all results
    Place place;

    NORMPASS_ALWAYS_INLINE void add(const V* d) {
      constexpr int pixels_of[] = {6, 10, 7, 11, 2, 3, 14, 15};
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) columns[i / 2].add_product(d[pixels_of[i]], d[pixels_of[i]]);
      if (pixels != nullptr)
        for (int i = 0; i < window * window; ++i) pixels[i].add_product(d[i], d[i]);
    }
  };

  NORMPASS_ALWAYS_INLINE Sums begin(const Place& place) {
    const bool is_whole = place.is_first || !place.has_second_row || !place.has_second_column;
    Sums sums{{}, is_whole ? pixels_ : nullptr, place};
    if (is_whole)
      for (V& v : pixels_) v = V{};
    return sums;
  }

  NORMPASS_ALWAYS_INLINE void end(int64_t t, const Sums& sums) {
    A columns[4];
    sums_of_lanes(sums.columns, columns);
    const A right = columns[0] + columns[1] + (columns[2] + columns[3]);
    const Edge edge = sums.pixels == nullptr ? Edge{0, 0} : add_left(sums.place);
    const A all = left_ + right, centre = column_ + columns[0] + edge.sum;
    const A peak = std::max(std::max(column_, columns[0]), edge.largest);
    const bool is_flat = all <= most_of_centre * centre && peak <= most_of_column * all;
    if (!(is_flat && all <= std::numeric_limits<A>::max())) of_block_.push_back(t);
    left_ = right, column_ = columns[1];
  }

  // Of the last block of tiles; to be emptied.
  std::vector<int64_t>& of_block() { return of_block_; }

 private:
  // Of pixels outside of the middle that all results read.
  struct Edge {
    A sum, largest;
  };

  // Sets what is known of the left half.
  NORMPASS_SHARED Edge add_left(const Place& place) {
    A sums[window * window];
    for (int i = 0; i < window * window; i += 4) sums_of_lanes(pixels_ + i, sums + i);
    left_ = sums[0] + sums[1] + sums[4] + sums[5] + sums[8] + sums[9] + sums[12] + sums[13];
    column_ = sums[5] + sums[9];
    const A above = place.has_second_row ? A(0) : A(1), before = place.has_second_column ? A(0) : A(1);
    const A sum = above * (sums[1] + sums[2]) + before * (sums[4] + sums[8]);
    const A largest = std::max(above * std::max(sums[1], sums[2]), before * std::max(sums[4], sums[8]));
    // The first pixel alone takes part in no sum but its own.
    return {sum + above * before * sums[0], largest};
  }

  V pixels_[window * window];
  A left_, column_;  // of the left half, and of its pixels in the middle
  std::vector<int64_t> of_block_;
};

// The mean and the largest magnitude of values.
template <class A, int EDGE> class Magnitudes {
  using V = Vector<A>;

 public:
  struct Sums {
    V sum, largest;
    bool is_whole;

    NORMPASS_ALWAYS_INLINE void add(const V* values) {
      if constexpr (EDGE == window) {
        constexpr int middle[] = {5, 6, 9, 10};
#pragma GCC unroll 4
        for (int i : middle) add_one(values[i]);
        if (is_whole)
          for (int i = 0; i < EDGE * EDGE; ++i) add_one(values[i]);
      } else {
#pragma GCC unroll 4
        for (int i = 0; i < EDGE * EDGE; ++i) add_one(values[i]);
      }
    }
    NORMPASS_ALWAYS_INLINE void add_one(const V& value) {
      const V size = magnitude(value);
      sum += size;
      largest = larger(largest, size);
    }
  };

  // The middles of all windows cover the images, but for their edges.
  NORMPASS_ALWAYS_INLINE Sums begin(const Place& place) {
    const bool is_whole = place.is_first || place.is_at_top || !place.has_second_row || !place.has_second_column;
    pixels_ += EDGE == tile ? 4 : is_whole ? 20 : 4;
    return {sum_, largest_, is_whole};
  }

  NORMPASS_ALWAYS_INLINE void end(int64_t, const Sums& sums) { sum_ = sums.sum, largest_ = sums.largest; }

  double sum() const {
    double total = 0;
    for (int64_t lane = 0; lane < V::lanes; ++lane) total += sum_.values[lane];
    return total;
  }
  double largest() const { return largest_of_lanes(largest_); }
  double pixels() const { return pixels_; }

 private:
  V sum_ = {}, largest_ = {};
  double pixels_ = 0;
};

// Of many values, beside how many there are.
struct Extremes {
  double sum = 0, largest = 0, count = 0;

  template <class Found> void add(const Found& found, int64_t channels) {
    sum += found.sum(), largest = std::max(largest, found.largest());
    count += found.pixels() * static_cast<double>(channels);
  }
  void add(const Extremes& other) {
    sum += other.sum, largest = std::max(largest, other.largest), count += other.count;
  }
  double mean() const { return sum / std::max(count, 1.0); }
};

// Whether no product is too much of a sum of `products`, and nothing overflows on the way to it.
template <class A> bool are_even(const Extremes& inputs, const Extremes& gradients, double products) {
  const double largest = inputs.largest * gradients.largest, most = inputs.mean() * gradients.mean() * products;
  const double limit = static_cast<double>(std::numeric_limits<A>::max()) / 256;  // transformed, each is up to 16 values
  const bool has_size = std::max(inputs.largest, gradients.largest) <= limit && largest * products <= limit;
  return has_size && std::isfinite(most) && largest <= most_of_products * most;
}

}  // namespace winograd
}  // namespace normpass
