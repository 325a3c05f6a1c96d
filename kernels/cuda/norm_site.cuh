// y = (x − mean)·a + bias, a = weight·rsqrt(var + eps): one arithmetic for forward and backward, bit for bit.
#pragma once

#include "storage.cuh"

#include "activation.h"

namespace normpass {

// The per-channel tensors of a norm; weight and bias may be null.
template <class T> struct Parameters {
  const T *weight, *bias, *mean, *var;
  double eps;

  NORMPASS_DEVICE T weight_of(long long channel) const { return weight == nullptr ? T(1) : weight[channel]; }
  NORMPASS_DEVICE T bias_of(long long channel) const { return bias == nullptr ? T(0) : bias[channel]; }
  NORMPASS_DEVICE T inverse_deviation(long long channel) const { return reciprocal_root(var[channel] + T(eps)); }
};

// One channel of a norm whose input is at hand.
template <class T> struct NormSite {
  T mean, scale, bias;

  NormSite() = default;
  NORMPASS_DEVICE NormSite(const Parameters<T>& parameters, long long channel)
      : mean(parameters.mean[channel]), scale(parameters.weight_of(channel) * parameters.inverse_deviation(channel)),
        bias(parameters.bias_of(channel)) {}

  // k of x̂ = k·deviation.
  static NORMPASS_DEVICE T unit(const Parameters<T>& parameters, long long channel) {
    return parameters.inverse_deviation(channel);
  }

  template <class Activation> NORMPASS_DEVICE T deviation(const Activation&, T x) const { return x - mean; }

  template <class Activation> NORMPASS_DEVICE T y(const Activation&, T x) const {
    return multiply_add(x - mean, scale, bias);
  }
};

}  // namespace normpass
