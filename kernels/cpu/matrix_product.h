// Products of small matrices: the right one two vectors wide, the left one with any strides.
#pragma once

#include "vector.h"

namespace normpass {

#if defined(__AVX512F__)
constexpr int rows_at_once = 12;  // with two vectors wide sums: 24 of 32 registers
#elif defined(__AVX2__)
constexpr int rows_at_once = 6;
#else
constexpr int rows_at_once = 4;
#endif

// A sum of sums of so many products rounds less than one long sum: of 512 about a third. (What is added to a sum is not
// that long.)
constexpr int64_t products_at_once = 64;

// ROWS rows of two vectors: c (+)= Σ_k a[k · a_step + r · a_row] · b[k]
template <int ROWS, bool ADD, class A>
NORMPASS_ALWAYS_INLINE void multiply_some(const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t k, A* c,
                                          int64_t c_row) {
  using V = Vector<A>;
  V left[ROWS] = {}, right[ROWS] = {};
  for (int64_t i = 0; i < k; ++i, a += a_step, b += 2 * V::lanes) {
    V b0 = V::load(b), b1 = V::load(b + V::lanes);
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r) {
      V value = V::all(a[r * a_row]);
      left[r].add_product(value, b0);
      right[r].add_product(value, b1);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r, c += c_row) {
    if (ADD) {
      left[r] += V::load(c);
      right[r] += V::load(c + V::lanes);
    }
    left[r].store(c);
    right[r].store(c + V::lanes);
  }
}

template <int ROWS, bool ADD, class A>
NORMPASS_ALWAYS_INLINE void multiply_rows(const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t k, A* c,
                                          int64_t c_row) {
  constexpr int64_t width = 2 * Vector<A>::lanes;
  const int64_t some = ADD ? k : std::min(products_at_once, k);
  multiply_some<ROWS, ADD>(a, a_row, a_step, b, some, c, c_row);
  for (int64_t i = some; i < k; i += products_at_once)
    multiply_some<ROWS, true>(a + i * a_step, a_row, a_step, b + i * width, std::min(products_at_once, k - i), c, c_row);
}

// The same of `count` rows.
template <bool ADD, class A>
NORMPASS_SHARED void multiply(int64_t count, const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t k, A* c,
                              int64_t c_row) {
  int64_t r = 0;
  for (; r + rows_at_once <= count; r += rows_at_once)
    multiply_rows<rows_at_once, ADD>(a + r * a_row, a_row, a_step, b, k, c + r * c_row, c_row);
  for (; r + 4 <= count; r += 4) multiply_rows<4, ADD>(a + r * a_row, a_row, a_step, b, k, c + r * c_row, c_row);
  for (; r < count; ++r) multiply_rows<1, ADD>(a + r * a_row, a_row, a_step, b, k, c + r * c_row, c_row);
}

}  // namespace normpass
