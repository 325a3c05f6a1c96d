// z = act((x − mean)·a + bias + residual), in one pass. Backward rebuilds z by this same kernel, without the mask that
// forward may have written beside z (mask.cuh).
//
// Macros: those of moments.cu, NORMPASS_ACTIVATION (a struct of activation.h), NORMPASS_RESIDUAL (true, false), that of
// mask.cuh.
#include "mask.cuh"

#include "norm_site.cuh"

namespace normpass {

template <class Storage, int VECTOR, bool ROWS, class Activation, bool RESIDUAL>
NORMPASS_DEVICE void norm_act(Storage* z, const Storage* x, const Storage* residual, unsigned char* mask,
                              const Parameters<Statistics<Storage>>& parameters, const Activation& activation,
                              const Grid& grid) {
  using T = Statistics<Storage>;
  constexpr int CHANNELS = ROWS ? VECTOR : 1;
  constexpr bool MASKED = NORMPASS_MASKED;
  constexpr int GROUP = MASKED ? group_of<VECTOR>() : 1;
  constexpr int LOADS = in_groups(loads_in_flight<Vector<Storage, VECTOR>>(RESIDUAL ? 2 : 1, true), GROUP);
  Walk<VECTOR, ROWS, GROUP> walk(grid, true);
  NormSite<T> sites[CHANNELS];
  share_channels<T>(walk, grid, sites, [&](long long channel) { return NormSite<T>(parameters, channel); });

  while (walk.inside()) {
    Vector<Storage, VECTOR> values[LOADS], added[LOADS];
    long long offsets[LOADS], bytes[LOADS / GROUP];
    unsigned bits = 0;
    int count = next_vectors(walk, offsets, [&](int k, long long offset) {
      values[k] = load<VECTOR>(x + offset);
      if (RESIDUAL) added[k] = load<VECTOR>(residual + offset);
      if (MASKED && k % GROUP == 0) bytes[k / GROUP] = byte_of<VECTOR, ROWS>(grid, walk.channel, walk.position);
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
        if constexpr (MASKED) bits |= (activation.passes(y) ? 1u : 0u) << (k % GROUP * VECTOR + i);
      }
      store(z + offsets[k], result);
      if (MASKED && (k % GROUP == GROUP - 1 || k + 1 == count)) {
        mask[bytes[k / GROUP]] = static_cast<unsigned char>(bits);
        bits = 0;
      }
    }
  }
}

}  // namespace normpass

extern "C" __global__ void __launch_bounds__(normpass::THREADS, 1)
    norm_act(NORMPASS_STORAGE* __restrict__ z, const NORMPASS_STORAGE* __restrict__ x,
             const NORMPASS_STORAGE* __restrict__ residual, unsigned char* __restrict__ mask,
             const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ weight,
             const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ bias,
             const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ mean,
             const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ var, double eps, double argument_1,
             double argument_2, NORMPASS_GRID_PARAMETERS) {
  using T = normpass::Statistics<NORMPASS_STORAGE>;
  normpass::NORMPASS_ACTIVATION<T> activation(argument_1, argument_2);
  normpass::Parameters<T> parameters{weight, bias, mean, var, eps};
  normpass::norm_act<NORMPASS_STORAGE, NORMPASS_VECTOR, NORMPASS_ROWS, normpass::NORMPASS_ACTIVATION<T>,
                     NORMPASS_RESIDUAL>(z, x, residual, mask, parameters, activation, NORMPASS_GRID);
}
