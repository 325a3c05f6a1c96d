// dx += B·(x − mean) + C, per channel and in place; `total` is B for each channel, then C.
//
// Macros: those of moments.cu.
#include "walk.cuh"

namespace normpass {

template <class T> struct ThroughStatistics {
  T mean, slope, shift;
};

template <class Storage, int VECTOR, bool ROWS>
NORMPASS_DEVICE void add_statistics_gradient(Storage* dx, const Storage* x, const Statistics<Storage>* mean,
                                             const double* total, const Grid& grid) {
  using T = Statistics<Storage>;
  constexpr int CHANNELS = ROWS ? VECTOR : 1;
  constexpr int LOADS = loads_in_flight<Vector<Storage, VECTOR>>(2, true);
  Walk<VECTOR, ROWS> walk(grid, true);
  ThroughStatistics<T> own[CHANNELS];
  share_channels<T>(walk, grid, own, [&](long long channel) {
    return ThroughStatistics<T>{mean[channel], T(total[channel]), T(total[channel + grid.channels])};
  });

  while (walk.inside()) {
    Vector<Storage, VECTOR> before[LOADS], values[LOADS];
    long long offsets[LOADS];
    int count = next_vectors(walk, offsets, [&](int k, long long offset) {
      before[k] = load<VECTOR>(dx + offset);
      values[k] = load<VECTOR>(x + offset);
    });
#pragma unroll
    for (int k = 0; k < LOADS; ++k) {
      if (k >= count) break;
      T result[VECTOR];
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        const ThroughStatistics<T>& at = own[channel_of<ROWS>(i)];
        result[i] = before[k][i] + multiply_add(values[k][i] - at.mean, at.slope, at.shift);
      }
      store(dx + offsets[k], result);
    }
  }
}

}  // namespace normpass

extern "C" __global__ void __launch_bounds__(normpass::THREADS, 1)
    add_statistics_gradient(NORMPASS_STORAGE* dx, const NORMPASS_STORAGE* __restrict__ x,
                            const normpass::Statistics<NORMPASS_STORAGE>* __restrict__ mean,
                            const double* __restrict__ total, NORMPASS_GRID_PARAMETERS) {
  normpass::add_statistics_gradient<NORMPASS_STORAGE, NORMPASS_VECTOR, NORMPASS_ROWS>(dx, x, mean, total,
                                                                                       NORMPASS_GRID);
}
