// What activation.h asks its includer for, in float and double, and the few operations whose rounding matters here.
//
// NORMPASS_NARROW is set for 16-bit storage, whose rounding hides the last bits of the fast exponential.
#pragma once

#define NORMPASS_DEVICE __device__ __forceinline__

namespace normpass {

#ifdef NORMPASS_NARROW
NORMPASS_DEVICE float exponential(float y) { return __expf(y); }
#else
NORMPASS_DEVICE float exponential(float y) { return expf(y); }
#endif
NORMPASS_DEVICE double exponential(double y) { return exp(y); }

NORMPASS_DEVICE float exponential_minus_1(float y) { return expm1f(y); }
NORMPASS_DEVICE double exponential_minus_1(double y) { return expm1(y); }

NORMPASS_DEVICE float logarithm_of_1_plus(float y) { return log1pf(y); }
NORMPASS_DEVICE double logarithm_of_1_plus(double y) { return log1p(y); }

NORMPASS_DEVICE float hyperbolic_tangent(float y) { return tanhf(y); }
NORMPASS_DEVICE double hyperbolic_tangent(double y) { return tanh(y); }

// The standard normal distribution at y, and exp(−y²/2).
template <class T> struct Normal {
  T distribution, bell;
};
NORMPASS_DEVICE Normal<float> normal_at(float y) {
  return {0.5f * (1.f + erff(y * 0.70710678118654752440f)), exponential(-0.5f * y * y)};
}
NORMPASS_DEVICE Normal<double> normal_at(double y) {
  return {0.5 * (1 + erf(y * 0.70710678118654752440)), exponential(-0.5 * y * y)};
}

// Spelled out, so that no kernel is contracted differently from another: y must not depend on who computes it.
NORMPASS_DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
NORMPASS_DEVICE double multiply_add(double a, double b, double c) { return __fma_rn(a, b, c); }

NORMPASS_DEVICE float sum_of(float a, float b) { return __fadd_rn(a, b); }
NORMPASS_DEVICE double sum_of(double a, double b) { return __dadd_rn(a, b); }

NORMPASS_DEVICE float reciprocal_root(float v) { return rsqrtf(v); }
NORMPASS_DEVICE double reciprocal_root(double v) { return rsqrt(v); }

}  // namespace normpass
