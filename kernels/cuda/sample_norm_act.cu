// z = act((x − mean)·a + bias + residual) with the mean and the variance of each run (team.cuh), which are taken first,
// or given. One read of x for runs that a block holds in registers; the second read of longer ones comes from a cache.
//
// A thread takes the moments of a batch about the batch's own mean, in two passes over registers, and merges them by
// Chan's formula; so do the lanes and the warps. An RMS norm is not centred: its mean is 0.
//
// Macros: those of team.cuh, NORMPASS_ACTIVATION, NORMPASS_RESIDUAL.
#include "team.cuh"

#include "moments.h"

namespace normpass {

template <class T, int HELD, class Loaded, int VECTOR>
NORMPASS_DEVICE Moments<T> moments_of(const Loaded (&loaded)[HELD], int count, bool is_centred) {
  T values = T(count * VECTOR), shift = 0, sum = 0, squares = 0;
  if (count == 0) return Moments<T>();
  if (is_centred) {
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      if (k >= count) break;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) shift += loaded[k][i];
    }
    shift /= values;
  }
#pragma unroll
  for (int k = 0; k < HELD; ++k) {
    if (k >= count) break;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      T deviation = loaded[k][i] - shift;
      sum += deviation;
      squares = multiply_add(deviation, deviation, squares);
    }
  }
  return moments_from_shifted_sums(values, shift, is_centred ? sum : T(0), squares);
}

template <class Storage, int VECTOR, bool ROWS, bool RESIDUAL, class Activation>
NORMPASS_DEVICE void sample_norm_act(Storage* z, const Storage* x, const Storage* residual,
                                     const Parameters<Statistics<Storage>>& parameters, Statistics<Storage>* mean,
                                     Statistics<Storage>* var, const Activation& activation, bool is_given,
                                     bool is_centred, const Runs& all) {
  using T = Statistics<Storage>;
  constexpr int HELD = held<Storage, VECTOR>();
  Member<HELD> member(all);
  if (member.run >= all.runs) return;
  long long first = member.run * all.vectors;
  Vector<Storage, VECTOR> values[HELD];
  T own_mean, own_var;

  if (is_given) {
    own_mean = mean[member.run], own_var = var[member.run];
  } else {
    Moments<T> own;
    for (long long batch = 0; batch < member.batches; ++batch) {
      int count = member.each(batch, [&](int k, long long v) { values[k] = load<VECTOR>(x + (first + v) * VECTOR); });
      own.merge(moments_of<T, HELD, Vector<Storage, VECTOR>, VECTOR>(values, count, is_centred));
    }
    own = merged_by_team<T>(own);
    own_mean = own.mean, own_var = own.variance();
    if (member.index == 0) mean[member.run] = own_mean, var[member.run] = own_var;
  }

  RunSite<T, VECTOR, ROWS> site(parameters, all, member.run, own_mean, own_var);
  for (long long batch = member.batches - 1 - blockIdx.y; batch >= 0; batch -= all.parts) {
    Vector<Storage, VECTOR> added[HELD];
    bool is_held = !is_given && batch == member.batches - 1;
    int count = member.each(batch, [&](int k, long long v) {
      if (!is_held) values[k] = load<VECTOR>(x + (first + v) * VECTOR);
      if (RESIDUAL) added[k] = load<VECTOR>(residual + (first + v) * VECTOR);
    });
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      if (k >= count) break;
      NormSite<T> sites[ROWS ? VECTOR : 1];
      site.sites(member.vector(batch, k), sites);
      T result[VECTOR];
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        T y = sites[site_of<ROWS>(i)].y(activation, values[k][i]);
        if (RESIDUAL) y = sum_of(y, added[k][i]);
        result[i] = activation.value(y);
      }
      store(z + (first + member.vector(batch, k)) * VECTOR, result);
    }
  }
}

}  // namespace normpass

extern "C" __global__ void __launch_bounds__(normpass::BLOCK, normpass::BLOCKS)
    sample_norm_act(NORMPASS_STORAGE* __restrict__ z, const NORMPASS_STORAGE* __restrict__ x,
                    const NORMPASS_STORAGE* __restrict__ residual,
                    const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ weight,
                    const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ bias,
                    normpass::Statistics<NORMPASS_STORAGE>* mean, normpass::Statistics<NORMPASS_STORAGE>* var,
                    double eps, double argument_1, double argument_2, long long is_given, long long is_centred,
                    NORMPASS_RUNS_PARAMETERS) {
  using T = normpass::Statistics<NORMPASS_STORAGE>;
  normpass::NORMPASS_ACTIVATION<T> activation(argument_1, argument_2);
  normpass::Parameters<T> parameters{weight, bias, mean, var, eps};
  normpass::sample_norm_act<NORMPASS_STORAGE, NORMPASS_VECTOR, NORMPASS_ROWS, NORMPASS_RESIDUAL>(
      z, x, residual, parameters, mean, var, activation, is_given != 0, is_centred != 0, NORMPASS_RUNS);
}
