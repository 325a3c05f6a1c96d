// Runs CUDA kernels on the CPU: include this, then the .cu file, then NORMPASS_EXPORT(kernel) for each kernel.
//
// Each thread of a block is a fiber, and blocks run one after another, so a race goes unseen unless the order of
// threads decides the result: run it with `reversed` too. Supported is what these kernels use: grid and block,
// __shared__, __syncthreads, __threadfence, shuffles of whole warps, atomicInc, __ldcg and a few intrinsics. A barrier
// that only some threads of a block reach is an error, and so is a shuffle that only some lanes of a warp reach.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct Dimensions {
  unsigned x = 1, y = 1, z = 1;
};

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

namespace emulated {

enum State : char { READY, AT_BARRIER, AT_SHUFFLE, FINISHED };
constexpr unsigned WARP = 32;

struct Block {
  std::vector<ucontext_t> fibers;
  std::vector<char> stacks;
  std::vector<State> states;
  std::vector<uint64_t> shuffled[2];  // in turns: a lane may be one shuffle ahead of another
  std::vector<char> turns;
  ucontext_t scheduler;
  unsigned current = 0;
  void (*body)(void*) = nullptr;
  void* arguments = nullptr;
};

inline Block block;
constexpr size_t STACK = 32 * 1024;

inline void run_thread() {
  block.body(block.arguments);
  block.states[block.current] = FINISHED;
}

}  // namespace emulated

inline Dimensions threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

inline void wait_as(State state) {
  block.states[block.current] = state;
  swapcontext(&block.fibers[block.current], &block.scheduler);
  threadIdx.x = block.current;
}

// The value of another thread of the warp, which gives its own.
template <class T> T shuffle(T value, unsigned from) {
  unsigned thread = block.current;
  char turn = block.turns[thread] ^= 1;
  std::memcpy(&block.shuffled[turn][thread], &value, sizeof(T));
  wait_as(AT_SHUFFLE);
  std::memcpy(&value, &block.shuffled[turn][from], sizeof(T));
  return value;
}

}  // namespace emulated

inline void __syncthreads() { emulated::wait_as(emulated::AT_BARRIER); }
inline void __threadfence() {}

template <class T> T __shfl_sync(unsigned, T value, unsigned lane) {
  return emulated::shuffle(value, threadIdx.x / emulated::WARP * emulated::WARP + lane);
}
template <class T> T __shfl_down_sync(unsigned, T value, unsigned distance) {
  unsigned lane = threadIdx.x % emulated::WARP + distance;
  return emulated::shuffle(value, lane < emulated::WARP ? threadIdx.x + distance : threadIdx.x);
}

inline unsigned atomicInc(unsigned* address, unsigned limit) {
  unsigned old = *address;
  *address = old >= limit ? 0 : old + 1;
  return old;
}

template <class T> T __ldcg(const T* address) { return *address; }
template <class T> void __stcg(T* address, T value) { *address = value; }

inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline double __hiloint2double(int high, int low) {
  uint64_t bits = static_cast<uint64_t>(static_cast<unsigned>(high)) << 32 | static_cast<unsigned>(low);
  double value;
  std::memcpy(&value, &bits, 8);
  return value;
}
inline int __double2loint(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  return static_cast<int>(bits);
}
inline int __double2hiint(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, 8);
  return static_cast<int>(bits >> 32);
}

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline float rsqrtf(float v) { return 1 / std::sqrt(v); }
inline double rsqrt(double v) { return 1 / std::sqrt(v); }
#define __expf(y) expf(y)  // glibc has a function of this name

inline float float_of_half_bits(unsigned short half) {
  int exponent = half >> 10 & 31, fraction = half & 1023;
  float magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                    : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                   : std::ldexp(static_cast<float>(fraction), -24);
  return half & 0x8000 ? -magnitude : magnitude;
}

// To nearest, ties to even, as nearbyint rounds.
inline unsigned short half_bits_of(float value) {
  unsigned short sign = std::signbit(value) ? 0x8000 : 0;
  float magnitude = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  int exponent = magnitude < 6.103515625e-05f ? -14 : std::ilogb(magnitude);
  int bits = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));  // 1024 for 1.0
  return sign | static_cast<unsigned short>(bits + (exponent + 14) * 1024);
}

namespace emulated {

// Whether all threads of a warp, or of the block, are where `state` says.
inline bool all_are(State state, unsigned first, unsigned threads) {
  for (unsigned t = first; t < first + threads; ++t) {
    if (block.states[t] != state) return false;
  }
  return true;
}

// Every lane runs up to where it next waits for others. False: some are elsewhere than others.
inline bool run_warp(unsigned first, unsigned lanes, bool reversed) {
  for (unsigned i = 0; i < lanes; ++i) {
    block.current = threadIdx.x = first + (reversed ? lanes - 1 - i : i);
    swapcontext(&block.scheduler, &block.fibers[block.current]);
  }
  return all_are(block.states[first], first, lanes);
}

// A warp runs until it waits for the block or ends; then the others do. False: some ended where others wait.
inline bool run_block(unsigned threads, bool reversed) {
  block.fibers.resize(threads);
  block.stacks.resize(threads * STACK);
  block.states.assign(threads, READY);
  block.turns.assign(threads, 0);
  for (auto& values : block.shuffled) values.resize(threads);
  for (unsigned t = 0; t < threads; ++t) {
    getcontext(&block.fibers[t]);
    block.fibers[t].uc_stack.ss_sp = &block.stacks[t * STACK];
    block.fibers[t].uc_stack.ss_size = STACK;
    block.fibers[t].uc_link = &block.scheduler;
    makecontext(&block.fibers[t], run_thread, 0);
  }
  unsigned warps = (threads + WARP - 1) / WARP;
  do {
    for (unsigned i = 0; i < warps; ++i) {
      unsigned first = (reversed ? warps - 1 - i : i) * WARP, lanes = threads - first < WARP ? threads - first : WARP;
      do {
        if (!run_warp(first, lanes, reversed)) return false;
      } while (block.states[first] == AT_SHUFFLE);
    }
  } while (all_are(AT_BARRIER, 0, threads));
  return all_are(FINISHED, 0, threads);
}

template <class T> T from_slot(uint64_t slot) {
  T value;
  static_assert(sizeof(T) == 8, "every argument has 64 bits");
  std::memcpy(&value, &slot, 8);
  return value;
}

// As in cuda_variant.py: q a pointer or a 64-bit integer, d a double.
template <class T> constexpr char letter() {
  static_assert(std::is_pointer_v<T> || std::is_same_v<T, long long> || std::is_same_v<T, double>, "another type");
  return std::is_same_v<T, double> ? 'd' : 'q';
}
template <class... Parameters> const char* signature_of(void (*)(Parameters...)) {
  static const char letters[] = {letter<Parameters>()..., '\0'};
  return letters;
}

template <class... Parameters> struct Call {
  void (*kernel)(Parameters...);
  const uint64_t* slots;

  template <size_t... I> void with(std::index_sequence<I...>) { kernel(from_slot<Parameters>(slots[I])...); }
  static void run(void* self) { static_cast<Call*>(self)->with(std::index_sequence_for<Parameters...>()); }
};

// 0 if all went well, 1 for a wrong number of arguments, 2 for a barrier that some threads never reached.
template <class... Parameters>
int launch(void (*kernel)(Parameters...), unsigned tiles, unsigned slabs, unsigned threads, const uint64_t* slots,
           int count, int reversed) {
  if (count != sizeof...(Parameters)) return 1;
  Call<Parameters...> call{kernel, slots};
  block.body = Call<Parameters...>::run;
  block.arguments = &call;
  gridDim = {tiles, slabs, 1};
  blockDim = {threads, 1, 1};
  for (unsigned i = 0; i < tiles * slabs; ++i) {
    unsigned b = reversed ? tiles * slabs - 1 - i : i;
    blockIdx = {b % tiles, b / tiles, 0};
    if (!run_block(threads, reversed)) return 2;
  }
  return 0;
}

}  // namespace emulated

#define NORMPASS_EXPORT(KERNEL)                                                                                  \
  extern "C" const char* signature_##KERNEL() { return emulated::signature_of(KERNEL); }                         \
  extern "C" int emulated_##KERNEL(unsigned tiles, unsigned slabs, unsigned threads, const uint64_t* slots,      \
                                   int count, int reversed) {                                                    \
    return emulated::launch(KERNEL, tiles, slabs, threads, slots, count, reversed);                              \
  }
