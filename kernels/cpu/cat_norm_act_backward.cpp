// cat_norm_act_backward: from the pieces of the concatenation. With c = x − mean and r = 1/sqrt(var + eps):
//
//   y = c·a + bias      dy = grad·act'(y)      dweight = r·Σdy·c      dbias = Σdy
//   dx (+)= a·dy        total[0] += −(a·r²/m)·Σdy·c      total[1] += −(a/m)·Σdy
//
// in one pass: what goes through the statistics, total[0]·c + total[1], is left to add_statistics_gradient, once for
// all norms that read a piece.
#include "backward.h"
#include "activate.h"
#include "pieces.h"

namespace normpass {
namespace {

// Many, for a block's sums are added up in double: its pieces are read as streams of their own.
inline int64_t rows_per_block(int64_t channels) {
  return std::max((int64_t(1) << 17) / channels / runs_at_once, int64_t(1)) * runs_at_once;
}

template <class S> struct Call {
  const S* grad;
  const void* const* xs;
  void* const* dxs;
  const uint8_t* adds;
  std::vector<Piece> pieces;
  Activated<Wide<S>> activated;

  const S* x(int64_t piece) const { return static_cast<const S*>(xs[piece]); }
  S* dx(int64_t piece) const { return static_cast<S*>(dxs[piece]); }
};

// Of a tile: dx = a·dy + before.
template <class A, class PerChannel> struct PieceTile {
  Runs<A> grad, x, before;
  Target<A> target;
  AffineAt<PerChannel> affine;
};

template <class A, class PerChannel, class Activation> struct PieceGradients {
  static constexpr bool writes = true;
  const PieceTile<A, PerChannel>& tile;
  const Target<A>& target;
  Activation activation;

  template <int RUNS> NORMPASS_ALWAYS_INLINE void prefetch(int64_t i) const {
    tile.grad.template prefetch<RUNS>(i), tile.x.template prefetch<RUNS>(i);
  }
  NORMPASS_ALWAYS_INLINE AffineValues<A> channel(int64_t i) const { return {tile.affine, i}; }
  NORMPASS_ALWAYS_INLINE Derivative<A> at(const AffineValues<A>& channel, int run, int64_t i) const {
    A centred = tile.x(run, i) - channel.mean;
    return {activation.gradient(tile.grad(run, i), channel.value(centred)), centred};
  }
  NORMPASS_ALWAYS_INLINE A written(const AffineValues<A>& channel, A dy, int run, int64_t i) const {
    return multiply_add(channel.scale, dy, tile.before(run, i));
  }
};

// Of rows the sums of every position, of a plane those of one channel, are added to the sums.
template <class A, class PerChannel>
using PieceLoop = void (*)(const PieceTile<A, PerChannel>&, const ActivationCall&, int64_t n, A* dy, A* centred);

template <int RUNS, class A, class Activation>
void add_rows(const PieceTile<A, OnePerValue<A>>& tile, const ActivationCall& call, int64_t n, A* dy, A* centred) {
  const PieceGradients<A, OnePerValue<A>, Activation> gradients{tile, tile.target, Activation(call.arg0, call.arg1)};
  Derivative<A> none;
  add_sums<RUNS, 1>(gradients, n, dy, centred, none);
}

template <class A, class Activation>
void add_plane(const PieceTile<A, OneForAll<A>>& tile, const ActivationCall& call, int64_t n, A* dy, A* centred) {
  const PieceGradients<A, OneForAll<A>, Activation> gradients{tile, tile.target, Activation(call.arg0, call.arg1)};
  Derivative<A> sum = sums_of_plane<1, A>(gradients, n);
  *dy = sum.dy;
  *centred = sum.centred;
}

template <class A> struct PieceLoops {
  PieceLoop<A, OnePerValue<A>> row, rows;
  PieceLoop<A, OneForAll<A>> plane;
  explicit PieceLoops(const Activated<A>& activated) {
    activated.with_cheap([&](const auto& activation) {
      using Activation = std::decay_t<decltype(activation)>;
      row = add_rows<1, A, Activation>, rows = add_rows<runs_at_once, A, Activation>, plane = add_plane<A, Activation>;
    });
  }
};

// Added to anything it changes nothing.
template <class A> struct MinusZeros {
  alignas(64) A values[tile_size];
  constexpr MinusZeros() : values{} {
    for (A& value : values) value = -A(0);
  }
};
template <class A> constexpr MinusZeros<A> minus_zeros;

template <class A> struct Buffers {
  alignas(64) A grad[runs_at_once * tile_size], x[runs_at_once * tile_size], dx[runs_at_once * tile_size],
      dy[runs_at_once * tile_size];
  alignas(64) A dy_sums[tile_size], centred_sums[tile_size];
};

// RUNS runs of n values of a piece, `own` values apart, from the whole's at `offset`, `whole` values apart.
template <int RUNS, class S, class PerChannel>
void piece_backward(const Call<S>& call, const S* grad, int64_t whole, const S* x, S* result, int64_t own, bool adds,
                    int64_t n, const AffineAt<PerChannel>& at, PieceLoop<Wide<S>, PerChannel> loop,
                    Buffers<Wide<S>>& buffers, Wide<S>* dy_sums, Wide<S>* centred_sums) {
  using A = Wide<S>;
  constexpr bool is_wide = std::is_same<S, A>::value;
  Runs<A> outer = read_runs(grad, whole, buffers.grad, RUNS, n), from = read_runs(x, own, buffers.x, RUNS, n);
  Runs<A> before{minus_zeros<A>.values, 0};
  if (adds) before = read_runs<S>(result, own, buffers.dx, RUNS, n);
  Target<A> dx{buffers.dx, tile_size};
  if constexpr (is_wide)
    if (result != nullptr) dx = {result, own};
  if (call.activated.is_costly()) {
    const Target<A> dy = adds ? Target<A>{buffers.dy, tile_size} : dx;
    call.activated.gradient(outer, from, {nullptr, 0}, dy, RUNS, n, at);
    outer = {dy.values, dy.stride};
  }
  loop({outer, from, before, dx, at}, call.activated.call(), n, dy_sums, centred_sums);
  if constexpr (!is_wide)
    for (int run = 0; result != nullptr && run < RUNS; ++run) narrow(buffers.dx + run * tile_size, result + run * own, n);
}

template <class S>
void strip_backward(const Rows& walk, const Call<S>& call, const Affine<Wide<S>>& affine, const Strip& strip,
                    const PieceLoops<Wide<S>>& loops, Buffers<Wide<S>>& buffers, Sums& sums) {
  using A = Wide<S>;
  const int64_t whole = walk.layout().channels, own = call.pieces[strip.piece].channels;
  S* const result = call.dx(strip.piece);
  const bool adds = result != nullptr && call.adds[strip.piece];
  const auto at = affine_at(walk, affine, strip.channel);
  std::fill_n(buffers.dy_sums, strip.n, A(0));
  std::fill_n(buffers.centred_sums, strip.n, A(0));
  groups_of_rows(strip, [&](int64_t row, auto runs) {
    const int64_t offset = strip.own + row * own;
    piece_backward<runs.value>(call, call.grad + strip.whole + row * whole, whole, call.x(strip.piece) + offset,
                               result == nullptr ? nullptr : result + offset, own, adds, strip.n, at,
                               runs.value == 1 ? loops.row : loops.rows, buffers, buffers.dy_sums, buffers.centred_sums);
  });
  for (int64_t i = 0; i < strip.n; ++i) {
    sums.dy[strip.channel + i] += buffers.dy_sums[i];
    sums.dy_centred[strip.channel + i] += buffers.centred_sums[i];
  }
}

template <class S>
void walk_share(const Rows& walk, const Call<S>& call, const Affine<Wide<S>>& affine, Sums& sums, int thread,
                int threads) {
  Buffers<Wide<S>> buffers;
  const PieceLoops<Wide<S>> loops(call.activated);
  strips(walk.layout(), call.pieces, rows_per_block(walk.layout().channels), thread, threads,
         [&](const Strip& strip) { strip_backward(walk, call, affine, strip, loops, buffers, sums); });
}

template <class S>
void walk_share(const Planes& walk, const Call<S>& call, const Affine<Wide<S>>& affine, Sums& sums, int thread,
                int threads) {
  using A = Wide<S>;
  Buffers<A> buffers;
  const PieceLoops<A> loops(call.activated);
  plane_parts<S>(walk, call.pieces, thread, threads, [&](const PlanePart& part) {
    const int64_t channel = part.tile.position;
    S* const result = call.dx(part.piece) == nullptr ? nullptr : call.dx(part.piece) + part.own;
    const bool adds = result != nullptr && call.adds[part.piece];
    A dy, centred;
    piece_backward<1>(call, call.grad + part.tile.offset, 0, call.x(part.piece) + part.own, result, 0, adds, part.tile.n,
                      affine_at(walk, affine, channel), loops.plane, buffers, &dy, &centred);
    sums.dy[channel] += dy;
    sums.dy_centred[channel] += centred;
  });
}

template <class S, class Walk>
Sums backward(const Walk& walk, const Call<S>& call, const Affine<Wide<S>>& affine, int threads) {
  std::vector<Sums> shares(threads, Sums(walk.layout().channels));
#pragma omp parallel num_threads(threads)
  walk_share(walk, call, affine, shares[omp_get_thread_num()], omp_get_thread_num(), omp_get_num_threads());
  for (int t = 1; t < threads; ++t)
    for (size_t c = 0; c < shares[0].dy.size(); ++c) {
      shares[0].dy[c] += shares[t].dy[c];
      shares[0].dy_centred[c] += shares[t].dy_centred[c];
    }
  return std::move(shares[0]);
}

template <class A>
void store(const Sums& sums, const std::vector<Piece>& pieces, const Affine<A>& affine, const A* var, double eps,
           double count, A* dweight, A* dbias, double* const* totals) {
  for (size_t p = 0; p < pieces.size(); ++p)
    for (int64_t i = 0; i < pieces[p].channels; ++i) {
      int64_t c = pieces[p].first + i;
      double slope = affine.scale[c], rstd = 1 / std::sqrt(static_cast<double>(var[c]) + eps);
      double gradient = sums.dy_centred[c] * rstd;
      if (dweight != nullptr) dweight[c] = static_cast<A>(gradient);
      if (dbias != nullptr) dbias[c] = static_cast<A>(sums.dy[c]);
      if (totals[p] == nullptr) continue;
      totals[p][i] -= (slope * rstd) * (gradient / count);
      totals[p][i + pieces[p].channels] -= slope * sums.dy[c] / count;
    }
}

}  // namespace
}  // namespace normpass

NORMPASS_EXPORT int normpass_cat_norm_act_backward(void* const* dxs, double* const* totals, const uint8_t* adds,
                                                   void* dweight, void* dbias, const void* grad, const void* const* xs,
                                                   const int64_t* piece_channels, int64_t pieces, const void* weight,
                                                   const void* bias, const void* mean, const void* var, double eps,
                                                   int activation, double arg0, double arg1, int64_t outer,
                                                   int64_t channels, int64_t inner, int dtype, int threads) {
  using namespace normpass;
  return with_affine(dtype, {outer, channels, inner}, {weight, bias, mean, var, eps},
                     [&](auto* storage, const auto& walk, const auto& affine) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    Call<S> call{static_cast<const S*>(grad), xs,  dxs, adds, pieces_of(piece_channels, pieces),
                 Activated<A>({activation, arg0, arg1})};
    Sums sums = backward<S>(walk, call, affine, threads);
    store<A>(sums, call.pieces, affine, static_cast<const A*>(var), eps,
             static_cast<double>(walk.layout().count()), static_cast<A*>(dweight), static_cast<A*>(dbias), totals);
  });
}
