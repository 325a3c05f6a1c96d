// z = act((x − mean)·scale + shift + residual) over one tile: the loop that every op which makes z runs, so that all of
// them round alike.
#pragma once

#include "affine.h"

namespace normpass {

template <int RUNS, class A, class PerChannel, class Activation>
NORMPASS_SHARED void forward_tile(const Runs<A>& x, const Runs<A>& residual, const Target<A>& z, int64_t n,
                                  const AffineAt<PerChannel>& at, const Activation& given) {
  const Activation activation = given;  // its fields, read under a condition, would keep the loop scalar
  if (residual.values == nullptr) {
    write_lines<RUNS>(n, z, [&](int64_t begin, auto values, Line<A> to) {
      x.template prefetch<RUNS>(begin);
      const int64_t count = values;
#pragma GCC ivdep
#pragma GCC unroll 1
      for (int64_t i = 0; i < count; ++i) {
        AffineValues<A> affine(at, begin + i);
#pragma GCC unroll 4
        for (int run = 0; run < RUNS; ++run)
          to(run, i) = activation.value(affine.value(x(run, begin + i) - affine.mean));
      }
    });
  } else {
    write_lines<RUNS>(n, z, [&](int64_t begin, auto values, Line<A> to) {
      x.template prefetch<RUNS>(begin), residual.template prefetch<RUNS>(begin);
      const int64_t count = values;
#pragma GCC ivdep
#pragma GCC unroll 1
      for (int64_t i = 0; i < count; ++i) {
        AffineValues<A> affine(at, begin + i);
#pragma GCC unroll 4
        for (int run = 0; run < RUNS; ++run)
          to(run, i) = activation.value(affine.value(x(run, begin + i) - affine.mean) + residual(run, begin + i));
      }
    });
  }
}

}  // namespace normpass
