// z = act((x − mean)·scale + shift + residual) over one tile: the loop that every op which makes z runs, so that all of
// them round alike.
#pragma once

#include "affine.h"

namespace normpass {

template <int RUNS, class A, class PerChannel, class Activation>
NORMPASS_SHARED void forward_tile(Runs<const A> x, Runs<const A> residual, Runs<A> z, int64_t n, AffineAt<PerChannel> at,
                  Activation activation) {
  if (residual.values == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      AffineValues<A> affine(at, i);
#pragma GCC unroll 4
      for (int run = 0; run < RUNS; ++run) z(run, i) = activation.value(affine.value(x(run, i) - affine.mean));
    }
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      AffineValues<A> affine(at, i);
#pragma GCC unroll 4
      for (int run = 0; run < RUNS; ++run)
        z(run, i) = activation.value(affine.value(x(run, i) - affine.mean) + residual(run, i));
    }
  }
}

}  // namespace normpass
