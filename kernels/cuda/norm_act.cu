// z = act((x − mean)·a + bias + residual), in one pass. Backward rebuilds z by this same kernel.
//
// Macros: those of moments.cu, NORMPASS_ACTIVATION (a struct of activation.h), NORMPASS_RESIDUAL (true, false).
#include "walk.cuh"

#include "norm_site.cuh"

namespace normpass {

template <class Storage, int VECTOR, bool ROWS, class Activation, bool RESIDUAL>
NORMPASS_DEVICE void norm_act(Storage* z, const Storage* x, const Storage* residual,
                              const Parameters<Statistics<Storage>>& parameters, const Activation& activation,
                              const Grid& grid) {
  using T = Statistics<Storage>;
  constexpr int CHANNELS = ROWS ? VECTOR : 1;
  constexpr int LOADS = loads_in_flight<Vector<Storage, VECTOR>>(RESIDUAL ? 2 : 1, true);
  Walk<VECTOR, ROWS> walk(grid, true);
  NormSite<T> sites[CHANNELS];
  share_channels<T>(walk, grid, sites, [&](long long channel) { return NormSite<T>(parameters, channel); });

  while (walk.inside()) {
    Vector<Storage, VECTOR> values[LOADS], added[LOADS];
    long long offsets[LOADS];
    int count = next_vectors(walk, offsets, [&](int k, long long offset) {
      values[k] = load<VECTOR>(x + offset);
      if (RESIDUAL) added[k] = load<VECTOR>(residual + offset);
    });
#pragma unroll
    for (int k = 0; k < LOADS; ++k) {
      if (k >= count) break;
      T result[VECTOR];
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        T y = sites[channel_of<ROWS>(i)].y(activation, values[k][i]);
        if (RESIDUAL) y = sum_of(y, added[k][i]);
        result[i] = activation.value(y);
      }
      store(z + offsets[k], result);
    }
  }
}

}  // namespace normpass

extern "C" __global__ void __launch_bounds__(normpass::THREADS, 1)
    norm_act(NORMPASS_STORAGE* __restrict__ z, const NORMPASS_STORAGE* __restrict__ x,
             const NORMPASS_STORAGE* __restrict__ residual,
             const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ weight,
             const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ bias,
             const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ mean,
             const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ var, double eps, double argument_1,
             double argument_2, NORMPASS_GRID_PARAMETERS) {
  using T = normpass::Statistics<NORMPASS_STORAGE>;
  normpass::NORMPASS_ACTIVATION<T> activation(argument_1, argument_2);
  normpass::Parameters<T> parameters{weight, bias, mean, var, eps};
  normpass::norm_act<NORMPASS_STORAGE, NORMPASS_VECTOR, NORMPASS_ROWS, normpass::NORMPASS_ACTIVATION<T>,
                     NORMPASS_RESIDUAL>(z, x, residual, parameters, activation, NORMPASS_GRID);
}
