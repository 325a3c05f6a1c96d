// The gradients of cat_norm_act from its pieces, up to what goes through the batch's statistics, in one pass:
//
//   dx (+)= a·dy      dweight = S2, dbias = S1      total += −a·r·S2/m and −a·S1/m, B and C of add_statistics_gradient
//
// Macros: those of cat_norm_act.cu.
#include "pieces.cuh"

#include "norm_site.cuh"
#include "reduce.cuh"

namespace normpass {

// The tables hold addresses, 0 for what is not wanted; bit p of `adds`: whether dx of piece p is added to.
struct Targets {
  Table ends, xs, dxs, totals;
  unsigned long long adds;
};

template <class Storage, int VECTOR, bool ROWS, class Activation>
NORMPASS_DEVICE void cat_norm_act_backward(const Storage* grad, const Targets& targets, Statistics<Storage>* dweight,
                                           Statistics<Storage>* dbias,
                                           const Parameters<Statistics<Storage>>& parameters,
                                           const Activation& activation, double count,
                                           Statistics<Storage>* partials, unsigned* arrivals, const Grid& grid) {
  using T = Statistics<Storage>;
  constexpr int CHANNELS = ROWS ? VECTOR : 1;
  constexpr int LOADS = loads_in_flight<Vector<Storage, VECTOR>>(3, true);
  Walk<VECTOR, ROWS> walk(grid, false);
  NormSite<T> sites[CHANNELS];
  Sums<T> own[CHANNELS];
  share_channels<T>(walk, grid, sites, [&](long long channel) { return NormSite<T>(parameters, channel); });
  Piece piece(targets.ends, walk.channel);
  const Storage* x = reinterpret_cast<const Storage*>(targets.xs.at(piece.index));
  Storage* dx = reinterpret_cast<Storage*>(targets.dxs.at(piece.index));
  pin(x);
  pin(dx);
  bool adds = dx != nullptr && (targets.adds >> piece.index & 1) != 0;

  while (walk.inside()) {
    Vector<Storage, VECTOR> outer[LOADS], values[LOADS], before[LOADS];
    long long offsets[LOADS];
    int there = next_vectors(walk, offsets, [&](int k, long long offset) {
      outer[k] = load<VECTOR>(grad + offset);
      offsets[k] = piece.own(walk, grid, offset);
      values[k] = load<VECTOR>(x + offsets[k]);
      if (adds) before[k] = load<VECTOR>(dx + offsets[k]);
    });
#pragma unroll
    for (int k = 0; k < LOADS; ++k) {
      if (k >= there) break;
      T result[VECTOR];
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        int c = channel_of<ROWS>(i);
        T dy = activation.gradient(outer[k][i], sites[c].y(activation, values[k][i]));
        own[c].dy += dy;
        own[c].dy_deviation = multiply_add(dy, sites[c].deviation(activation, values[k][i]), own[c].dy_deviation);
        result[i] = adds ? multiply_add(dy, sites[c].scale, before[k][i]) : dy * sites[c].scale;
      }
      if (dx != nullptr) store(dx + offsets[k], result);
    }
  }

  reduce<T>(walk, grid, own, partials, arrivals, [&](long long channel, const Sums<T>& sums) {
    T unit = NormSite<T>::unit(parameters, channel);
    T gradient = sums.dy_deviation * unit;
    if (dbias != nullptr) dbias[channel] = sums.dy;
    if (dweight != nullptr) dweight[channel] = gradient;
    Piece of(targets.ends, channel);
    double* total = reinterpret_cast<double*>(targets.totals.at(of.index));
    if (total == nullptr) return;
    T scale = NormSite<T>(parameters, channel).scale;
    total[channel - of.first] -= (scale * unit) * (gradient / T(count));
    total[channel - of.first + of.channels] -= scale * (sums.dy / T(count));
  });
}

}  // namespace normpass

extern "C" __global__ void __launch_bounds__(normpass::THREADS, 1)
    cat_norm_act_backward(const NORMPASS_STORAGE* __restrict__ grad,
                          normpass::Statistics<NORMPASS_STORAGE>* dweight,
                          normpass::Statistics<NORMPASS_STORAGE>* dbias,
                          const normpass::Statistics<NORMPASS_STORAGE>* weight,
                          const normpass::Statistics<NORMPASS_STORAGE>* bias,
                          const normpass::Statistics<NORMPASS_STORAGE>* mean,
                          const normpass::Statistics<NORMPASS_STORAGE>* var, double eps, double argument_1,
                          double argument_2, long long adds, NORMPASS_PIECE_PARAMETERS(end_),
                          NORMPASS_PIECE_PARAMETERS(x_), NORMPASS_PIECE_PARAMETERS(dx_),
                          NORMPASS_PIECE_PARAMETERS(total_), double count,
                          normpass::Statistics<NORMPASS_STORAGE>* partials, unsigned* arrivals,
                          NORMPASS_GRID_PARAMETERS) {
  using T = normpass::Statistics<NORMPASS_STORAGE>;
  normpass::NORMPASS_ACTIVATION<T> activation(argument_1, argument_2);
  normpass::Parameters<T> parameters{weight, bias, mean, var, eps};
  normpass::Targets targets{NORMPASS_PIECE_TABLE(end_), NORMPASS_PIECE_TABLE(x_), NORMPASS_PIECE_TABLE(dx_),
                            NORMPASS_PIECE_TABLE(total_), static_cast<unsigned long long>(adds)};
  normpass::cat_norm_act_backward<NORMPASS_STORAGE, NORMPASS_VECTOR, NORMPASS_ROWS>(
      grad, targets, dweight, dbias, parameters, activation, count, partials, arrivals, NORMPASS_GRID);
}
