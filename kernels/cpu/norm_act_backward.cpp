// norm_act_backward: from x. With c = x − mean and r = 1/sqrt(var + eps):
//
//   y = c·a + bias      dy = grad·act'(y + residual)      dweight = r·Σdy·c      dbias = Σdy      dresidual = dy
//   dx = a·dy − (a·r²/m)·(Σdy·c)·c − (a/m)·Σdy      (batch statistics)      dx = a·dy      (running statistics)
//
// Five array moves: read x and grad; read x and grad, write dx. With a residual, or where act' is costly, the first pass
// writes dy (to dresidual, or where dx will be), and the second reads it in place of grad and the residual.
#include "from_input.h"
#include "prelu.h"

namespace normpass {
namespace {

// dresidual alone: dy, written in the pass of the reduction where there is one.
template <class S, class Walk> void differentiate_only(const Walk& walk, const FromInput<S>& source, int threads) {
  using A = Wide<S>;
#pragma omp parallel num_threads(threads)
  {
    TileBuffers<A> buffers;
    walk.template tiles<S>(omp_get_thread_num(), omp_get_num_threads(), [&](const Tile& tile) {
      source.template first_pass<1>(walk, buffers, tile, [](const auto&) {});
    });
    source.end_of_first_pass();
  }
}

template <class S, class Walk, class Source>
void backward(const Walk& walk, Source source, S* dx, void* dweight, void* dbias, void* dslope, const void* var,
              double eps, bool batch_statistics, int threads) {
  using A = Wide<S>;
  const A* variance = static_cast<const A*>(var);
  bool sums_needed = dweight != nullptr || dbias != nullptr || dslope != nullptr || (dx != nullptr && batch_statistics);
  Sums sums;
  if constexpr (!has_slope<Source>) {
    if (sums_needed && source.dresidual == nullptr && is_written<S>(source.activated)) source.dresidual = dx;
    if (!sums_needed && source.dresidual != nullptr) differentiate_only(walk, source, threads);
  }
  if (sums_needed) sums = reduce<S>(walk, source, threads);
  if (dx != nullptr) {
    const Sums* through = batch_statistics ? &sums : nullptr;
    auto coefficients = coefficients_of(source.affine, variance, eps, through, walk.layout());
    apply<S>(walk, source, coefficients, dx, is_streamed<S>(walk.layout()), threads);
  }
  if (sums_needed) {
    for (size_t c = 0; c < sums.dy.size(); ++c) sums.dy_centred[c] /= std::sqrt(static_cast<double>(variance[c]) + eps);
    store_sums<A>(sums.dy_centred, dweight);
    store_sums<A>(sums.dy, dbias);
    store_sums<A>(sums.dslope, dslope);
  }
}

}  // namespace
}  // namespace normpass

NORMPASS_EXPORT int normpass_norm_act_backward(void* dx, void* dresidual, void* dweight, void* dbias, void* dslope,
                                          const void* grad, const void* x, const void* residual, const void* slope,
                                          const void* weight, const void* bias,
                                          const void* mean, const void* var, double eps, int batch_statistics,
                                          int activation, double arg0, double arg1, int64_t outer, int64_t channels,
                                          int64_t inner, int dtype, int threads) {
  using namespace normpass;
  return with_affine(dtype, {outer, channels, inner}, {weight, bias, mean, var, eps, slope},
                     [&](auto* storage, const auto& walk, const auto& affine) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    if (slope != nullptr) {
      const FromPrelu<S> source{static_cast<const S*>(grad), static_cast<const S*>(x), affine};
      return backward<S>(walk, source, static_cast<S*>(dx), dweight, dbias, dslope, var, eps, batch_statistics != 0,
                         threads);
    }
    FromInput<S> source{static_cast<const S*>(grad), static_cast<const S*>(x),
                        static_cast<const S*>(residual), static_cast<S*>(dresidual),
                        affine, Activated<A>({activation, arg0, arg1}), is_streamed<S>(walk.layout())};
    backward<S>(walk, source, static_cast<S*>(dx), dweight, dbias, nullptr, var, eps, batch_statistics != 0, threads);
  });
}
