// A tile: a run of consecutive values, or some of the same channels that are worked on together. 16-bit storage is
// widened into a buffer first. The loops over a tile go line by line (`each_line`), each line a short loop that the
// compiler makes a few vector instructions of: with `ivdep`, for what is written is not read, and `unroll 1`, for
// unrolled before it is vectorised it would stay scalar.
//
// What a loop over a tile is given goes by reference. Copied, its fields are written one by one and read two by two,
// which the processor does not forward: it waits until all stores before, those of the last tile, have reached the
// cache. That took longer than the tile itself.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
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
constexpr int runs_at_once = 4;     // in a tile of several runs, which only float storage has

// Results of this many bytes, a quarter of a usual last-level cache, are written past the caches.
constexpr int64_t streamed_from = int64_t(1) << 23;

struct BFloat16 { uint16_t bits; };
struct Half { uint16_t bits; };

// The type in which values of a storage type are computed with.
template <class S> using Wide = std::conditional_t<std::is_same<S, double>::value, double, float>;

// Values in a line of the caches, and in a register.
template <class A> constexpr int64_t line = 64 / sizeof(A);
#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
template <class A> constexpr int64_t lanes = vector_bytes / sizeof(A);

// An array that begins at a line: a vector that lies in two of them takes twice as long to load.
template <class A> struct AtLines {
  using value_type = A;
  AtLines() = default;
  template <class B> AtLines(const AtLines<B>&) {}
  // A whole line may be read from anywhere on.
  A* allocate(size_t n) { return static_cast<A*>(::operator new(n * sizeof(A) + 64, std::align_val_t(64))); }
  void deallocate(A* values, size_t) { ::operator delete(values, std::align_val_t(64)); }
  template <class B> bool operator==(const AtLines<B>&) const { return true; }
  template <class B> bool operator!=(const AtLines<B>&) const { return false; }
};
template <class A> using Values = std::vector<A, AtLines<A>>;

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
  int64_t stride = 0;  // from run to run; 0: there is one
  int runs() const { return stride == 0 ? 1 : runs_at_once; }
};

template <int RUNS> using RunCount = std::integral_constant<int, RUNS>;

// The runs of a tile, for reading.
template <class A> struct Runs {
  const A* values;
  int64_t stride;
  NORMPASS_ALWAYS_INLINE A operator()(int run, int64_t i) const { return values[run * stride + i]; }
  // Asks the second-level cache for what will be read in the place of the line at i: of the next runs where a tile has
  // several, else of the next tile.
  template <int RUNS> NORMPASS_ALWAYS_INLINE void prefetch(int64_t i) const {
    if constexpr (RUNS == 1) {
      __builtin_prefetch(values + i + tile_size, 0, 2);
    } else {
#pragma GCC unroll 4
      for (int run = 0; run < RUNS; ++run) __builtin_prefetch(values + (RUNS + run) * stride + i, 0, 2);
    }
  }
};

// The runs of a tile, for writing: in their place or in a buffer, from where `finish_tile` takes them.
template <class A> struct Target {
  A* values;
  int64_t stride;
  bool streamed = false;
};

// Asks it for the n values that follow these n.
template <class S> NORMPASS_ALWAYS_INLINE void prefetch_next(const S* values, int64_t n) {
  const char* next = reinterpret_cast<const char*>(values + n);
  for (int64_t i = 0; i < n * static_cast<int64_t>(sizeof(S)); i += 64) __builtin_prefetch(next + i, 0, 2);
}

// In place where the storage type is the wide one, else widened into `buffer`: one run. `stride`: from run to run.
template <class S> Runs<Wide<S>> read_tile(const S* from, int64_t stride, Wide<S>* buffer, const Tile& tile) {
  if constexpr (std::is_same<S, Wide<S>>::value) {
    return {from + tile.offset, stride};
  } else {
    prefetch_next(from + tile.offset, tile.n);
    widen(from + tile.offset, buffer, tile.n);
    return {buffer, 0};
  }
}

// Past the caches, so that what is overwritten is not read into them first. From a buffer, a tile at a time: streamed
// line by line from the stack, each line waits for itself, and with a copy of the loop that streams its results the
// compiler vectorised only one of the two.
template <class A> void stream_run(A* to, const A* from, int64_t n) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; reinterpret_cast<uintptr_t>(to) % 64 == 0 && i + line<A> <= n; i += line<A>) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
#else
    for (int64_t half = 0; half < line<A>; half += line<A> / 2)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i + half),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i + half)));
#endif
  }
#endif
  std::memcpy(to + i, from + i, (n - i) * sizeof(A));
}

inline void end_of_stream() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Where the last loop over a tile writes (`buffer` has room for its runs), and what takes the values from there if that
// is not their place yet.
template <class S>
Target<Wide<S>> target_of(S* to, int64_t stride, Wide<S>* buffer, const Tile& tile, bool streamed) {
  if constexpr (std::is_same<S, Wide<S>>::value)
    if (!streamed) return {to + tile.offset, stride};
  return {buffer, tile_size, streamed};
}

template <class S>
void finish_tile(S* to, const Target<Wide<S>>& target, const Tile& tile) {
  if (std::is_same<S, Wide<S>>::value && !target.streamed) return;
  for (int run = 0; run < tile.runs(); ++run) {
    S* there = to + tile.offset + run * tile.stride;
    const Wide<S>* values = target.values + run * target.stride;
    if constexpr (std::is_same<S, Wide<S>>::value) stream_run(there, values, tile.n);
    else narrow(values, there, tile.n);
  }
}

// --- loops over a tile ---------------------------------------------------------------------------------------

// Where the values of one line of every run go.
template <class A> struct Line {
  A* values;
  int64_t stride;
  NORMPASS_ALWAYS_INLINE A& operator()(int run, int64_t i) const { return values[run * stride + i]; }
};

// Calls f(begin, count) for the lines of a run, where count is a constant, so that a loop up to it becomes a few
// instructions with prefetches among them; and for what is left, where it is a number.
template <class Count> constexpr bool is_rest = std::is_same<Count, int64_t>::value;

template <class A, class F> NORMPASS_ALWAYS_INLINE void each_line(int64_t n, F f) {
  int64_t i = 0;
  for (; i + line<A> <= n; i += line<A>) f(i, std::integral_constant<int64_t, line<A>>());
  if (i < n) f(i, n - i);
}

// Calls f(begin, count, to) in the same way, where f writes to(run, i) for i < count.
template <int RUNS, class A, class F> NORMPASS_ALWAYS_INLINE void write_lines(int64_t n, const Target<A>& target, F f) {
  each_line<A>(n, [&](int64_t begin, auto count) { f(begin, count, Line<A>{target.values + begin, target.stride}); });
}

// By halves, in registers: one addition after another, or through memory, each would wait for the one before.
template <class A, int BYTES> NORMPASS_ALWAYS_INLINE A sum_of_vector(const A* values) {
  if constexpr (BYTES == sizeof(A)) {
    return *values;
  } else {
    typedef A Part __attribute__((vector_size(BYTES / 2)));
    Part low, high;
    std::memcpy(&low, values, BYTES / 2);
    std::memcpy(&high, values + BYTES / 2 / sizeof(A), BYTES / 2);
    low += high;
    return sum_of_vector<A, BYTES / 2>(reinterpret_cast<const A*>(&low));
  }
}
template <class A> NORMPASS_ALWAYS_INLINE A sum_of_line(const A* values) { return sum_of_vector<A, 64>(values); }

}  // namespace normpass
