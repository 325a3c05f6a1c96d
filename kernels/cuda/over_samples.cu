// dweight = Σ dy·x̂ and dbias = Σ dy of a channel, over the samples, in a fixed order. `sums` is what the kernel before has
// left for each channel of each sample: Σ dy, (samples, channels), then Σ dy·x̂.
//
// Macros: those of moments.cu; NORMPASS_STORAGE is the dtype of the statistics, NORMPASS_ROWS true.
#include "reduce.cuh"

namespace normpass {

template <class T, int VECTOR>
NORMPASS_DEVICE void over_samples(T* dweight, T* dbias, const T* sums, T* partials, unsigned* arrivals,
                                  const Grid& grid) {
  constexpr int LOADS = loads_in_flight<Vector<T, VECTOR>>(2, false);
  Walk<VECTOR, true> walk(grid, false);
  Sums<T> own[VECTOR];
  const T* products = sums + grid.positions * grid.channels;
  while (walk.inside()) {
    Vector<T, VECTOR> dy[LOADS], dy_normalized[LOADS];
    long long offsets[LOADS];
    int there = next_vectors(walk, offsets, [&](int k, long long offset) {
      dy[k] = load<VECTOR>(sums + offset);
      dy_normalized[k] = load<VECTOR>(products + offset);
    });
#pragma unroll
    for (int k = 0; k < LOADS; ++k) {
      if (k >= there) break;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) own[i].dy += dy[k][i], own[i].dy_deviation += dy_normalized[k][i];
    }
  }
  reduce<T>(walk, grid, own, partials, arrivals, [&](long long channel, const Sums<T>& total) {
    if (dbias != nullptr) dbias[channel] = total.dy;
    if (dweight != nullptr) dweight[channel] = total.dy_deviation;
  });
}

}  // namespace normpass

extern "C" __global__ void __launch_bounds__(normpass::THREADS, 1)
    over_samples(NORMPASS_STORAGE* dweight, NORMPASS_STORAGE* dbias, const NORMPASS_STORAGE* sums,
                 NORMPASS_STORAGE* partials, unsigned* arrivals, NORMPASS_GRID_PARAMETERS) {
  normpass::over_samples<NORMPASS_STORAGE, NORMPASS_VECTOR>(dweight, dbias, sums, partials, arrivals, NORMPASS_GRID);
}
