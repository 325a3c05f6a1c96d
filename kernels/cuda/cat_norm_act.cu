// norm_act of a concatenation, from its pieces, in one pass. Backward rebuilds z by this same kernel.
//
// Macros: those of moments.cu, NORMPASS_ACTIVATION (a struct of activation.h), NORMPASS_PIECES.
#include "pieces.cuh"

#include "norm_site.cuh"

namespace normpass {

template <class Storage, int VECTOR, bool ROWS, class Activation>
NORMPASS_DEVICE void cat_norm_act(Storage* z, const Table& ends, const Table& xs,
                                  const Parameters<Statistics<Storage>>& parameters, const Activation& activation,
                                  const Grid& grid) {
  using T = Statistics<Storage>;
  constexpr int CHANNELS = ROWS ? VECTOR : 1;
  constexpr int LOADS = loads_in_flight<Vector<Storage, VECTOR>>(1, true);
  Walk<VECTOR, ROWS> walk(grid, false);
  NormSite<T> sites[CHANNELS];
  share_channels<T>(walk, grid, sites, [&](long long channel) { return NormSite<T>(parameters, channel); });
  Piece piece(ends, walk.channel);
  const Storage* x = reinterpret_cast<const Storage*>(xs.at(piece.index));
  pin(x);

  while (walk.inside()) {
    Vector<Storage, VECTOR> values[LOADS];
    long long offsets[LOADS];
    int count = next_vectors(walk, offsets, [&](int k, long long offset) {
      values[k] = load<VECTOR>(x + piece.own(walk, grid, offset));
    });
#pragma unroll
    for (int k = 0; k < LOADS; ++k) {
      if (k >= count) break;
      T result[VECTOR];
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        result[i] = activation.value(sites[channel_of<ROWS>(i)].y(activation, values[k][i]));
      }
      store(z + offsets[k], result);
    }
  }
}

}  // namespace normpass

extern "C" __global__ void __launch_bounds__(normpass::THREADS, 1)
    cat_norm_act(NORMPASS_STORAGE* __restrict__ z, const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ weight,
                 const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ bias,
                 const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ mean,
                 const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ var, double eps, double argument_1,
                 double argument_2, NORMPASS_PIECE_PARAMETERS(end_), NORMPASS_PIECE_PARAMETERS(x_),
                 NORMPASS_GRID_PARAMETERS) {
  using T = normpass::Statistics<NORMPASS_STORAGE>;
  normpass::NORMPASS_ACTIVATION<T> activation(argument_1, argument_2);
  normpass::Parameters<T> parameters{weight, bias, mean, var, eps};
  normpass::cat_norm_act<NORMPASS_STORAGE, NORMPASS_VECTOR, NORMPASS_ROWS>(
      z, NORMPASS_PIECE_TABLE(end_), NORMPASS_PIECE_TABLE(x_), parameters, activation, NORMPASS_GRID);
}
