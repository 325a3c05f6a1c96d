// norm_act: z = act((x − mean)·a + bias + residual), with a = weight/sqrt(var + eps). One read of each input, one
// write. Rebuilding z in backward is this kernel again.
#include "affine.h"

namespace normpass {
namespace {

template <class A, class PerChannel, class Activation>
void forward_tile(const A* __restrict x, const A* __restrict residual, A* __restrict z, int64_t n,
                  AffineAt<PerChannel> at, Activation activation) {
  if (residual == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = activation.value(affine_value(x[i] - at.mean[i], at, i));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) z[i] = activation.value(affine_value(x[i] - at.mean[i], at, i) + residual[i]);
  }
}

template <class S, class Walk>
void norm_act(const Walk& walk, S* z, const S* x, const S* residual, const Affine<Wide<S>>& affine,
              ActivationCall call, int threads) {
  using A = Wide<S>;
  const bool streamed = is_streamed<S>(walk.layout());
#pragma omp parallel num_threads(threads)
  {
    alignas(64) A wide_x[tile_size], wide_residual[tile_size], buffer[tile_size];
    walk.tiles(omp_get_thread_num(), omp_get_num_threads(), [&](int64_t offset, int64_t n, int64_t position) {
      const A* from = read_tile(x + offset, wide_x, n);
      const A* added = residual == nullptr ? nullptr : read_tile(residual + offset, wide_residual, n);
      A* target = target_of(z + offset, buffer, streamed);
      with_activation<A>(call, [&](auto activation) {
        forward_tile(from, added, target, n, affine_at(walk, affine, position), activation);
      });
      finish_tile(z + offset, target, n, streamed);
    });
    if (streamed) end_of_stream();
  }
}

}  // namespace
}  // namespace normpass

NORMPASS_EXPORT int normpass_norm_act(void* z, const void* x, const void* residual, const void* weight, const void* bias,
                                 const void* mean, const void* var, double eps, int activation, double arg0,
                                 double arg1, int64_t outer, int64_t channels, int64_t inner, int dtype,
                                 int threads) {
  using namespace normpass;
  return with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    with_layout({outer, channels, inner}, [&](const auto& walk) {
      Affine<A> affine(walk.width(), channels, static_cast<const A*>(weight), static_cast<const A*>(bias),
                       static_cast<const A*>(mean), static_cast<const A*>(var), eps);
      norm_act<S>(walk, static_cast<S*>(z), static_cast<const S*>(x), static_cast<const S*>(residual), affine,
                  {activation, arg0, arg1}, threads);
    });
  });
}
