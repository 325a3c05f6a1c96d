// A tile: some runs of consecutive values, all of the same channels, that are worked on together. The per-channel
// values are loaded once for all runs; 16-bit storage is widened into a buffer first. The loops over a tile stay simple
// enough for the compiler to vectorise.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "math.h"
#include "../include/activation.h"
#include "../include/moments.h"

namespace normpass {

constexpr int64_t tile_size = 512;  // values in a run: with its operands and results, within a cache of 32 KiB
constexpr int runs_at_once = 4;     // in a tile of several runs

// Results of this many bytes are written past the caches.
constexpr int64_t streamed_from = int64_t(1) << 24;

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

// The type in which values of a storage type are computed with.
template <class S> using Wide = std::conditional_t<std::is_same<S, double>::value, double, float>;

// Values in a line of the caches.
template <class A> constexpr int64_t line = 64 / sizeof(A);

// --- storage -------------------------------------------------------------------------------------------------

inline void widen(const BFloat16* from, float* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = same_bits<float>(static_cast<uint32_t>(from[i].bits) << 16);
}

// To the nearest, ties to even; a NaN stays one.
inline void narrow(const float* from, BFloat16* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits = same_bits<uint32_t>(from[i]);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to[i].bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

inline float half_to_float(uint16_t half) {
  uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return same_bits<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  float value = same_bits<float>(magnitude << 13) * 0x1p112f;  // also right for subnormals
  return same_bits<float>(same_bits<uint32_t>(value) | sign);
}

inline uint16_t float_to_half(float value) {
  uint32_t bits = same_bits<uint32_t>(value), sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 puts its bits, rounded, at the bottom
    float shifted = same_bits<float>(bits) + 0.5f;
    return static_cast<uint16_t>(sign | (same_bits<uint32_t>(shifted) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u) >> 13));
}

inline void widen(const Half* from, float* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) to[i] = half_to_float(from[i].bits);
}

inline void narrow(const float* from, Half* to, int64_t n) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
  for (; i < n; ++i) to[i].bits = float_to_half(from[i]);
}

struct Tile {
  int64_t offset;    // of the first value of the first run
  int64_t n;         // values in a run
  int64_t position;  // where the per-channel values of a run begin
  int runs = 1;      // 1, or runs_at_once for float storage
};

// The runs of a tile, for reading or writing.
template <class A> struct Runs {
  A* values;
  int64_t stride;
  NORMPASS_ALWAYS_INLINE A& operator()(int run, int64_t i) const { return values[run * stride + i]; }
};

// In place where the storage type is the wide one, else widened into `buffer`. `stride`: from run to run.
template <class S>
Runs<const Wide<S>> read_tile(const S* from, int64_t stride, Wide<S>* buffer, const Tile& tile) {
  if constexpr (std::is_same<S, Wide<S>>::value) {
    return {from + tile.offset, stride};
  } else {
    widen(from + tile.offset, buffer, tile.n);
    return {buffer, 0};
  }
}

// Asks the second-level cache for the n values that follow these n. Worth it where little is computed (a third of the
// time of moments, a tenth of norm_act's); backward, which reads two arrays, is slower with it.
template <class S> NORMPASS_ALWAYS_INLINE void prefetch_next(const S* values, int64_t n) {
  const char* next = reinterpret_cast<const char*>(values + n);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(S)); i += 64) __builtin_prefetch(next + i, 0, 2);
}

// Tiles of several runs are for float storage: doubles do without the code, and 16 bits would need larger buffers.
template <class S> constexpr bool has_several_runs() { return std::is_same<S, float>::value; }

// Calls f with the number of runs as a constant.
template <class S, class F> void with_runs(const Tile& tile, F f) {
  if constexpr (has_several_runs<S>()) {
    if (tile.runs == runs_at_once) return f(std::integral_constant<int, runs_at_once>());
  }
  f(std::integral_constant<int, 1>());
}

// Past the caches, so that what is overwritten is not read into them first.
inline void stream_bytes(void* to, const void* from, size_t bytes) {
#if defined(__AVX2__)
  char* target = static_cast<char*>(to);
  const char* source = static_cast<const char*>(from);
  size_t i = std::min(bytes, (64 - reinterpret_cast<uintptr_t>(target) % 64) % 64);
  std::memcpy(target, source, i);
#if defined(__AVX512F__)
  for (; i + 64 <= bytes; i += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(target + i), _mm512_loadu_si512(source + i));
#else
  for (; i + 32 <= bytes; i += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(target + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
#endif
  std::memcpy(target + i, source + i, bytes - i);
#else
  std::memcpy(to, from, bytes);
#endif
}

inline void end_of_stream() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Where the last loop over a tile writes (`buffer` has room for runs_at_once runs), and what takes the values from
// there if that is not their place yet.
template <class S>
Runs<Wide<S>> target_of(S* to, int64_t stride, Wide<S>* buffer, const Tile& tile, bool streamed) {
  if constexpr (std::is_same<S, Wide<S>>::value)
    if (!streamed) return {to + tile.offset, stride};
  return {buffer, tile_size};
}

template <class S> void finish_run(S* to, const Wide<S>* values, int64_t n, bool streamed) {
  if constexpr (std::is_same<S, Wide<S>>::value) {
    stream_bytes(to, values, n * sizeof(S));
  } else if (streamed) {
    alignas(64) S narrowed[tile_size];
    narrow(values, narrowed, n);
    stream_bytes(to, narrowed, n * sizeof(S));
  } else {
    narrow(values, to, n);
  }
}

template <class S>
void finish_tile(S* to, int64_t stride, const Runs<Wide<S>>& target, const Tile& tile, bool streamed) {
  if (std::is_same<S, Wide<S>>::value && !streamed) return;
  for (int run = 0; run < tile.runs; ++run)
    finish_run(to + tile.offset + run * stride, target.values + run * target.stride, tile.n, streamed);
}

struct ActivationCall {
  int code;
  double arg0, arg1;
};

// Calls f with the activation that `call` names.
template <class T, class F> void with_activation(ActivationCall call, F f) {
  switch (call.code) {
#define NORMPASS_CASE(CODE, NAME, TYPE) \
  case CODE: f(TYPE<T>(call.arg0, call.arg1)); return;
    NORMPASS_FOR_EACH_ACTIVATION(NORMPASS_CASE)
#undef NORMPASS_CASE
  }
}

}  // namespace normpass
