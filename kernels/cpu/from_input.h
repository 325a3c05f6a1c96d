// The source of gradients for the passes of backward that has x: dy = grad·act'(norm(x) + residual). With a residual, or
// where it pays, the first pass writes dy to `dresidual`, and the second reads it in place of grad and the residual.
#pragma once

#include "backward.h"

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

template <class A, class PerChannel, class Activation> struct FromJoinTile {
  static constexpr bool writes = true;
  Runs<A> grad, x, residual;
  Target<A> target;
  AffineAt<PerChannel> affine;
  Activation activation;

  template <int RUNS> NORMPASS_ALWAYS_INLINE void prefetch(int64_t i) const {
    grad.template prefetch<RUNS>(i), x.template prefetch<RUNS>(i), residual.template prefetch<RUNS>(i);
  }
  NORMPASS_ALWAYS_INLINE AffineValues<A> channel(int64_t i) const { return {affine, i}; }
  NORMPASS_ALWAYS_INLINE Derivative<A> at(const AffineValues<A>& channel, int run, int64_t i) const {
    A centred = x(run, i) - channel.mean;
    return {activation.gradient(grad(run, i), channel.value(centred) + residual(run, i)), centred};
  }
  NORMPASS_ALWAYS_INLINE A written(const AffineValues<A>&, A dy, int, int64_t) const { return dy; }
};

template <class S> struct FromInput {
  using A = Wide<S>;
  const S* grad;
  const S* x;
  const S* residual;
  S* dresidual;
  const Affine<A>& affine;
  ActivationCall activation;
  bool streamed;

  template <class Walk, class F>
  void first_pass(const Walk& walk, TileBuffers<A>& buffers, const Tile& tile, F f) const {
    auto at = affine_at(walk, affine, tile.position);
    using PerChannel = decltype(at.mean);
    const int64_t stride = tile.stride;
    Runs<A> from = read_tile(x, stride, buffers.kept, tile), outer = read_tile(grad, stride, buffers.grad, tile);
    if (residual == nullptr && dresidual == nullptr) {
      with_activation<A>(activation, [&](const auto& act) {
        f(FromInputTile<A, PerChannel, std::decay_t<decltype(act)>>{outer, from, at, act});
      });
      return;
    }
    alignas(64) static constexpr A zeros[tile_size] = {};
    Runs<A> added{zeros, 0};  // for every run
    if (residual != nullptr) added = read_tile(residual, stride, buffers.residual, tile);
    Target<A> dy{buffers.result, tile_size};
    if (dresidual != nullptr) dy = target_of(dresidual, stride, buffers.result, tile, streamed);
    with_activation<A>(activation, [&](const auto& act) {
      f(FromJoinTile<A, PerChannel, std::decay_t<decltype(act)>>{outer, from, added, dy, at, act});
    });
    if (dresidual != nullptr) finish_tile(dresidual, dy, tile);
  }
  void end_of_first_pass() const {
    if (dresidual != nullptr && streamed) end_of_stream();
  }

  template <class Walk, class F>
  void second_pass(const Walk& walk, TileBuffers<A>& buffers, const Tile& tile, F f) const {
    if (dresidual == nullptr) return first_pass(walk, buffers, tile, f);
    auto at = affine_at(walk, affine, tile.position);
    Runs<A> from = read_tile(x, 0, buffers.kept, tile), dy = read_tile<S>(dresidual, 0, buffers.grad, tile);
    Identity<A> identity(0, 0);
    f(FromInputTile<A, decltype(at.mean), Identity<A>>{dy, from, at, identity});
  }
};

// Whether act' costs more than to write dy and read it again. (dy rounded to 16 bits would be rounded once too often.)
template <class S> bool is_costly(ActivationCall activation) {
  switch (activation.code) {
#define NORMPASS_CASE(CODE, NAME, TYPE) case CODE: return std::is_same<S, Wide<S>>::value && TYPE<Wide<S>>::is_costly;
    NORMPASS_FOR_EACH_ACTIVATION(NORMPASS_CASE)
#undef NORMPASS_CASE
  }
  return false;
}

}  // namespace normpass
