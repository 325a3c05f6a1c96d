// dweight = Σ dy·x̂ and dbias = Σ dy over the rows of (rows, channels), one value a channel, of which each row has a mean
// and a variance for each of its groups: in one pass over x and the gradient, in a fixed order.
//
// Macros: those of norm_act.cu; NORMPASS_ROWS is true.
#include "norm_site.cuh"
#include "reduce.cuh"

namespace normpass {

template <class T> struct Parameter {
  T weight, bias;
};

template <class Storage, int VECTOR, bool RESIDUAL, class Activation>
NORMPASS_DEVICE void over_rows(Statistics<Storage>* dweight, Statistics<Storage>* dbias, const Storage* grad,
                               const Storage* x, const Storage* residual,
                               const Parameters<Statistics<Storage>>& parameters, const Activation& activation,
                               long long groups, long long group_channels, Statistics<Storage>* partials,
                               unsigned* arrivals, const Grid& grid) {
  using T = Statistics<Storage>;
  constexpr int LOADS = loads_in_flight<Vector<Storage, VECTOR>>(RESIDUAL ? 3 : 2, false);
  Walk<VECTOR, true> walk(grid, false);
  Parameter<T> at[VECTOR];
  Sums<T> own[VECTOR];
  share_channels<T>(walk, grid, at, [&](long long channel) {
    return Parameter<T>{parameters.weight_of(channel), parameters.bias_of(channel)};
  });
  long long group = walk.channel / group_channels;

  while (walk.inside()) {
    Vector<Storage, VECTOR> outer[LOADS], values[LOADS], added[LOADS];
    T mean[LOADS], rstd[LOADS];
    long long offsets[LOADS];
    int there = next_vectors(walk, offsets, [&](int k, long long offset) {
      outer[k] = load<VECTOR>(grad + offset);
      values[k] = load<VECTOR>(x + offset);
      if (RESIDUAL) added[k] = load<VECTOR>(residual + offset);
      long long run = walk.position * groups + group;
      mean[k] = parameters.mean[run], rstd[k] = parameters.inverse_deviation(run);
    });
#pragma unroll
    for (int k = 0; k < LOADS; ++k) {
      if (k >= there) break;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        NormSite<T> site;
        site.mean = mean[k], site.scale = at[i].weight * rstd[k], site.bias = at[i].bias;
        T y = site.y(activation, values[k][i]);
        if (RESIDUAL) y = sum_of(y, added[k][i]);
        T dy = activation.gradient(outer[k][i], y);
        own[i].dy += dy;
        own[i].dy_deviation = multiply_add(dy, (values[k][i] - mean[k]) * rstd[k], own[i].dy_deviation);
      }
    }
  }

  reduce<T>(walk, grid, own, partials, arrivals, [&](long long channel, const Sums<T>& total) {
    if (dbias != nullptr) dbias[channel] = total.dy;
    if (dweight != nullptr) dweight[channel] = total.dy_deviation;
  });
}

}  // namespace normpass

extern "C" __global__ void __launch_bounds__(normpass::THREADS, 1)
    over_rows(normpass::Statistics<NORMPASS_STORAGE>* dweight, normpass::Statistics<NORMPASS_STORAGE>* dbias,
              const NORMPASS_STORAGE* __restrict__ grad, const NORMPASS_STORAGE* __restrict__ x,
              const NORMPASS_STORAGE* __restrict__ residual, const normpass::Statistics<NORMPASS_STORAGE>* weight,
              const normpass::Statistics<NORMPASS_STORAGE>* bias, const normpass::Statistics<NORMPASS_STORAGE>* mean,
              const normpass::Statistics<NORMPASS_STORAGE>* var, double eps, double argument_1, double argument_2,
              long long groups, long long group_channels, normpass::Statistics<NORMPASS_STORAGE>* partials,
              unsigned* arrivals, NORMPASS_GRID_PARAMETERS) {
  using T = normpass::Statistics<NORMPASS_STORAGE>;
  normpass::NORMPASS_ACTIVATION<T> activation(argument_1, argument_2);
  normpass::over_rows<NORMPASS_STORAGE, NORMPASS_VECTOR, NORMPASS_RESIDUAL>(
      dweight, dbias, grad, x, residual, normpass::Parameters<T>{weight, bias, mean, var, eps}, activation, groups,
      group_channels, partials, arrivals, NORMPASS_GRID);
}
