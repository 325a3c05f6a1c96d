// The transforms of F(2×2, 3×3), of vectors of values; `winograd_conv2d.cpp` says what they are for. Each is of one row
// or column, with `s` and `t` from element to element of what is read and written, and below of both.
#pragma once

#include "vector.h"

namespace normpass {

constexpr int tile = 2, window = 4;  // rows and columns: of the results, and of the input that they are made from

template <class V> NORMPASS_ALWAYS_INLINE void transform_input(const V* d, int s, V* to, int t) {  // Bᵀ
  to[0] = d[0] - d[2 * s];
  to[t] = d[s] + d[2 * s];
  to[2 * t] = d[2 * s] - d[s];
  to[3 * t] = d[s] - d[3 * s];
}

template <class V> NORMPASS_ALWAYS_INLINE void transform_kernel(const V* g, int s, V* to, int t) {  // G
  V ends = (g[0] + g[2 * s]) * 0.5f, middle = g[s] * 0.5f;
  to[0] = g[0];
  to[t] = ends + middle;
  to[2 * t] = ends - middle;
  to[3 * t] = g[2 * s];
}

template <class V> NORMPASS_ALWAYS_INLINE void transform_output(const V* m, int s, V* to, int t) {  // Aᵀ
  to[0] = m[0] + m[s] + m[2 * s];
  to[t] = m[s] - m[2 * s] - m[3 * s];
}

template <class V> NORMPASS_ALWAYS_INLINE void transform_gradient(const V* y, int s, V* to, int t) {  // A
  to[0] = y[0];
  to[t] = y[0] + y[s];
  to[2 * t] = y[0] - y[s];
  to[3 * t] = -y[s];
}

template <class V> NORMPASS_ALWAYS_INLINE void transform_product(const V* u, int s, V* to, int t) {  // Gᵀ
  V sum = (u[s] + u[2 * s]) * 0.5f;
  to[0] = u[0] + sum;
  to[t] = (u[s] - u[2 * s]) * 0.5f;
  to[2 * t] = sum + u[3 * s];
}

// `F` over the COLUMNS columns, then over the rows; RESULT values come of each.
#define NORMPASS_BOTH_WAYS(NAME, F, COLUMNS, RESULT)                                                    \
  template <class V> NORMPASS_ALWAYS_INLINE void NAME(const V* from, V* to) {                           \
    V between[RESULT * COLUMNS];                                                                        \
    _Pragma("GCC unroll 4") for (int j = 0; j < COLUMNS; ++j) F(from + j, COLUMNS, between + j, COLUMNS); \
    _Pragma("GCC unroll 4") for (int i = 0; i < RESULT; ++i) F(between + i * COLUMNS, 1, to + i * RESULT, 1); \
  }
NORMPASS_BOTH_WAYS(input_of, transform_input, window, window)
NORMPASS_BOTH_WAYS(kernel_of, transform_kernel, 3, window)
NORMPASS_BOTH_WAYS(output_of, transform_output, window, tile)
NORMPASS_BOTH_WAYS(gradient_of, transform_gradient, tile, window)
NORMPASS_BOTH_WAYS(product_of, transform_product, window, 3)
#undef NORMPASS_BOTH_WAYS

}  // namespace normpass
