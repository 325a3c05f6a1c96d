// cat_norm_act: norm_act of a concatenation, from its pieces. One read of each piece, one write of z. Rebuilding z in
// backward is this kernel again.
#include "activate.h"
#include "pieces.h"

namespace normpass {
namespace {

// Few, so that z is written line after line.
constexpr int64_t rows_per_block = runs_at_once;

template <class S> struct Call {
  S* z;
  const void* const* xs;
  std::vector<Piece> pieces;
  Activated<Wide<S>> activated;
  bool streamed;

  const S* x(int64_t piece) const { return static_cast<const S*>(xs[piece]); }
};

// Rows together: a piece of few channels has short ones, and a call for each would take a fifth of the time.
template <int RUNS, class A, class PerChannel, class Activation>
NORMPASS_SHARED void rows_together(const Runs<A>& x, const Target<A>& z, int64_t n, const AffineAt<PerChannel>& at,
                                   const Activation& given) {
  const Activation activation = given;  // its fields, read under a condition, would keep the loop scalar
  write_lines<RUNS>(n, z, [&](int64_t begin, auto values, Line<A> to) {
    x.template prefetch<RUNS>(begin);
    const int64_t count = values;
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = 0; i < count; ++i) {
      AffineValues<A> affine(at, begin + i);
#pragma GCC unroll 4
      for (int run = 0; run < RUNS; ++run)
        to(run, i) = activation.value(affine.value(x(run, begin + i) - affine.mean));
    }
  });
}

template <class S> void run(const Rows& walk, const Call<S>& call, const Affine<Wide<S>>& affine, int threads) {
  using A = Wide<S>;
  const Layout& layout = walk.layout();
  const Runs<A> none{nullptr, 0};
#pragma omp parallel num_threads(threads)
  {
    alignas(64) A wide[runs_at_once * tile_size], buffer[runs_at_once * tile_size];
    const int thread = omp_get_thread_num(), count = omp_get_num_threads();
    strips(layout, call.pieces, rows_per_block, thread, count, [&](const Strip& strip) {
      const int64_t channels = call.pieces[strip.piece].channels;
      auto at = affine_at(walk, affine, strip.channel);
      groups_of_rows(strip, [&](int64_t row, auto runs) {
        const S* from = call.x(strip.piece) + strip.own + row * channels;
        const int64_t stride = runs.value == 1 ? 0 : layout.channels;
        Tile tile{strip.whole + row * layout.channels, strip.n, strip.channel, stride};
        Target<A> target = target_of(call.z, layout.channels, buffer, tile, call.streamed);
        Runs<A> values = read_runs(from, channels, wide, runs.value, strip.n);
        if (runs.value == 1 || call.activated.is_costly()) {
          call.activated.value(values, none, target, runs.value, strip.n, at);
        } else {
          call.activated.with_cheap(
              [&](const auto& act) { rows_together<runs_at_once>(values, target, strip.n, at, act); });
        }
        finish_tile(call.z, target, tile);
      });
    });
    if (call.streamed) end_of_stream();
  }
}

template <class S> void run(const Planes& walk, const Call<S>& call, const Affine<Wide<S>>& affine, int threads) {
  using A = Wide<S>;
  const Runs<A> none{nullptr, 0};
#pragma omp parallel num_threads(threads)
  {
    alignas(64) A wide[tile_size], buffer[tile_size];
    plane_parts<S>(walk, call.pieces, omp_get_thread_num(), omp_get_num_threads(), [&](const PlanePart& part) {
      const S* from = call.x(part.piece) + part.own;
      Runs<A> values = read_runs(from, 0, wide, 1, part.tile.n);
      Target<A> target = target_of(call.z, 0, buffer, part.tile, call.streamed);
      auto at = affine_at(walk, affine, part.tile.position);
      call.activated.value(values, none, target, 1, part.tile.n, at);
      finish_tile(call.z, target, part.tile);
    });
    if (call.streamed) end_of_stream();
  }
}

}  // namespace
}  // namespace normpass

NORMPASS_EXPORT int normpass_cat_norm_act(void* z, const void* const* xs, const int64_t* piece_channels, int64_t pieces,
                                          const void* weight, const void* bias, const void* mean, const void* var,
                                          double eps, int activation, double arg0, double arg1, int64_t outer,
                                          int64_t channels, int64_t inner, int dtype, int threads) {
  using namespace normpass;
  return with_affine(dtype, {outer, channels, inner}, {weight, bias, mean, var, eps},
                     [&](auto* storage, const auto& walk, const auto& affine) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    Call<S> call{static_cast<S*>(z), xs, pieces_of(piece_channels, pieces), Activated<A>({activation, arg0, arg1}),
                 is_streamed<S>(walk.layout())};
    run<S>(walk, call, affine, threads);
  });
}
