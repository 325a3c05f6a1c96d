// The numerically stable merge of moments: count, mean and the sum of squared deviations of two sets of values
// (Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979):
//
//   n = n₁ + n₂      δ = mean₂ − mean₁      mean = mean₁ + δ·n₂/n      M2 = M2₁ + M2₂ + δ²·n₁·n₂/n
//
// Included after activation.h, which defines NORMPASS_INLINE.
#pragma once

namespace normpass {

template <class T> struct Moments {
  T count = 0, mean = 0, m2 = 0;

  NORMPASS_INLINE void merge(T other_count, T other_mean, T other_m2) {
    if (other_count == T(0)) return;
    T total = count + other_count;
    T delta = other_mean - mean;
    T share = other_count / total;
    mean += delta * share;
    m2 += other_m2 + delta * delta * count * share;
    count = total;
  }
  NORMPASS_INLINE void merge(const Moments& other) { merge(other.count, other.mean, other.m2); }

  NORMPASS_INLINE T variance() const { return m2 / count; }
};

// The moments of `count` values from the sums of (value − shift) and (value − shift)². Accurate where `shift` lies
// among the values.
template <class T> NORMPASS_INLINE Moments<T> moments_from_shifted_sums(T count, T shift, T sum, T sum_of_squares) {
  Moments<T> result;
  T mean_deviation = sum / count;
  T m2 = sum_of_squares - sum * mean_deviation;
  result.count = count;
  result.mean = shift + mean_deviation;
  result.m2 = m2 < T(0) ? T(0) : m2;
  return result;
}

}  // namespace normpass
