// inplace_abn_backward: from z. With c = x̂ = (y − bias)/weight, y = act⁻¹(z) and r = 1/sqrt(var + eps):
//
//   dy = grad·act'(y)      dweight = Σdy·x̂      dbias = Σdy      dx = weight·r·(dy − x̂·dweight/m − dbias/m)
//
// and dx = weight·r·dy for running statistics. In the division alone the weight's magnitude is at least the machine
// epsilon (zero counts as positive), so that nothing is infinite.
#include <limits>

#include "activate.h"
#include "backward.h"

namespace normpass {
namespace {

template <class A> struct OutputChannel {
  A bias, reciprocal, scale;
};

template <class A, class PerChannel, class Activation> struct FromOutputTile {
  static constexpr bool writes = false;
  Runs<A> grad, z;
  PerChannel bias, reciprocal, scale;
  Activation activation;

  template <int RUNS> NORMPASS_ALWAYS_INLINE void prefetch(int64_t i) const {
    grad.template prefetch<RUNS>(i), z.template prefetch<RUNS>(i);
  }
  NORMPASS_ALWAYS_INLINE OutputChannel<A> channel(int64_t i) const { return {bias[i], reciprocal[i], scale[i]}; }
  NORMPASS_ALWAYS_INLINE Derivative<A> at(const OutputChannel<A>& channel, int run, int64_t i) const {
    A y = activation.inverse(z(run, i));
    return {activation.gradient(grad(run, i), y), (y - channel.bias) * channel.reciprocal};
  }
};

template <class S> struct FromOutput {
  using A = Wide<S>;
  const S* grad;
  const S* z;
  Values<A> bias, reciprocal, scale;
  Activated<A> activated;

  template <int RUNS, class Walk, class F>
  NORMPASS_ALWAYS_INLINE void first_pass(const Walk& walk, TileBuffers<A>& buffers, const Tile& tile, F f) const {
    const int64_t stride = tile.stride;
    Runs<A> from = read_tile(z, stride, buffers.kept, tile), outer = read_tile(grad, stride, buffers.grad, tile);
    const auto shift = walk.at(bias, tile.position), divisor = walk.at(reciprocal, tile.position);
    const auto slope = walk.at(scale, tile.position);
    using PerChannel = std::decay_t<decltype(shift)>;
    if (activated.is_leaky_relu()) {
      f(FromOutputTile<A, PerChannel, LeakyRelu<A>>{outer, from, shift, divisor, slope, activated.leaky_relu()});
      return;
    }
    invert<RUNS>(from, outer, buffers, tile.n);
    f(FromOutputTile<A, PerChannel, Identity<A>>{
        {buffers.result, tile_size}, {buffers.inverse, tile_size}, shift, divisor, slope, Identity<A>(0, 0)});
  }
  void end_of_first_pass() const {}

  template <class Walk, class F>
  NORMPASS_ALWAYS_INLINE void second_pass(const Walk& walk, TileBuffers<A>& buffers, const Tile& tile, F f) const {
    first_pass<1>(walk, buffers, tile, f);
  }

 private:
  // y to `inverse`, dy to `result`.
  template <int RUNS>
  void invert(const Runs<A>& from, const Runs<A>& outer, TileBuffers<A>& buffers, int64_t n) const {
    static constexpr LineOf<A> zeros{A(0)}, ones{A(1)}, minus_zeros{-A(0)};  // the norm that changes nothing
    const int64_t ahead = RUNS == 1 ? tile_size : RUNS * from.stride;
    for (int run = 0; run < RUNS; ++run) {
      A *y = buffers.inverse + run * tile_size, *dy = buffers.result + run * tile_size;
      const A *z_run = from.values + run * from.stride, *grad_run = outer.values + run * outer.stride;
      activated.inverse({z_run, nullptr, nullptr, y, nullptr, nullptr, nullptr, 0, n, z_run + ahead, nullptr, lanes<A>});
      activated.gradient({y, nullptr, grad_run, dy, zeros.values, ones.values, minus_zeros.values, 0, n, y,
                          grad_run + ahead, lanes<A>, lanes<A>});
    }
  }
};

template <class A> A away_from_zero(A weight) {
  A magnitude = std::max(std::fabs(weight), std::numeric_limits<A>::epsilon());
  return weight < A(0) ? -magnitude : magnitude;
}

template <class S, class Walk>
FromOutput<S> source_of(const Walk& walk, const void* grad, const void* z, const Wide<S>* weight, const Wide<S>* bias,
                        const Wide<S>* var, double eps, const ActivationCall& call) {
  using A = Wide<S>;
  int64_t channels = walk.layout().channels, width = walk.width();
  FromOutput<S> source{static_cast<const S*>(grad), static_cast<const S*>(z), Values<A>(width), Values<A>(width),
                       Values<A>(width), Activated<A>(call)};
  for (int64_t i = 0; i < width; ++i) {
    int64_t c = i % channels;
    A slope = weight == nullptr ? A(1) : weight[c];
    source.bias[i] = bias == nullptr ? A(0) : bias[c];
    source.reciprocal[i] = A(1) / away_from_zero(slope);
    source.scale[i] = static_cast<A>(slope / std::sqrt(static_cast<double>(var[c]) + eps));
  }
  return source;
}

template <class S, class Walk>
void backward(const Walk& walk, const FromOutput<S>& source, S* dx, void* dweight, void* dbias,
              bool batch_statistics, int threads) {
  using A = Wide<S>;
  const Layout& layout = walk.layout();
  Sums sums(layout.channels);
  if (dweight != nullptr || dbias != nullptr || batch_statistics) sums = reduce<S>(walk, source, threads);
  if (dx != nullptr) {
    Coefficients<A> result(walk.width(), batch_statistics);
    double count = static_cast<double>(layout.count());
    for (int64_t c = 0; batch_statistics && c < layout.channels; ++c) {
      double slope = source.scale[c];
      result.by_centred[c] = static_cast<A>(-slope * sums.dy_centred[c] / count);
      result.constant[c] = static_cast<A>(-slope * sums.dy[c] / count);
    }
    result.spread(layout.channels);
    apply<S>(walk, source, result, dx, is_streamed<S>(walk.layout()), threads);
  }
  store_sums<A>(sums.dy_centred, dweight);
  store_sums<A>(sums.dy, dbias);
}

}  // namespace
}  // namespace normpass

NORMPASS_EXPORT int normpass_inplace_abn_backward(void* dx, void* dweight, void* dbias, const void* grad, const void* z,
                                             const void* weight, const void* bias, const void* var, double eps,
                                             int batch_statistics, int activation, double arg0, double arg1,
                                             int64_t outer, int64_t channels, int64_t inner, int dtype, int threads) {
  using namespace normpass;
  return with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    with_layout({outer, channels, inner}, [&](const auto& walk) {
      auto source = source_of<S>(walk, grad, z, static_cast<const A*>(weight), static_cast<const A*>(bias),
                                 static_cast<const A*>(var), eps, {activation, arg0, arg1});
      backward<S>(walk, source, static_cast<S*>(dx), dweight, dbias, batch_statistics != 0, threads);
    });
  });
}
