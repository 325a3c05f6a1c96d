// The gradients of inplace_abn from its output z: y = act⁻¹(z), u = y − bias, k = 1/weight.
//
// The weight keeps its sign; in this division alone its magnitude is at least the machine epsilon of the statistics,
// and zero counts as positive.
#define NORMPASS_SITE OutputSite
#include "norm_site.cuh"

namespace normpass {

template <class T> struct OutputSite {
  T scale, bias;

  OutputSite() = default;
  NORMPASS_DEVICE OutputSite(const Parameters<T>& parameters, long long channel)
      : scale(parameters.weight_of(channel) * parameters.inverse_deviation(channel)),
        bias(parameters.bias_of(channel)) {}

  static NORMPASS_DEVICE T unit(const Parameters<T>& parameters, long long channel) {
    const T smallest = sizeof(T) == 8 ? T(2.220446049250313e-16) : T(1.1920928955078125e-07);
    T weight = parameters.weight_of(channel);
    T magnitude = weight < T(0) ? -weight : weight;
    magnitude = magnitude < smallest ? smallest : magnitude;
    return T(1) / (weight < T(0) ? -magnitude : magnitude);
  }

  template <class Activation> NORMPASS_DEVICE T y(const Activation& activation, T z) const {
    return activation.inverse(z);
  }

  template <class Activation> NORMPASS_DEVICE T deviation(const Activation& activation, T z) const {
    return activation.inverse(z) - bias;
  }
};

}  // namespace normpass

#include "backward.cuh"
