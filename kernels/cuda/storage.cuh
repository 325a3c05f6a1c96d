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

// A 16-bit value from the low half of a word, the high half ignored, and two values to a word.
#ifdef __CUDA_ARCH__
NORMPASS_DEVICE float low_half(unsigned word, Half) {
  float wide;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(wide) : "r"(word));
  return wide;
}
NORMPASS_DEVICE unsigned narrow(float value, Half) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#else
NORMPASS_DEVICE float low_half(unsigned word, Half) { return float_of_half_bits(word & 0xffffu); }
NORMPASS_DEVICE unsigned narrow(float value, Half) { return half_bits_of(value); }
#endif
NORMPASS_DEVICE float high_half(unsigned word, Half type) { return low_half(word >> 16, type); }

NORMPASS_DEVICE float low_half(unsigned word, BFloat16) { return __uint_as_float(word << 16); }
NORMPASS_DEVICE float high_half(unsigned word, BFloat16) { return __uint_as_float(word & 0xffff0000u); }
NORMPASS_DEVICE unsigned narrow(float value, BFloat16) {
  unsigned bits = __float_as_uint(value);
  return value == value ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : 0x7fffu;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
NORMPASS_DEVICE unsigned pair(float low, float high, Half) {
  unsigned word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
NORMPASS_DEVICE unsigned pair(float low, float high, BFloat16) {
  unsigned word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
#else
template <class Storage> NORMPASS_DEVICE unsigned pair(float low, float high, Storage type) {
  return narrow(low, type) | narrow(high, type) << 16;
}
#endif

// What is read again of a value that is stored.
NORMPASS_DEVICE float as_stored(float value, float) { return value; }
NORMPASS_DEVICE double as_stored(double value, double) { return value; }
template <class Narrow> NORMPASS_DEVICE float as_stored(float value, Narrow type) {
  return low_half(narrow(value, type), type);
}

// VECTOR values as the words of the machine. Words are taken apart by hand: what the compiler makes of a struct of
// 16-bit values is several narrow accesses where one of 16 bytes is meant.
template <class Storage, int VECTOR> struct Vector {
  static constexpr int WORDS = (sizeof(Storage) * VECTOR + 3) / 4;
  unsigned words[WORDS];

  NORMPASS_DEVICE Statistics<Storage> operator[](int i) const { return value(i, Storage()); }

 private:
  NORMPASS_DEVICE float value(int i, float) const { return __uint_as_float(words[i]); }
  NORMPASS_DEVICE double value(int i, double) const { return __hiloint2double(words[2 * i + 1], words[2 * i]); }
  template <class Narrow> NORMPASS_DEVICE float value(int i, Narrow type) const {
    return i % 2 ? high_half(words[i / 2], type) : low_half(words[i / 2], type);
  }
};

template <int VECTOR> NORMPASS_DEVICE void set_words(const float (&values)[VECTOR], unsigned* words, float) {
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) words[i] = __float_as_uint(values[i]);
}
template <int VECTOR> NORMPASS_DEVICE void set_words(const double (&values)[VECTOR], unsigned* words, double) {
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    words[2 * i] = __double2loint(values[i]);
    words[2 * i + 1] = __double2hiint(values[i]);
  }
}
template <int VECTOR, class Narrow>
NORMPASS_DEVICE void set_words(const float (&values)[VECTOR], unsigned* words, Narrow type) {
#pragma unroll
  for (int i = 0; i < VECTOR; i += 2) {
    words[i / 2] = VECTOR == 1 ? narrow(values[i], type) : pair(values[i], values[(i + 1) % VECTOR], type);
  }
}

template <int VECTOR, class Storage> NORMPASS_DEVICE Vector<Storage, VECTOR> load(const Storage* source) {
  constexpr int BYTES = sizeof(Storage) * VECTOR;
  Vector<Storage, VECTOR> result;
  if constexpr (BYTES == 16) {
    uint4 words = *reinterpret_cast<const uint4*>(source);
    result.words[0] = words.x, result.words[1] = words.y, result.words[2] = words.z, result.words[3] = words.w;
  } else if constexpr (BYTES == 8) {
    uint2 words = *reinterpret_cast<const uint2*>(source);
    result.words[0] = words.x, result.words[1] = words.y;
  } else if constexpr (BYTES == 4) {
    result.words[0] = *reinterpret_cast<const unsigned*>(source);
  } else {
    result.words[0] = *reinterpret_cast<const unsigned short*>(source);
  }
  return result;
}

// __stcg, because the compiler takes a plain assignment apart into stores of 4 bytes.
template <int VECTOR, class Storage>
NORMPASS_DEVICE void store(Storage* target, const Statistics<Storage> (&values)[VECTOR]) {
  constexpr int BYTES = sizeof(Storage) * VECTOR;
  unsigned words[Vector<Storage, VECTOR>::WORDS];
  set_words(values, words, Storage());
  if constexpr (BYTES == 16) {
    __stcg(reinterpret_cast<uint4*>(target), uint4{words[0], words[1], words[2], words[3]});
  } else if constexpr (BYTES == 8) {
    __stcg(reinterpret_cast<uint2*>(target), uint2{words[0], words[1]});
  } else if constexpr (BYTES == 4) {
    *reinterpret_cast<unsigned*>(target) = words[0];
  } else {
    *reinterpret_cast<unsigned short*>(target) = static_cast<unsigned short>(words[0]);
  }
}

}  // namespace normpass
