// add_statistics_gradient: dx += total[0]·(x − mean) + total[1], per channel and in place.
#include "forward.h"

namespace normpass {
namespace {

template <class A> struct PerChannel {
  std::vector<A> mean, slope, constant;

  PerChannel(int64_t width, int64_t channels, const A* mean_of, const double* total)
      : mean(width), slope(width), constant(width) {
    for (int64_t i = 0; i < width; ++i) {
      mean[i] = mean_of[i % channels];
      slope[i] = static_cast<A>(total[i % channels]);
      constant[i] = static_cast<A>(total[i % channels + channels]);
    }
  }
};

template <int RUNS, class A, class Values>
NORMPASS_SHARED void add_tile(Runs<const A> before, Runs<A> dx, Runs<const A> x, int64_t n, Values means,
                              Values slopes, Values constants) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    A mean = means[i], slope = slopes[i], constant = constants[i];
#pragma GCC unroll 4
    for (int run = 0; run < RUNS; ++run)
      dx(run, i) = before(run, i) + multiply_add(slope, x(run, i) - mean, constant);
  }
}

template <class S, class Walk>
void add(const Walk& walk, S* dx, const S* x, const PerChannel<Wide<S>>& values, int threads) {
  using A = Wide<S>;
  const int64_t stride = walk.width();
#pragma omp parallel num_threads(threads)
  {
    alignas(64) A wide_x[tile_size], wide_dx[tile_size], buffer[runs_at_once * tile_size];
    walk.template tiles<S>(omp_get_thread_num(), omp_get_num_threads(), [&](const Tile& tile) {
      Runs<const A> from = read_tile(x, stride, wide_x, tile), before = read_tile<S>(dx, stride, wide_dx, tile);
      Runs<A> target = target_of(dx, stride, buffer, tile, false);
      auto mean = walk.at(values.mean, tile.position), slope = walk.at(values.slope, tile.position);
      auto constant = walk.at(values.constant, tile.position);
      with_runs<S>(tile, [&](auto runs) {
        add_tile<runs.value>(before, target, from, tile.n, mean, slope, constant);
      });
      finish_tile(dx, stride, target, tile, false);
    });
  }
}

}  // namespace
}  // namespace normpass

NORMPASS_EXPORT int normpass_add_statistics_gradient(void* dx, const void* x, const void* mean, const double* total,
                                                     int64_t outer, int64_t channels, int64_t inner, int dtype,
                                                     int threads) {
  using namespace normpass;
  return with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    with_layout({outer, channels, inner}, [&](const auto& walk) {
      PerChannel<A> values(walk.width(), channels, static_cast<const A*>(mean), total);
      add<S>(walk, static_cast<S*>(dx), static_cast<const S*>(x), values, threads);
    });
  });
}
