// y = (x − mean)·scale + shift of one norm, per channel. Forward and backward both use `AffineValues::value`, so that the sign
// of y, and with it a ReLU's mask, is the same in both.
#pragma once

#include "layout.h"

namespace normpass {

template <class A> struct Affine {
  Values<A> mean, scale, shift;
  Values<A> slope;  // below 0, of a PReLU; empty where there is none

  // `group`: channels that have one mean and one variance.
  Affine(int64_t width, int64_t channels, const A* weight, const A* bias, const A* mean_of, const A* var, double eps,
         int64_t group = 1, const A* slope_of = nullptr)
      : mean(width), scale(width), shift(width), slope(slope_of == nullptr ? 0 : width) {
    for (int64_t c = 0; c < channels; ++c) {
      mean[c] = mean_of[c / group];
      scale[c] = (weight == nullptr ? A(1) : weight[c]) / std::sqrt(var[c / group] + static_cast<A>(eps));
      shift[c] = bias == nullptr ? A(0) : bias[c];
    }
    for (int64_t i = channels; i < width; ++i) {
      mean[i] = mean[i - channels];
      scale[i] = scale[i - channels];
      shift[i] = shift[i - channels];
    }
    for (int64_t i = 0; i < static_cast<int64_t>(slope.size()); ++i) slope[i] = slope_of[i % channels];
  }
};

// The parameters of one tile: PerChannel is OnePerValue or OneForAll.
template <class PerChannel> struct AffineAt {
  PerChannel mean, scale, shift;
};

template <class Walk, class A> auto affine_at(const Walk& walk, const Affine<A>& affine, int64_t position) {
  using PerChannel = decltype(walk.at(affine.mean, position));
  return AffineAt<PerChannel>{walk.at(affine.mean, position), walk.at(affine.scale, position),
                              walk.at(affine.shift, position)};
}

// Those of one value: loaded once for all runs of a tile.
template <class A> struct AffineValues {
  A mean, scale, shift;
  template <class PerChannel>
  NORMPASS_ALWAYS_INLINE AffineValues(const AffineAt<PerChannel>& at, int64_t i)
      : mean(at.mean[i]), scale(at.scale[i]), shift(at.shift[i]) {}
  NORMPASS_ALWAYS_INLINE A value(A centred) const { return multiply_add(centred, scale, shift); }
};

// The vectors of a norm as a caller gives them: (C,), of the wide type; weight, bias and slope may be null.
struct NormVectors {
  const void *weight, *bias, *mean, *var;
  double eps;
  const void* slope = nullptr;
};

// Calls f(a null pointer to the storage type, walk, affine) for a tensor of this dtype and layout.
template <class F> int with_affine(int dtype, const Layout& layout, const NormVectors& of, F f) {
  return with_dtype(dtype, [&](auto* storage) {
    using A = Wide<std::remove_pointer_t<decltype(storage)>>;
    auto wide = [](const void* values) { return static_cast<const A*>(values); };
    with_layout(layout, [&](const auto& walk) {
      f(storage, walk,
        Affine<A>(walk.width(), layout.channels, wide(of.weight), wide(of.bias), wide(of.mean), wide(of.var), of.eps, 1,
                  wide(of.slope)));
    });
  });
}

}  // namespace normpass
