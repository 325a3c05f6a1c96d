// norm_act_backward: from x. With c = x − mean and r = 1/sqrt(var + eps):
//
//   y = c·a + bias      dy = grad·act'(y + residual)      dweight = r·Σdy·c      dbias = Σdy      dresidual = dy
//   dx = a·dy − (a·r²/m)·(Σdy·c)·c − (a/m)·Σdy      (batch statistics)      dx = a·dy      (running statistics)
//
// Five array moves: read x and grad; read x and grad, write dx. With a residual, or where act' is costly, the first pass
// writes dy (to dresidual, or where dx will be), and the second reads it in place of grad and the residual.
#include "backward.h"

namespace normpass {
namespace {

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

template <class A>
Coefficients<A> coefficients_of(const Affine<A>& affine, const A* var, double eps, const Sums* sums,
                                const Layout& layout) {
  Coefficients<A> result(static_cast<int64_t>(affine.mean.size()));
  double count = static_cast<double>(layout.count());
  for (int64_t c = 0; c < layout.channels; ++c) {
    double slope = affine.scale[c], precision = 1 / (static_cast<double>(var[c]) + eps);
    result.by_centred[c] = sums == nullptr ? A(0) : static_cast<A>(-slope * precision * sums->dy_centred[c] / count);
    result.constant[c] = sums == nullptr ? A(0) : static_cast<A>(-slope * sums->dy[c] / count);
  }
  result.spread(layout.channels);
  return result;
}

template <class A, class Gradients> NORMPASS_SHARED void differentiate(const Gradients& gradients, int64_t n) {
  write_lines<1>(n, gradients.target, [&](int64_t begin, auto values, const Line<A>& to) {
    gradients.template prefetch<1>(begin);
    const int64_t count = values;
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = 0; i < count; ++i) to(0, i) = gradients.at(gradients.channel(begin + i), 0, begin + i).dy;
  });
}

// dresidual alone: dy, written in the pass of the reduction where there is one.
template <class S, class Walk> void differentiate_only(const Walk& walk, const FromInput<S>& source, int threads) {
  using A = Wide<S>;
#pragma omp parallel num_threads(threads)
  {
    TileBuffers<A> buffers;
    walk.template tiles<S>(omp_get_thread_num(), omp_get_num_threads(), [&](const Tile& tile) {
      source.first_pass(walk, buffers, tile, [&](const auto& gradients) {
        if constexpr (std::decay_t<decltype(gradients)>::writes) differentiate<A>(gradients, tile.n);
      });
    });
    source.end_of_first_pass();
  }
}

// Whether act' costs more than to write dy and read it again. (dy rounded to 16 bits would be rounded once too often.)
template <class S> bool is_costly(ActivationCall activation) {
  switch (activation.code) {
#define NORMPASS_CASE(CODE, NAME, TYPE) case CODE: return std::is_same<S, Wide<S>>::value && TYPE<Wide<S>>::is_costly;
    NORMPASS_FOR_EACH_ACTIVATION(NORMPASS_CASE)
#undef NORMPASS_CASE
  }
  return false;
}

template <class S, class Walk>
void backward(const Walk& walk, FromInput<S> source, S* dx, void* dweight, void* dbias, const void* var,
              double eps, bool batch_statistics, int threads) {
  using A = Wide<S>;
  const A* variance = static_cast<const A*>(var);
  bool sums_needed = dweight != nullptr || dbias != nullptr || (dx != nullptr && batch_statistics);
  Sums sums;
  if (sums_needed && source.dresidual == nullptr && is_costly<S>(source.activation)) source.dresidual = dx;
  if (sums_needed) sums = reduce<S>(walk, source, threads);
  else if (source.dresidual != nullptr) differentiate_only(walk, source, threads);
  if (dx != nullptr) {
    const Sums* through = batch_statistics ? &sums : nullptr;
    apply<S>(walk, source, coefficients_of(source.affine, variance, eps, through, walk.layout()), dx, threads);
  }
  if (sums_needed) {
    for (size_t c = 0; c < sums.dy.size(); ++c) sums.dy_centred[c] /= std::sqrt(static_cast<double>(variance[c]) + eps);
    store_sums<A>(sums.dy_centred, dweight);
    store_sums<A>(sums.dy, dbias);
  }
}

}  // namespace
}  // namespace normpass

NORMPASS_EXPORT int normpass_norm_act_backward(void* dx, void* dresidual, void* dweight, void* dbias, const void* grad,
                                          const void* x, const void* residual, const void* weight, const void* bias,
                                          const void* mean, const void* var, double eps, int batch_statistics,
                                          int activation, double arg0, double arg1, int64_t outer, int64_t channels,
                                          int64_t inner, int dtype, int threads) {
  using namespace normpass;
  return with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    with_layout({outer, channels, inner}, [&](const auto& walk) {
      Affine<A> affine(walk.width(), channels, static_cast<const A*>(weight), static_cast<const A*>(bias),
                       static_cast<const A*>(mean), static_cast<const A*>(var), eps);
      FromInput<S> source{static_cast<const S*>(grad), static_cast<const S*>(x),
                          static_cast<const S*>(residual), static_cast<S*>(dresidual),
                          affine, {activation, arg0, arg1}, is_streamed<S>(walk.layout())};
      backward<S>(walk, source, static_cast<S*>(dx), dweight, dbias, var, eps, batch_statistics != 0, threads);
    });
  });
}
