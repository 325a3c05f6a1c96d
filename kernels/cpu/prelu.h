// PReLU behind a norm: y above 0, slope·y below, with a slope for each channel. It is one of two numbers times y, so it
// is in the passes themselves, not behind the pointers of activate.h.
//
//   dy = g where y > 0, else slope·g      dslope = Σ g·y over y that is not above 0
#pragma once

#include "affine.h"
#include "backward.h"

namespace normpass {

template <class A, class PerChannel>
NORMPASS_SHARED void prelu(const Runs<A>& x, const Target<A>& z, int64_t n, const AffineAt<PerChannel>& affine,
                           const PerChannel& slope) {
  write_lines<1>(n, z, [&](int64_t begin, auto values, const Line<A>& to) {
    x.template prefetch<1>(begin);
    const int64_t count = values;
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = 0; i < count; ++i) {
      const AffineValues<A> norm(affine, begin + i);
      const A y = norm.value(x(0, begin + i) - norm.mean), below = y * slope[begin + i];
      to(0, i) = y > A(0) ? y : below;
    }
  });
}

template <class A, class PerChannel> struct PreluTile {
  static constexpr bool writes = false;
  Runs<A> grad, x;
  AffineAt<PerChannel> affine;
  PerChannel slope;

  struct Channel : AffineValues<A> {
    A slope;
    NORMPASS_ALWAYS_INLINE Channel(const AffineAt<PerChannel>& at, const PerChannel& slopes, int64_t i)
        : AffineValues<A>(at, i), slope(slopes[i]) {}
  };
  template <int RUNS> NORMPASS_ALWAYS_INLINE void prefetch(int64_t i) const {
    grad.template prefetch<RUNS>(i), x.template prefetch<RUNS>(i);
  }
  NORMPASS_ALWAYS_INLINE Channel channel(int64_t i) const { return {affine, slope, i}; }
  NORMPASS_ALWAYS_INLINE Derivative<A> at(const Channel& channel, int run, int64_t i) const {
    const A centred = x(run, i) - channel.mean, outer = grad(run, i), below = outer * channel.slope;
    return {channel.value(centred) > A(0) ? outer : below, centred};
  }
};

// The same values, of which the sum of `dy` is the slope's gradient.
template <class A, class PerChannel> struct SlopeTile : PreluTile<A, PerChannel> {
  using Channel = typename PreluTile<A, PerChannel>::Channel;
  NORMPASS_ALWAYS_INLINE Derivative<A> at(const Channel& channel, int run, int64_t i) const {
    const A y = channel.value(this->x(run, i) - channel.mean), product = this->grad(run, i) * y;
    return {y > A(0) ? A(0) : product, A(0)};
  }
};
template <class A, class PerChannel> constexpr bool is_of_slope<SlopeTile<A, PerChannel>> = true;

// The source of gradients for the passes of backward.
template <class S> struct FromPrelu {
  using A = Wide<S>;
  const S *grad, *x;
  const Affine<A>& affine;

  template <class Walk> auto tile_of(const Walk& walk, TileBuffers<A>& buffers, const Tile& tile, int64_t stride) const {
    auto at = affine_at(walk, affine, tile.position);
    Runs<A> from = read_tile(x, stride, buffers.kept, tile), outer = read_tile(grad, stride, buffers.grad, tile);
    return PreluTile<A, decltype(at.mean)>{outer, from, at, walk.at(affine.slope, tile.position)};
  }
  template <int RUNS, class Walk, class F>
  NORMPASS_ALWAYS_INLINE void first_pass(const Walk& walk, TileBuffers<A>& buffers, const Tile& tile, F f) const {
    const auto main = tile_of(walk, buffers, tile, tile.stride);
    f(main);
    f(SlopeTile<A, decltype(main.slope)>{main});
  }
  void end_of_first_pass() const {}
  template <class Walk, class F>
  NORMPASS_ALWAYS_INLINE void second_pass(const Walk& walk, TileBuffers<A>& buffers, const Tile& tile, F f) const {
    f(tile_of(walk, buffers, tile, 0));
  }
};
template <class S> constexpr bool has_slope<FromPrelu<S>> = true;

}  // namespace normpass
