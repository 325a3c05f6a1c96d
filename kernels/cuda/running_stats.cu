// One step of the running statistics: (1 − momentum)·running + momentum·new, with the unbiased variance.
//
// Macros: NORMPASS_STORAGE, here the dtype of the statistics.
#include "storage.cuh"

extern "C" __global__ void running_stats(NORMPASS_STORAGE* running_mean, NORMPASS_STORAGE* running_var,
                                         const NORMPASS_STORAGE* mean, const NORMPASS_STORAGE* var, double momentum,
                                         double unbiased_share, long long channels) {
  using T = NORMPASS_STORAGE;
  long long channel = blockIdx.x * static_cast<long long>(blockDim.x) + threadIdx.x;
  if (channel >= channels) return;
  running_mean[channel] = T(1 - momentum) * running_mean[channel] + T(momentum) * mean[channel];
  running_var[channel] = T(1 - momentum) * running_var[channel] + T(unbiased_share) * var[channel];
}
