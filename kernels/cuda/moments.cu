// Mean and biased variance of each channel, and the step of the running statistics, in one launch.
//
// A thread sums deviations from a shift that lies among the values, a chunk at a time, and folds each chunk into its
// moments with Chan's formula; the next chunk is shifted by the mean so far. The first shift is the mean of the first
// few values. Is one of them an outlier, d from the others, the chunk loses about ulp·CHUNK·d² of a sum of squares
// that is at least d²: no more than any other value costs. After the threads come the blocks, by the same formula.
//
// Macros: NORMPASS_STORAGE (float, double, normpass::Half, normpass::BFloat16), NORMPASS_VECTOR, NORMPASS_ROWS.
#include "reduce.cuh"

#include "activation.h"
#include "moments.h"

namespace normpass {

constexpr int CHUNK = 64;  // vectors

// The mean of those of the loaded values that are there.
template <int LOADS, int VECTOR, bool ROWS, class T, class Loaded>
NORMPASS_DEVICE T mean_of_loaded(const Loaded (&loaded)[LOADS], int count, int channel) {
  T share = T(1) / T(ROWS ? count : count * VECTOR);
  T mean = 0;
#pragma unroll
  for (int k = 0; k < LOADS; ++k) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      if (channel_of<ROWS>(i) == channel && k < count) mean += loaded[k][i] * share;
    }
  }
  return mean;
}

template <class Storage, int VECTOR, bool ROWS>
NORMPASS_DEVICE void moments(const Storage* x, Statistics<Storage>* mean, Statistics<Storage>* var,
                             Statistics<Storage>* running_mean, Statistics<Storage>* running_var, double momentum,
                             double unbiased_share, Statistics<Storage>* partials, unsigned* arrivals,
                             const Grid& grid) {
  using T = Statistics<Storage>;
  constexpr int CHANNELS = ROWS ? VECTOR : 1;
  constexpr int LOADS = loads_in_flight<Vector<Storage, VECTOR>>(1, false);
  constexpr int VALUES = ROWS ? 1 : VECTOR;  // of one channel in a vector
  Walk<VECTOR, ROWS> walk(grid, false);
  Moments<T> own[CHANNELS];

  while (walk.inside()) {
    T sum[CHANNELS] = {}, squares[CHANNELS] = {};
    int vectors = 0;
    for (int round = 0; round < CHUNK / LOADS && walk.inside(); ++round) {
      Vector<Storage, VECTOR> loaded[LOADS];
      long long offsets[LOADS];
      int count = next_vectors(walk, offsets, [&](int k, long long offset) { loaded[k] = load<VECTOR>(x + offset); });
      if (own[0].count == T(0) && round == 0) {
#pragma unroll
        for (int c = 0; c < CHANNELS; ++c) own[c].mean = mean_of_loaded<LOADS, VECTOR, ROWS, T>(loaded, count, c);
      }
#pragma unroll
      for (int k = 0; k < LOADS; ++k) {
        if (k >= count) break;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i) {
          int c = channel_of<ROWS>(i);
          T deviation = loaded[k][i] - own[c].mean;
          sum[c] += deviation;
          squares[c] = multiply_add(deviation, deviation, squares[c]);
        }
      }
      vectors += count;
    }
    T values = T(vectors * VALUES);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      own[c].merge(moments_from_shifted_sums(values, own[c].mean, sum[c], squares[c]));
    }
  }

  reduce<T>(walk, grid, own, partials, arrivals, [=](long long channel, const Moments<T>& total) {
    T variance = total.variance();
    mean[channel] = total.mean;
    var[channel] = variance;
    if (running_mean == nullptr) return;
    running_mean[channel] = T(1 - momentum) * running_mean[channel] + T(momentum) * total.mean;
    running_var[channel] = T(1 - momentum) * running_var[channel] + T(unbiased_share) * variance;
  });
}

}  // namespace normpass

extern "C" __global__ void __launch_bounds__(normpass::THREADS, 1)
    moments(const NORMPASS_STORAGE* __restrict__ x, normpass::Statistics<NORMPASS_STORAGE>* mean,
            normpass::Statistics<NORMPASS_STORAGE>* var, normpass::Statistics<NORMPASS_STORAGE>* running_mean,
            normpass::Statistics<NORMPASS_STORAGE>* running_var, double momentum, double unbiased_share,
            normpass::Statistics<NORMPASS_STORAGE>* partials, unsigned* arrivals, NORMPASS_GRID_PARAMETERS) {
  normpass::moments<NORMPASS_STORAGE, NORMPASS_VECTOR, NORMPASS_ROWS>(
      x, mean, var, running_mean, running_var, momentum, unbiased_share, partials, arrivals, NORMPASS_GRID);
}
