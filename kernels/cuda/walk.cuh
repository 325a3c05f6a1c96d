// Which values each thread visits: the two layouts as one walk.
//
//   rows     (rows, channels): channels_last and two-dimensional. A block has `width` vectors of channels side by
//            side and THREADS / width rows below each other; blockIdx.x is the tile of channels.
//   planes   (outer, channels, inner): contiguous. A block is a line of THREADS vectors of one channel, which is
//            blockIdx.x, its planes seen as one after another.
//
// blockIdx.y is the slab: slabs take turns, so that the grid reads neighbouring memory at one time. A backward walk
// visits the same values from the end, where the pass before it has left the cache filled.
//
// With a GROUP a thread visits so many positions behind one another before its next ones: as many values as a byte of a
// mask has bits (mask.cuh).
#pragma once

#include "storage.cuh"

namespace normpass {

constexpr int WIDEST_TILE = 32;  // vectors of channels side by side in a block; as in geometry.py
constexpr int THREADS = 512;  // of a block; one block a multiprocessor, so that a thread may have 128 registers

// From the host, all of one shape (see geometry.py). A position is a row, or a vector of a plane.
struct Grid {
  long long channels;
  long long width;        // vectors of channels in a full tile; 1 for planes
  long long positions;    // for each channel
  long long inner;        // vectors of a plane; 1 for rows
  long long inner_step;   // positions between two visits (or groups of visits) of a thread, modulo inner
  long long stride;       // values between two visits, without a change of plane
  long long last_offset;  // of the last position of a channel from its first
};

#define NORMPASS_GRID_PARAMETERS                                                                     \
  long long channels, long long width, long long positions, long long inner, long long inner_step, \
      long long stride, long long last_offset
#define NORMPASS_GRID \
  normpass::Grid { channels, width, positions, inner, inner_step, stride, last_offset }

template <int VECTOR, bool ROWS, int GROUP = 1> struct Walk {
  static constexpr int CHANNELS = ROWS ? VECTOR : 1;  // of one thread

  int width, height, row;         // of the block; the thread's own row in it
  long long channel;              // the thread's first
  bool active;                    // whether the thread has any channel
  long long position, step, end;  // now, between two visits (or groups of them), beyond the last
  long long plane;                // planes only: which of the channel's

  NORMPASS_DEVICE Walk(const Grid& grid, bool backward) {
    int thread = threadIdx.x;
    width = ROWS ? static_cast<int>(grid.width) : 1;
    height = THREADS / width;
    row = thread / width;
    long long first = ROWS ? (blockIdx.x * grid.width + thread % width) * VECTOR : blockIdx.x;
    active = row < height && first < grid.channels;
    channel = active ? first : 0;
    step = static_cast<long long>(gridDim.y) * height * GROUP;
    end = active ? grid.positions : 0;
    position = (static_cast<long long>(blockIdx.y) * height + row) * GROUP;
    stride_ = grid.stride;
    sign_ = backward ? -1 : 1;
    base_ = (ROWS ? channel : channel * grid.inner * VECTOR) + (backward ? grid.last_offset : 0);
    if (ROWS) {
      relative_ = position * grid.channels;
      next_row_ = grid.channels;
    } else {
      plane = position / grid.inner;
      plane_step_ = step / grid.inner;
      inner_ = grid.inner;
      inner_step_ = grid.inner_step;
      index_ = position - plane * inner_;
      next_plane_ = (grid.channels - 1) * inner_ * VECTOR;
      relative_ = (plane * grid.channels * inner_ + index_) * VECTOR;
    }
  }

  // Of the position, or the one that is `ahead` of it in its group.
  NORMPASS_DEVICE bool inside(int ahead = 0) const { return position + ahead < end; }
  NORMPASS_DEVICE long long offset(int ahead = 0) const { return base_ + sign_ * (relative_ + distance(ahead)); }

  NORMPASS_DEVICE void advance() {
    position += step;
    relative_ += stride_;
    if (ROWS) return;
    index_ += inner_step_;
    bool wraps = index_ >= inner_;
    index_ -= wraps ? inner_ : 0;
    relative_ += wraps ? next_plane_ : 0;
    plane += plane_step_ + (wraps ? 1 : 0);
  }

 private:
  NORMPASS_DEVICE long long distance(int ahead) const {
    if (ahead == 0) return 0;
    if (ROWS) return ahead * next_row_;
    long long wraps = 0;
    for (long long index = index_ + ahead; index >= inner_; index -= inner_) ++wraps;
    return ahead * static_cast<long long>(VECTOR) + wraps * next_plane_;
  }

  int sign_;
  long long stride_, base_, relative_;
  long long next_row_;  // rows only
  long long inner_, inner_step_, index_, next_plane_, plane_step_;  // planes only
};

// Load the next LOADS vectors of this thread, as many as there are, before any of them is used: `load(k, offset)`
// is called for each. Returns how many there are.
template <int LOADS, int VECTOR, bool ROWS, int GROUP, class Load>
NORMPASS_DEVICE int next_vectors(Walk<VECTOR, ROWS, GROUP>& walk, long long (&offsets)[LOADS], Load load) {
  static_assert(LOADS % GROUP == 0, "a group is loaded at one time");
  int count = 0;
#pragma unroll
  for (int k = 0; k < LOADS; ++k) {
    int ahead = k % GROUP;
    offsets[k] = walk.offset(ahead);
    if (walk.inside(ahead)) {
      load(k, offsets[k]);
      ++count;
    }
    if (ahead == GROUP - 1) walk.advance();
  }
  return count;
}

// Vectors of each tensor in flight for a thread: up to 128 bytes of what is read, less where registers are short.
// Where a layout allows only narrow accesses, more of them.
template <class Vectors> NORMPASS_DEVICE constexpr int loads_in_flight(int read, bool writes) {
  return (read == 1 ? (writes ? 6 : 8) : (read == 2 ? (writes ? 3 : 4) : 2)) * (Vectors::WORDS < 2 ? 2 : 1);
}

// As many, in whole groups.
NORMPASS_DEVICE constexpr int in_groups(int loads, int group) { return (loads + group - 1) / group * group; }

// The channel of value i of a vector among the thread's own.
template <bool ROWS> NORMPASS_DEVICE int channel_of(int i) { return ROWS ? i : 0; }

// What every thread needs of its channels, `make(channel)`, a struct of numbers of type T: computed once in the block.
template <class T, class Item, int VECTOR, bool ROWS, int GROUP, int CHANNELS, class Make>
NORMPASS_DEVICE void share_channels(const Walk<VECTOR, ROWS, GROUP>& walk, const Grid& grid, Item (&own)[CHANNELS],
                                    Make make) {
  constexpr int FIELDS = sizeof(Item) / sizeof(T);
  constexpr int WIDE = CHANNELS * sizeof(T) < 16 ? CHANNELS : 16 / sizeof(T);
  alignas(16) __shared__ T shared[FIELDS][CHANNELS * WIDEST_TILE];
  int tile = walk.width * CHANNELS, thread = threadIdx.x;
  long long channel = blockIdx.x * static_cast<long long>(tile) + thread;
  if (thread < tile && channel < grid.channels) {
    Item item = make(channel);
    const T* fields = reinterpret_cast<const T*>(&item);
#pragma unroll
    for (int f = 0; f < FIELDS; ++f) shared[f][thread] = fields[f];
  }
  __syncthreads();
  int first = thread % walk.width * CHANNELS;
#pragma unroll
  for (int f = 0; f < FIELDS; ++f) {
#pragma unroll
    for (int c = 0; c < CHANNELS; c += WIDE) {
      Vector<T, WIDE> wide = load<WIDE>(&shared[f][first + c]);
#pragma unroll
      for (int i = 0; i < WIDE; ++i) reinterpret_cast<T*>(&own[c + i])[f] = wide[i];
    }
  }
}

}  // namespace normpass
