// cat_norm_act: norm_act of a concatenation, from its pieces. One read of each piece, one write of z. Rebuilding z in
// backward is this kernel again.
#include "forward.h"
#include "pieces.h"

namespace normpass {
namespace {

// Few, so that z is written line after line; what the processor does not prefetch of so many short streams, the kernel
// asks for.
constexpr int64_t rows_per_block = runs_at_once;

template <class S> struct Call {
  S* z;
  const void* const* xs;
  std::vector<Piece> pieces;
  ActivationCall activation;
  bool streamed;

  const S* x(int64_t piece) const { return static_cast<const S*>(xs[piece]); }
};

template <class S> void run(const Rows& walk, const Call<S>& call, const Affine<Wide<S>>& affine, int threads) {
  using A = Wide<S>;
  const Layout& layout = walk.layout();
  const bool narrow_storage = !std::is_same<S, A>::value;
#pragma omp parallel num_threads(threads)
  {
    alignas(64) A wide[runs_at_once * tile_size], buffer[runs_at_once * tile_size];
    const int thread = omp_get_thread_num(), count = omp_get_num_threads();
    strips(layout, call.pieces, rows_per_block, thread, count, [&](const Strip& strip) {
      const int64_t channels = call.pieces[strip.piece].channels;
      auto at = affine_at(walk, affine, strip.channel);
      with_activation<A>(call.activation, [&](auto activation) {
        groups_of_rows(strip, [&](int64_t row, auto runs) {
          const S* from = call.x(strip.piece) + strip.own + row * channels;
          Tile tile{strip.whole + row * layout.channels, strip.n, strip.channel, runs.value};
          Runs<A> target = target_of(call.z, layout.channels, buffer, tile, call.streamed);
          if (!narrow_storage && strip.n == channels) prefetch_next(from, runs.value * channels);
          forward_tile<runs.value>(read_runs(from, channels, wide, runs.value, strip.n), Runs<const A>{nullptr, 0},
                                   target, strip.n, at, activation);
          finish_tile(call.z, layout.channels, target, tile, call.streamed);
        });
      });
    });
    if (call.streamed) end_of_stream();
  }
}

template <class S> void run(const Planes& walk, const Call<S>& call, const Affine<Wide<S>>& affine, int threads) {
  using A = Wide<S>;
#pragma omp parallel num_threads(threads)
  {
    alignas(64) A wide[tile_size], buffer[tile_size];
    plane_parts<S>(walk, call.pieces, omp_get_thread_num(), omp_get_num_threads(), [&](const PlanePart& part) {
      const S* from = call.x(part.piece) + part.own;
      Runs<A> target = target_of(call.z, 0, buffer, part.tile, call.streamed);
      prefetch_next(from, part.tile.n);
      with_activation<A>(call.activation, [&](auto activation) {
        forward_tile<1>(read_runs(from, 0, wide, 1, part.tile.n), Runs<const A>{nullptr, 0}, target, part.tile.n,
                        affine_at(walk, affine, part.tile.position), activation);
      });
      finish_tile(call.z, 0, target, part.tile, call.streamed);
    });
    if (call.streamed) end_of_stream();
  }
}

// Rows are written piece by piece: past the caches only where every one of them fills whole lines.
template <class S> bool fills_lines(const Layout& layout, const std::vector<Piece>& pieces, const void* z) {
  if (layout.inner > 1) return true;
  bool aligned = reinterpret_cast<uintptr_t>(z) % 64 == 0;
  for (const Piece& piece : pieces) aligned = aligned && piece.channels * sizeof(S) % 64 == 0;
  return aligned;
}

}  // namespace
}  // namespace normpass

NORMPASS_EXPORT int normpass_cat_norm_act(void* z, const void* const* xs, const int64_t* piece_channels, int64_t pieces,
                                          const void* weight, const void* bias, const void* mean, const void* var,
                                          double eps, int activation, double arg0, double arg1, int64_t outer,
                                          int64_t channels, int64_t inner, int dtype, int threads) {
  using namespace normpass;
  return with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    with_layout({outer, channels, inner}, [&](const auto& walk) {
      Affine<A> affine(walk.width(), channels, static_cast<const A*>(weight), static_cast<const A*>(bias),
                       static_cast<const A*>(mean), static_cast<const A*>(var), eps);
      Call<S> call{static_cast<S*>(z), xs, pieces_of(piece_channels, pieces), {activation, arg0, arg1}, false};
      call.streamed = is_streamed<S>(walk.layout()) && fills_lines<S>(walk.layout(), call.pieces, z);
      run<S>(walk, call, affine, threads);
    });
  });
}
