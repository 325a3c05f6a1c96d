// Norms of what lies together: a run is the values of one mean and one variance, a group of a sample that is contiguous
// or a row. A team of NORMPASS_TEAM threads, a warp or a whole block, has one of them.
//
//   rows     one value a channel: every value of a run has a weight and a bias of its own
//   planes   several: those of one channel lie together, and a vector never reaches from one into the next
//
// A thread takes a batch of vectors at a time, TEAM apart. The batch that it read last is still in registers when it
// turns around, and the one before it most likely in a cache: what a run needs twice is read from memory once.
//
// Macros: NORMPASS_STORAGE, NORMPASS_VECTOR, NORMPASS_ROWS as in moments.cu, and NORMPASS_TEAM.
#pragma once

#include "norm_site.cuh"

namespace normpass {

constexpr int TEAM = NORMPASS_TEAM, WARP = 32;
constexpr int BLOCK = TEAM < 128 ? 128 : TEAM;  // threads; as in runs.py
constexpr int BLOCKS = 512 / BLOCK;  // a multiprocessor at least, so that a thread may have 128 registers

// From the host (see runs.py).
struct Runs {
  long long runs, groups;  // the groups of a sample: run r is group r modulo groups
  long long channels;      // of a group
  long long vectors;       // of a run
  long long plane;         // vectors of a channel; 1 for rows
  long long parts;         // blocks that share a run
};

#define NORMPASS_RUNS_PARAMETERS \
  long long runs, long long groups, long long group_channels, long long vectors, long long plane, long long parts
#define NORMPASS_RUNS \
  normpass::Runs { runs, groups, group_channels, vectors, plane, parts }

// Vectors that a thread holds of one tensor; as in runs.py.
template <class Storage, int VECTOR> NORMPASS_DEVICE constexpr int held() {
  return sizeof(Storage) * VECTOR <= 4 ? 8 : 4;
}

NORMPASS_DEVICE long long quotient(long long a, long long b) {
  if (((a | b) >> 32) == 0) return static_cast<unsigned>(a) / static_cast<unsigned>(b);  // a fifth of the instructions
  return a / b;
}

// One thread of a team, and the batches of its run that its block takes: those of `part`, `parts` apart.
template <int HELD> struct Member {
  int index;  // in the team
  long long run, batches, vectors;

  NORMPASS_DEVICE explicit Member(const Runs& all)
      : index(threadIdx.x % TEAM), run(blockIdx.x * static_cast<long long>(BLOCK / TEAM) + threadIdx.x / TEAM),
        batches((all.vectors + TEAM * HELD - 1) / (TEAM * HELD)), vectors(all.vectors) {}

  NORMPASS_DEVICE long long vector(long long batch, int k) const { return batch * (TEAM * HELD) + k * TEAM + index; }

  // How many vectors of a batch are there.
  NORMPASS_DEVICE int count(long long batch) const {
    int there = 0;
#pragma unroll
    for (int k = 0; k < HELD; ++k) there += vector(batch, k) < vectors ? 1 : 0;
    return there;
  }

  // Calls f(k, vector) for each of them; returns how many.
  template <class F> NORMPASS_DEVICE int each(long long batch, F f) const {
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      if (vector(batch, k) < vectors) f(k, vector(batch, k));
    }
    return count(batch);
  }
};

// The accumulator of lanes 0 to 31 in lane 0, in a fixed order.
template <class T, class Accumulator> NORMPASS_DEVICE void merge_warp(Accumulator& own) {
  constexpr int FIELDS = sizeof(Accumulator) / sizeof(T);
#pragma unroll
  for (int distance = WARP / 2; distance > 0; distance /= 2) {
    Accumulator other;
    const T* mine = reinterpret_cast<const T*>(&own);
#pragma unroll
    for (int f = 0; f < FIELDS; ++f) {
      reinterpret_cast<T*>(&other)[f] = __shfl_down_sync(0xffffffffu, mine[f], distance);
    }
    own.merge(other);
  }
}

// The whole team's accumulator, for each of its threads.
template <class T, class Accumulator> NORMPASS_DEVICE Accumulator merged_by_team(Accumulator own) {
  constexpr int FIELDS = sizeof(Accumulator) / sizeof(T), WARPS = TEAM / WARP;
  merge_warp<T>(own);
  T* fields = reinterpret_cast<T*>(&own);
  if constexpr (WARPS == 1) {
#pragma unroll
    for (int f = 0; f < FIELDS; ++f) fields[f] = __shfl_sync(0xffffffffu, fields[f], 0);
  } else {
    __shared__ T shared[FIELDS][WARPS];
    int warp = threadIdx.x / WARP;
    if (threadIdx.x % WARP == 0) {
#pragma unroll
      for (int f = 0; f < FIELDS; ++f) shared[f][warp] = fields[f];
    }
    __syncthreads();
    Accumulator total;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      Accumulator part;
#pragma unroll
      for (int f = 0; f < FIELDS; ++f) reinterpret_cast<T*>(&part)[f] = shared[f][w];
      total.merge(part);
    }
    return total;
  }
  return own;
}

// COUNT numbers of channels that lie side by side, or `otherwise` where there are none.
template <int COUNT, class T>
NORMPASS_DEVICE void read_channels(const T* values, long long channel, T otherwise, T (&to)[COUNT]) {
  constexpr int WIDE = COUNT * sizeof(T) < 16 ? COUNT : 16 / sizeof(T);
#pragma unroll
  for (int c = 0; c < COUNT; c += WIDE) {
    if (values == nullptr) {
#pragma unroll
      for (int i = 0; i < WIDE; ++i) to[c + i] = otherwise;
    } else {
      Vector<T, WIDE> wide = load<WIDE>(values + channel + c);
#pragma unroll
      for (int i = 0; i < WIDE; ++i) to[c + i] = wide[i];
    }
  }
}

// What belongs to one run: its moments are known.
template <class T, int VECTOR, bool ROWS> struct RunSite {
  static constexpr int CHANNELS = ROWS ? VECTOR : 1;  // of a vector
  const T *weight, *bias;
  T mean, rstd;
  long long first_channel, plane;

  NORMPASS_DEVICE RunSite(const Parameters<T>& parameters, const Runs& all, long long run, T mean, T variance)
      : weight(parameters.weight), bias(parameters.bias), mean(mean),
        rstd(reciprocal_root(variance + T(parameters.eps))), first_channel(run % all.groups * all.channels),
        plane(all.plane) {}

  NORMPASS_DEVICE long long channel(long long vector) const {
    return first_channel + (ROWS ? vector * VECTOR : quotient(vector, plane));
  }

  NORMPASS_DEVICE void sites(long long vector, NormSite<T> (&to)[CHANNELS]) const {
    T weights[CHANNELS], biases[CHANNELS];
    read_channels(weight, channel(vector), T(1), weights);
    read_channels(bias, channel(vector), T(0), biases);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) to[c].mean = mean, to[c].scale = weights[c] * rstd, to[c].bias = biases[c];
  }
};

// The site of value i of a vector among those of its channels.
template <bool ROWS> NORMPASS_DEVICE constexpr int site_of(int i) { return ROWS ? i : 0; }

}  // namespace normpass
