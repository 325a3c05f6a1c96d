// As many values as a register holds, and what the kernels that work on channels side by side do with them.
#pragma once

#include <cstdlib>
#include <new>

#include "tile.h"

namespace normpass {

template <class A> struct Vector {
  typedef A Values __attribute__((vector_size(vector_bytes)));
  typedef A Unaligned __attribute__((vector_size(vector_bytes), aligned(sizeof(A)), may_alias));
  static constexpr int64_t lanes = normpass::lanes<A>;
  Values values;  // not initialised by default: V{} is zero

  static NORMPASS_ALWAYS_INLINE Vector load(const A* from) { return {*reinterpret_cast<const Unaligned*>(from)}; }
  static NORMPASS_ALWAYS_INLINE Vector all(A value) { return {value - Values{}}; }
  // The first n of them, n < lanes; zeros behind.
  static NORMPASS_ALWAYS_INLINE Vector load_some(const A* from, int64_t n);
  NORMPASS_ALWAYS_INLINE void store(A* to) const { *reinterpret_cast<Unaligned*>(to) = values; }
  NORMPASS_ALWAYS_INLINE void store_some(A* to, int64_t n) const;
  NORMPASS_ALWAYS_INLINE void stream(A* to) const;  // past the caches; to the beginning of a line

  NORMPASS_ALWAYS_INLINE Vector operator+(const Vector& b) const { return {values + b.values}; }
  NORMPASS_ALWAYS_INLINE Vector operator-(const Vector& b) const { return {values - b.values}; }
  NORMPASS_ALWAYS_INLINE Vector operator-() const { return {-values}; }
  NORMPASS_ALWAYS_INLINE Vector operator*(A b) const { return {values * b}; }
  NORMPASS_ALWAYS_INLINE void operator+=(const Vector& b) { values += b.values; }
  NORMPASS_ALWAYS_INLINE void add_product(const Vector& a, const Vector& b);
};

#if defined(__AVX512F__)
template <> inline void Vector<float>::add_product(const Vector& a, const Vector& b) {
  values = _mm512_fmadd_ps(a.values, b.values, values);
}
template <> inline void Vector<double>::add_product(const Vector& a, const Vector& b) {
  values = _mm512_fmadd_pd(a.values, b.values, values);
}
template <> inline Vector<float> Vector<float>::load_some(const float* from, int64_t n) {
  return {_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), from)};
}
template <> inline Vector<double> Vector<double>::load_some(const double* from, int64_t n) {
  return {_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), from)};
}
template <> inline void Vector<float>::store_some(float* to, int64_t n) const {
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << n) - 1), values);
}
template <> inline void Vector<double>::store_some(double* to, int64_t n) const {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>((1u << n) - 1), values);
}
#else
#if defined(__AVX2__)
template <> inline void Vector<float>::add_product(const Vector& a, const Vector& b) {
  values = _mm256_fmadd_ps(a.values, b.values, values);
}
template <> inline void Vector<double>::add_product(const Vector& a, const Vector& b) {
  values = _mm256_fmadd_pd(a.values, b.values, values);
}
#else
template <class A> inline void Vector<A>::add_product(const Vector& a, const Vector& b) {
  values += a.values * b.values;
}
#endif
template <class A> inline Vector<A> Vector<A>::load_some(const A* from, int64_t n) {
  Vector v{};
  std::memcpy(&v.values, from, n * sizeof(A));
  return v;
}
template <class A> inline void Vector<A>::store_some(A* to, int64_t n) const {
  std::memcpy(to, &values, n * sizeof(A));
}
#endif

template <class A> inline void Vector<A>::stream(A* to) const {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<const __m512i&>(values));
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<const __m256i&>(values));
#else
  store(to);
#endif
}

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Scratch memory, at the beginning of a line of the caches. Not initialised.
template <class A> class Scratch {
 public:
  explicit Scratch(int64_t n) : values_(static_cast<A*>(std::aligned_alloc(64, round_up(n * sizeof(A) + 1, 64)))) {
    if (values_ == nullptr) throw std::bad_alloc();
  }
  Scratch(const Scratch&) = delete;
  ~Scratch() { std::free(values_); }
  A* data() const { return values_; }

 private:
  A* values_;
};

// The lanes of lanes vectors, exchanged: lane j of v[i] becomes lane i of v[j].
template <class A> NORMPASS_ALWAYS_INLINE void transpose(Vector<A>* v) {
  constexpr int n = Vector<A>::lanes;
  typedef std::conditional_t<sizeof(A) == 8, int64_t, int32_t> Index;
  typedef Index Indices __attribute__((vector_size(vector_bytes)));
#pragma GCC unroll 4
  for (int step = 1; step < n; step *= 2) {
    Indices low, high;  // of the lanes of a, and from n on of those of b
    for (int i = 0; i < n; ++i) {
      low[i] = i & step ? n + i - step : i;
      high[i] = i & step ? n + i : i + step;
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) {
      if (i & step) continue;
      auto a = v[i].values, b = v[i + step].values;
      v[i].values = __builtin_shuffle(a, b, low);
      v[i + step].values = __builtin_shuffle(a, b, high);
    }
  }
}

}  // namespace normpass
