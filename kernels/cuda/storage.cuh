// How values lie in memory, and vectors of them: up to 16 bytes in one access.
//
// The 16-bit types are converted here, so that no header of the CUDA toolkit is needed at run time.
#pragma once

#include "math.cuh"

namespace normpass {

struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

// Statistics of double are double, of anything narrower float.
template <class Storage> struct StatisticsOf {
  using type = float;
};
template <> struct StatisticsOf<double> {
  using type = double;
};
template <class Storage> using Statistics = typename StatisticsOf<Storage>::type;

NORMPASS_DEVICE float widened(float value) { return value; }
NORMPASS_DEVICE double widened(double value) { return value; }
NORMPASS_DEVICE float widened(BFloat16 value) { return __uint_as_float(static_cast<unsigned>(value.bits) << 16); }

#ifdef __CUDA_ARCH__
NORMPASS_DEVICE float widened(Half value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}
NORMPASS_DEVICE void narrow(float value, Half& result) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
}
#else
NORMPASS_DEVICE float widened(Half value) { return float_of_half_bits(value.bits); }
NORMPASS_DEVICE void narrow(float value, Half& result) { result.bits = half_bits_of(value); }
#endif

NORMPASS_DEVICE void narrow(float value, BFloat16& result) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
#else
  unsigned bits = __float_as_uint(value);
  unsigned rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  result.bits = static_cast<unsigned short>(value == value ? rounded >> 16 : 0x7fffu);
#endif
}
NORMPASS_DEVICE void narrow(float value, float& result) { result = value; }
NORMPASS_DEVICE void narrow(double value, double& result) { result = value; }

// VECTOR neighbouring values, read and written at once.
template <class Storage, int VECTOR> struct alignas(sizeof(Storage) * VECTOR) Vector {
  Storage values[VECTOR];

  NORMPASS_DEVICE Statistics<Storage> operator[](int i) const { return widened(values[i]); }
  NORMPASS_DEVICE void set(int i, Statistics<Storage> value) { narrow(value, values[i]); }
};

template <int VECTOR, class Storage> NORMPASS_DEVICE Vector<Storage, VECTOR> load(const Storage* source) {
  return *reinterpret_cast<const Vector<Storage, VECTOR>*>(source);
}

template <int VECTOR, class Storage> NORMPASS_DEVICE void store(Storage* target, const Vector<Storage, VECTOR>& vector) {
  *reinterpret_cast<Vector<Storage, VECTOR>*>(target) = vector;
}

}  // namespace normpass
