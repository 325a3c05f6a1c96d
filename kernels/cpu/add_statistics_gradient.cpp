// add_statistics_gradient: dx += total[0]·(x − mean) + total[1], per channel and in place.
#include "layout.h"

namespace normpass {
namespace {

template <class A> struct PerChannel {
  Values<A> mean, slope, constant;

  PerChannel(int64_t width, int64_t channels, const A* mean_of, const double* total)
      : mean(width), slope(width), constant(width) {
    for (int64_t i = 0; i < width; ++i) {
      mean[i] = mean_of[i % channels];
      slope[i] = static_cast<A>(total[i % channels]);
      constant[i] = static_cast<A>(total[i % channels + channels]);
    }
  }
};

template <class A, class Channel> struct ChannelsAt {
  Channel mean, slope, constant;
};

template <class A, class Channel>
NORMPASS_SHARED void add_tile(const Runs<A>& before, const Target<A>& dx, const Runs<A>& x, int64_t n,
                              const ChannelsAt<A, Channel>& at) {
  write_lines<1>(n, dx, [&](int64_t begin, auto values, const Line<A>& to) {
    before.template prefetch<1>(begin), x.template prefetch<1>(begin);
    const int64_t count = values;
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = 0; i < count; ++i) {
      int64_t c = begin + i;
      to(0, i) = before(0, c) + multiply_add(at.slope[c], x(0, c) - at.mean[c], at.constant[c]);
    }
  });
}

template <class S, class Walk>
void add(const Walk& walk, S* dx, const S* x, const PerChannel<Wide<S>>& values, int threads) {
  using A = Wide<S>;
#pragma omp parallel num_threads(threads)
  {
    alignas(64) A wide_x[tile_size], wide_dx[tile_size], buffer[tile_size];
    walk.template tiles<S>(omp_get_thread_num(), omp_get_num_threads(), [&](const Tile& tile) {
      using Channel = decltype(walk.at(values.mean, tile.position));
      Runs<A> from = read_tile(x, 0, wide_x, tile), before = read_tile<S>(dx, 0, wide_dx, tile);
      Target<A> target = target_of(dx, 0, buffer, tile, false);
      ChannelsAt<A, Channel> at{walk.at(values.mean, tile.position), walk.at(values.slope, tile.position),
                                walk.at(values.constant, tile.position)};
      add_tile(before, target, from, tile.n, at);
      finish_tile(dx, target, tile);
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
