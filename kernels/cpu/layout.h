// The two ways in which the values of a dense (N, C, *) tensor lie in memory, cut into tiles.
//
//   Rows    inner == 1: every C values are one row (channels_last, two-dimensional). A tile holds whole rows, or a
//           part of one. Per-channel values are spread over a pattern of rows as wide as a tile, so that one loop
//           over consecutive values does for any C.
//   Planes  inner > 1: `inner` values of one channel after another. A tile is a part of one plane.
//
// `tiles(thread, threads, f)` calls f(offset, n, position) for the tiles of one thread's share: `offset` of the first
// of `n` values, and where the tile's per-channel values stand in an array of `width()`. In ascending order: walking
// back to what a pass before left in the cache was twice as slow, for the processor prefetches upwards.
#pragma once

#include <omp.h>

#include "tile.h"

namespace normpass {

struct Layout {
  int64_t outer, channels, inner;
  int64_t size() const { return outer * channels * inner; }
  int64_t count() const { return outer * inner; }
};

template <class T> struct OnePerValue {
  const T* values;
  NORMPASS_ALWAYS_INLINE T operator[](int64_t i) const { return values[i]; }
};

template <class T> struct OneForAll {
  T value;
  NORMPASS_ALWAYS_INLINE T operator[](int64_t) const { return value; }
};

template <class F> void each_of_share(int64_t units, int thread, int threads, F f) {
  int64_t begin = units * thread / threads, end = units * (thread + 1) / threads;
  for (int64_t i = begin; i < end; ++i) f(i);
}

class Rows {
 public:
  explicit Rows(const Layout& layout) : layout_(layout), pattern_(layout.channels) {
    if (pattern_ < tile_size) pattern_ *= tile_size / pattern_;
  }
  const Layout& layout() const { return layout_; }
  int64_t width() const { return pattern_; }

  template <class T> OnePerValue<T> at(const std::vector<T>& values, int64_t position) const {
    return {values.data() + position};
  }
  template <class F> void tiles(int thread, int threads, F f) const {
    int64_t size = layout_.size();
    each_of_share((size + pattern_ - 1) / pattern_, thread, threads, [&](int64_t index) {
      int64_t start = index * pattern_, length = std::min(pattern_, size - start);
      for (int64_t i = 0; i < length; i += tile_size) f(start + i, std::min(tile_size, length - i), i);
    });
  }

 private:
  Layout layout_;
  int64_t pattern_;
};

class Planes {
 public:
  explicit Planes(const Layout& layout) : layout_(layout), parts_((layout.inner + part_ - 1) / part_) {}
  const Layout& layout() const { return layout_; }
  int64_t width() const { return layout_.channels; }

  template <class T> OneForAll<T> at(const std::vector<T>& values, int64_t position) const {
    return {values[position]};
  }
  template <class F> void tiles(int thread, int threads, F f) const {
    int64_t units = layout_.outer * layout_.channels * parts_;
    each_of_share(units, thread, threads, [&](int64_t unit) {
      int64_t plane = unit / parts_, first = unit % parts_ * part_;
      int64_t length = std::min(part_, layout_.inner - first);
      int64_t start = plane * layout_.inner + first, channel = plane % layout_.channels;
      for (int64_t i = 0; i < length; i += tile_size) f(start + i, std::min(tile_size, length - i), channel);
    });
  }

 private:
  static constexpr int64_t part_ = 32 * tile_size;  // a large plane is shared among threads
  Layout layout_;
  int64_t parts_;
};

template <class S> bool is_streamed(const Layout& layout) {
  return layout.size() * static_cast<int64_t>(sizeof(S)) >= streamed_from;
}

template <class F> void with_layout(const Layout& layout, F f) {
  layout.inner == 1 ? f(Rows(layout)) : f(Planes(layout));
}

// Calls f with a null pointer to the storage type that `dtype` (a code of cpu_library.py) stands for.
template <class F> int with_dtype(int dtype, F f) {
  switch (dtype) {
    case 0: f(static_cast<float*>(nullptr)); return 0;
    case 1: f(static_cast<double*>(nullptr)); return 0;
    case 2: f(static_cast<BFloat16*>(nullptr)); return 0;
    case 3: f(static_cast<Half*>(nullptr)); return 0;
  }
  return 1;
}

}  // namespace normpass
