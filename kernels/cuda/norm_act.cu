// z = act((x − mean)·a + bias + residual), in one pass. Backward rebuilds z by this same kernel, without the mask that
// forward may have written beside z (mask.cuh).
//
// A residual that is another norm's result may be given as that norm's input: it is computed as it is read, and rounded
// as if it had been stored.
//
// Macros: those of moments.cu, NORMPASS_ACTIVATION (a struct of activation.h), NORMPASS_RESIDUAL (true, false), that of
// mask.cuh, and NORMPASS_NORMED, 1 where the residual is a norm's input.
#include "mask.cuh"

#include "norm_site.cuh"

#ifndef NORMPASS_NORMED
#define NORMPASS_NORMED 0
#endif

namespace normpass {

// What a thread needs of a channel: the norm, and that of the residual.
template <class T, bool NORMED> struct JoinSite {
  NormSite<T> norm;
  NORMPASS_DEVICE T added(T residual) const { return residual; }
};
template <class T> struct JoinSite<T, true> {
  NormSite<T> norm, of_residual;
  NORMPASS_DEVICE T added(T x) const { return multiply_add(x - of_residual.mean, of_residual.scale, of_residual.bias); }
};

template <class Storage, int VECTOR, bool ROWS, class Activation, bool RESIDUAL>
NORMPASS_DEVICE void norm_act(Storage* z, const Storage* x, const Storage* residual, unsigned char* mask,
                              const Parameters<Statistics<Storage>>& parameters,
                              const Parameters<Statistics<Storage>>& of_residual, const Activation& activation,
                              const Grid& grid) {
  using T = Statistics<Storage>;
  constexpr int CHANNELS = ROWS ? VECTOR : 1;
  constexpr bool MASKED = NORMPASS_MASKED, NORMED = NORMPASS_NORMED;
  constexpr int GROUP = MASKED ? group_of<VECTOR>() : 1;
  constexpr int LOADS = in_groups(loads_in_flight<Vector<Storage, VECTOR>>(RESIDUAL ? 2 : 1, true), GROUP);
  Walk<VECTOR, ROWS, GROUP> walk(grid, true);
  JoinSite<T, NORMED> sites[CHANNELS];
  share_channels<T>(walk, grid, sites, [&](long long channel) {
    JoinSite<T, NORMED> site;
    site.norm = NormSite<T>(parameters, channel);
    if constexpr (NORMED) site.of_residual = NormSite<T>(of_residual, channel);
    return site;
  });

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
        const JoinSite<T, NORMED>& site = sites[channel_of<ROWS>(i)];
        T y = site.norm.y(activation, values[k][i]);
        if (NORMED) y = sum_of(y, as_stored(site.added(added[k][i]), Storage()));
        else if (RESIDUAL) y = sum_of(y, added[k][i]);
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
             double argument_2, const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ weight_2,
             const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ bias_2,
             const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ mean_2,
             const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ var_2, double eps_2,
             NORMPASS_GRID_PARAMETERS) {
  using T = normpass::Statistics<NORMPASS_STORAGE>;
  normpass::NORMPASS_ACTIVATION<T> activation(argument_1, argument_2);
  normpass::Parameters<T> parameters{weight, bias, mean, var, eps};
  normpass::Parameters<T> of_residual{weight_2, bias_2, mean_2, var_2, eps_2};
  normpass::norm_act<NORMPASS_STORAGE, NORMPASS_VECTOR, NORMPASS_ROWS, normpass::NORMPASS_ACTIVATION<T>,
                     NORMPASS_RESIDUAL>(z, x, residual, mask, parameters, of_residual, activation, NORMPASS_GRID);
}
