// The sum over a channel: of a thread's values, of a block's threads, of the blocks of a channel, in a fixed order.
//
// An accumulator is a struct of numbers with `merge`. Blocks leave theirs in `partials`; the last one of a tile to
// arrive merges them, so that one launch does it all. `arrivals` has a counter for each tile, 0 between launches.
#pragma once

#include "walk.cuh"

namespace normpass {

// What the backward of a norm sums: dy, and dy times the deviation of x.
template <class T> struct Sums {
  T dy = 0, dy_deviation = 0;
  NORMPASS_DEVICE void merge(const Sums& other) {
    dy += other.dy;
    dy_deviation += other.dy_deviation;
  }
};

// Shared memory for the accumulators of half the threads: the other half keeps its own in registers.
template <class Accumulator, int COUNT> struct alignas(16) Exchange {
  unsigned char bytes[COUNT * sizeof(Accumulator)];
  NORMPASS_DEVICE Accumulator& operator[](int i) { return reinterpret_cast<Accumulator*>(bytes)[i]; }
};

// Merge the accumulators of `height` rows of `width` threads into those of row 0.
template <int CHANNELS, class Accumulator, class Buffer>
NORMPASS_DEVICE void merge_rows(Accumulator (&own)[CHANNELS], Buffer& buffer, int width, int height, int thread) {
  constexpr int HALF = THREADS / 2;
  int row = thread / width;
  int half = 1;
  while (half < height) half *= 2;
  for (half /= 2; half > 0; half /= 2) {
    int above = thread - half * width;
    if (row >= half && row < 2 * half && row < height) {
      for (int c = 0; c < CHANNELS; ++c) buffer[c * HALF + above] = own[c];
    }
    __syncthreads();
    if (row < half && row + half < height) {
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) own[c].merge(buffer[c * HALF + thread]);
    }
    __syncthreads();
  }
}

// Whether this block is the last of the `count` blocks of its tile to arrive; the counter is 0 again after it.
//
// The fences of one thread stand for the block: what the others wrote before the barrier happened before its fence, and
// what they read after the second barrier comes after (fences are cumulative; a grid-wide barrier is made like this).
NORMPASS_DEVICE bool arrives_last(unsigned* arrivals, unsigned count) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(arrivals, count - 1) == count - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// partials[(slab·fields + field)·channels + channel]: neighbouring threads read neighbouring channels.
template <class Accumulator, class T>
NORMPASS_DEVICE void leave(T* partials, long long channels, long long channel, const Accumulator& own) {
  constexpr int FIELDS = sizeof(Accumulator) / sizeof(T);
  const T* fields = reinterpret_cast<const T*>(&own);
#pragma unroll
  for (int f = 0; f < FIELDS; ++f) {
    partials[(static_cast<long long>(blockIdx.y) * FIELDS + f) * channels + channel] = fields[f];
  }
}

template <class Accumulator, class T>
NORMPASS_DEVICE Accumulator taken(const T* partials, long long channels, long long channel, int slab) {
  constexpr int FIELDS = sizeof(Accumulator) / sizeof(T);
  Accumulator result;
  T* fields = reinterpret_cast<T*>(&result);
#pragma unroll
  for (int f = 0; f < FIELDS; ++f) {
    fields[f] = __ldcg(partials + (static_cast<long long>(slab) * FIELDS + f) * channels + channel);
  }
  return result;
}

// Hand the whole channel's accumulator to `finish(channel, accumulator)`, once for each channel.
template <class T, int VECTOR, bool ROWS, class Accumulator, int CHANNELS, class Finish>
NORMPASS_DEVICE void reduce(const Walk<VECTOR, ROWS>& walk, const Grid& grid, Accumulator (&own)[CHANNELS],
                            T* partials, unsigned* arrivals, Finish finish) {
  __shared__ Exchange<Accumulator, CHANNELS * THREADS / 2> buffer;
  int thread = threadIdx.x;
  merge_rows(own, buffer, walk.width, walk.height, thread);
  if (walk.row == 0) {
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) buffer[thread * CHANNELS + c] = own[c];
  }
  __syncthreads();

  int tile = walk.width * CHANNELS;  // from here on a thread has one channel
  long long channel = blockIdx.x * static_cast<long long>(tile) + thread % tile;
  int row = thread / tile, height = THREADS / tile, slabs = gridDim.y;
  bool there = row < height && channel < grid.channels;
  Accumulator total[1];
  if (there && row == 0) total[0] = buffer[thread];
  if (slabs > 1) {
    if (there && row == 0) leave(partials, grid.channels, channel, total[0]);
    if (!arrives_last(arrivals + blockIdx.x, slabs)) return;
    total[0] = Accumulator();
#pragma unroll 8
    for (int slab = row; slab < (there ? slabs : 0); slab += height) {
      total[0].merge(taken<Accumulator>(partials, grid.channels, channel, slab));
    }
    merge_rows(total, buffer, tile, height, thread);
  }
  if (there && row == 0) finish(channel, total[0]);
}

}  // namespace normpass
