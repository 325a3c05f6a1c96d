// norm_act: z = act((x − mean)·a + bias + residual), with a = weight/sqrt(var + eps). One read of each input, one
// write. Rebuilding z in backward is this kernel again.
#include "activate.h"

namespace normpass {
namespace {

template <class S, class Walk>
void norm_act(const Walk& walk, S* z, const S* x, const S* residual, const Affine<Wide<S>>& affine,
              const Activated<Wide<S>>& activated, int threads) {
  using A = Wide<S>;
  const bool streamed = is_streamed<S>(walk.layout());
#pragma omp parallel num_threads(threads)
  {
    alignas(64) A wide_x[tile_size], wide_residual[tile_size], buffer[tile_size];
    walk.template tiles<S>(omp_get_thread_num(), omp_get_num_threads(), [&](const Tile& tile) {
      Runs<A> from = read_tile(x, 0, wide_x, tile), added{nullptr, 0};
      if (residual != nullptr) added = read_tile(residual, 0, wide_residual, tile);
      Target<A> target = target_of(z, 0, buffer, tile, streamed);
      auto at = affine_at(walk, affine, tile.position);
      activated.value(from, added, target, 1, tile.n, at);
      finish_tile(z, target, tile);
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
                  Activated<A>({activation, arg0, arg1}), threads);
    });
  });
}
