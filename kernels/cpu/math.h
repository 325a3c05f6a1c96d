// The elementary functions that activation.h asks for. Those in float have no branch and no table, so that a loop
// over them vectorises; each is within a few units in the last place. Those in double are the C library's.
//
// Polynomials: Cephes (S. L. Moshier, exp2f, expf, logf, tanhf), but for the normal distribution's.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace normpass {

#define NORMPASS_EXPORT extern "C" __attribute__((visibility("default")))
#define NORMPASS_ALWAYS_INLINE inline __attribute__((always_inline))
#define NORMPASS_INLINED_LAMBDA __attribute__((always_inline))  // goes behind its parameters
#define NORMPASS_SHARED __attribute__((noinline))  // a loop that several storage types have in common: compiled once

// One rounding where the processor has it. Written out, so that forward and backward round alike.
NORMPASS_ALWAYS_INLINE float multiply_add(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
NORMPASS_ALWAYS_INLINE double multiply_add(double a, double b, double c) {
#ifdef __FMA__
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

template <class To, class From> NORMPASS_ALWAYS_INLINE To same_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// Horner's rule, the highest power first. A recursion, for a loop inside it would keep the loop around it scalar.
NORMPASS_ALWAYS_INLINE float polynomial(float, float result) { return result; }
template <class... Rest> NORMPASS_ALWAYS_INLINE float polynomial(float x, float result, float next, Rest... rest) {
  return polynomial(x, multiply_add(result, x, next), rest...);
}

// x = n·log 2 + r with |r| <= log 2 / 2, and q = exp(r) − 1.
struct ReducedExponent {
  int32_t n;
  float q;
};

NORMPASS_ALWAYS_INLINE ReducedExponent reduce_exponent(float x) {
  constexpr float rounder = 12582912.f;  // 1.5·2²³: adding it rounds to a whole number, in the low bits
  float shifted = multiply_add(x, 1.44269504088896341f, rounder);
  float n = shifted - rounder;
  float r = multiply_add(n, -0.693359375f, x);
  r = multiply_add(n, 2.12194440e-4f, r);
  float p = polynomial(r, 1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                       5.0000001201e-1f);
  float q = multiply_add(p * r, r, r);
  return {same_bits<int32_t>(shifted) - same_bits<int32_t>(rounder), q};
}

NORMPASS_ALWAYS_INLINE float power_of_2(int32_t n) {
  return same_bits<float>((static_cast<uint32_t>(n) + 127u) << 23);
}

// 2ⁿ·2ᶠ with |f| <= 1/2. Below −87.7 it is 0, for n = −127 has no bits; above 88.4 it is infinite.
NORMPASS_ALWAYS_INLINE float exponential(float x) {
  constexpr float rounder = 12582912.f, log2e = 1.44269504f, rest_of_log2e = 1.92596299e-8f;
  x = x < -88.f ? -88.f : x;
  x = x > 89.f ? 89.f : x;
  float shifted = multiply_add(x, log2e, rounder);
  float f = multiply_add(x, rest_of_log2e, multiply_add(x, log2e, rounder - shifted));
  float p = polynomial(f, 1.535336188319500e-4f, 1.339887440266574e-3f, 9.618437357674640e-3f, 5.550332471162809e-2f,
                       2.402264791363012e-1f, 6.931472028550421e-1f, 1.f);
  return p * same_bits<float>((same_bits<uint32_t>(shifted) << 23) + 0x3f800000u);
}

// For x <= 0, which is all that the ELUs ask for (and up to 88).
NORMPASS_ALWAYS_INLINE float exponential_minus_1(float x) {
  x = x < -80.f ? -80.f : x;
  ReducedExponent e = reduce_exponent(x);
  float scale = power_of_2(e.n);
  return multiply_add(scale, e.q, scale - 1.f);
}

// log x for a normal x > 0.
NORMPASS_ALWAYS_INLINE float logarithm(float x) {
  uint32_t bits = same_bits<uint32_t>(x) - 0x3f3504f3u;  // the mantissa from sqrt(1/2) to sqrt(2)
  int32_t exponent = static_cast<int32_t>(bits) >> 23;
  float m = same_bits<float>((bits & 0x7fffffu) + 0x3f3504f3u) - 1.f;
  float n = static_cast<float>(exponent);
  float square = m * m;
  float p = polynomial(m, 7.0376836292e-2f, -1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f,
                       -1.6668057665e-1f, 2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f);
  float y = p * m * square;
  y = multiply_add(n, -2.12194440e-4f, y);
  y = multiply_add(square, -0.5f, y);
  return multiply_add(n, 0.693359375f, m + y);
}

// What rounding 1 + x lost is put back as a factor (Higham, "Accuracy and Stability", 1.14.1).
NORMPASS_ALWAYS_INLINE float logarithm_of_1_plus(float x) {
  float w = 1.f + x;
  float rounded = w - 1.f;
  float result = logarithm(w) * (x / (rounded == 0.f ? 1.f : rounded));
  result = rounded == 0.f ? x : result;
  return w > 3e38f ? w : result;  // infinity, which has no logarithm here
}

NORMPASS_ALWAYS_INLINE float hyperbolic_tangent(float x) {
  float magnitude = std::fabs(x);
  float large = 1.f - 2.f / (exponential(2.f * magnitude) + 1.f);
  float square = x * x;
  float p = polynomial(square, -5.70498872745e-3f, 2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f,
                       -3.33332819422e-1f);
  float small = multiply_add(p * square, x, x);
  return magnitude > 0.625f ? std::copysign(large, x) : small;
}

// The standard normal distribution at y, Φ(y), and exp(−y²/2).
template <class T> struct Normal {
  T distribution, bell;
};

// Φ(−|y|) = exp(−y²/2)·t·q(t) with t = 1/(1 + 0.23·|y|); q is the polynomial of the least relative error, 1e-7.
NORMPASS_ALWAYS_INLINE Normal<float> normal_at(float y) {
  float bell = exponential(-0.5f * y * y);
  float t = 1.f / multiply_add(0.23f, std::fabs(y), 1.f);
  float q = polynomial(t, -7.3743302914e-2f, 2.6820309210e-1f, -2.3373975889e-1f, 2.5231013097e-1f,
                       3.6994041782e-5f, 1.0583817819e-1f, 8.9190598492e-2f, 9.1904117456e-2f);
  float tail = bell * t * q;
  return {y < 0.f ? tail : 1.f - tail, bell};
}

inline double exponential(double x) { return std::exp(x); }
inline double exponential_minus_1(double x) { return std::expm1(x); }
inline double logarithm_of_1_plus(double x) { return std::log1p(x); }
inline double hyperbolic_tangent(double x) { return std::tanh(x); }
inline Normal<double> normal_at(double y) {
  return {0.5 * (1 + std::erf(y * 0.70710678118654752440)), std::exp(-0.5 * y * y)};
}

}  // namespace normpass
