// The source of gradients for the passes of backward that has x: dy = grad·act'(norm(x) + residual). With a residual, or
// where it pays, the first pass writes dy to `dresidual`, and the second reads it in place of grad and the residual.
#pragma once

#include "backward.h"
#include "activate.h"

namespace normpass {

template <class A, class PerChannel, class Activation> struct FromInputTile {
  static constexpr bool writes = false;
  Runs<A> grad, x;
  AffineAt<PerChannel> affine;
  Activation activation;

  template <int RUNS> NORMPASS_ALWAYS_INLINE void prefetch(int64_t i) const {
    grad.template prefetch<RUNS>(i), x.template prefetch<RUNS>(i);
  }
  NORMPASS_ALWAYS_INLINE AffineValues<A> channel(int64_t i) const { return {affine, i}; }
  NORMPASS_ALWAYS_INLINE Derivative<A> at(const AffineValues<A>& channel, int run, int64_t i) const {
    A centred = x(run, i) - channel.mean;
    return {activation.gradient(grad(run, i), channel.value(centred)), centred};
  }
};

template <class S> struct FromInput {
  using A = Wide<S>;
  const S* grad;
  const S* x;
  const S* residual;
  S* dresidual;
  const Affine<A>& affine;
  Activated<A> activated;
  bool streamed;

  template <int RUNS, class Walk, class F>
  NORMPASS_ALWAYS_INLINE void first_pass(const Walk& walk, TileBuffers<A>& buffers, const Tile& tile, F f) const {
    auto at = affine_at(walk, affine, tile.position);
    using PerChannel = decltype(at.mean);
    const int64_t stride = tile.stride;
    Runs<A> from = read_tile(x, stride, buffers.kept, tile), outer = read_tile(grad, stride, buffers.grad, tile);
    if (residual == nullptr && dresidual == nullptr && !activated.is_costly()) {
      activated.with_cheap([&](const auto& act) NORMPASS_INLINED_LAMBDA {
        f(FromInputTile<A, PerChannel, std::decay_t<decltype(act)>>{outer, from, at, act});
      });
      return;
    }
    Runs<A> added{nullptr, 0};
    if (residual != nullptr) added = read_tile(residual, stride, buffers.residual, tile);
    Target<A> dy{buffers.result, tile_size};
    if (dresidual != nullptr) dy = target_of(dresidual, stride, buffers.result, tile, streamed);
    activated.gradient(outer, from, added, dy, RUNS, tile.n, at);
    f(FromInputTile<A, PerChannel, Identity<A>>{{dy.values, dy.stride}, from, at, Identity<A>(0, 0)});
    if (dresidual != nullptr) finish_tile(dresidual, dy, tile);
  }
  void end_of_first_pass() const {
    if (dresidual != nullptr && streamed) end_of_stream();
  }

  template <class Walk, class F>
  NORMPASS_ALWAYS_INLINE void second_pass(const Walk& walk, TileBuffers<A>& buffers, const Tile& tile, F f) const {
    if (dresidual == nullptr) return first_pass<1>(walk, buffers, tile, f);
    auto at = affine_at(walk, affine, tile.position);
    Runs<A> from = read_tile(x, 0, buffers.kept, tile), dy = read_tile<S>(dresidual, 0, buffers.grad, tile);
    f(FromInputTile<A, decltype(at.mean), Identity<A>>{dy, from, at, Identity<A>(0, 0)});
  }
};

// Whether act' costs more than to write dy and read it again. (dy rounded to 16 bits would be rounded once too often.)
template <class S> bool is_written(const Activated<Wide<S>>& activated) {
  return std::is_same<S, Wide<S>>::value && activated.is_costly();
}

}  // namespace normpass
