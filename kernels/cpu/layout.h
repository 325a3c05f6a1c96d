// The two ways in which the values of a dense (N, C, *) tensor lie in memory, cut into tiles.
//
//   Rows    inner == 1: every C values are one row (channels_last, two-dimensional). Per-channel values are spread
//           over a pattern of rows as wide as a tile, so that one loop over consecutive values does for any C. A tile
//           is a part of one pattern, or the same part of several.
//   Planes  inner > 1: `inner` values of one channel after another. A tile is a part of one plane.
//
// `tiles<S>(thread, threads, f)` calls f(tile) for the tiles of one thread's share; S is the storage type.
// `groups` calls f(tile, runs) for tiles of several runs where there are some (float rows), for sums that are loaded
// and stored once for all of them; what is written comes faster run by run.
// `width()`: of the arrays of per-channel values that a tile's position refers to, and from run to run. In ascending
// order: to walk back to what a pass before left in the cache was no faster, neither tile by tile nor 64 KiB by 64 KiB.
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

class Rows {
 public:
  explicit Rows(const Layout& layout) : layout_(layout), pattern_(layout.channels) {
    if (pattern_ < tile_size) pattern_ *= tile_size / pattern_;
  }
  const Layout& layout() const { return layout_; }
  int64_t width() const { return pattern_; }

  template <class T> OnePerValue<T> at(const Values<T>& values, int64_t position) const {
    return {values.data() + position};
  }
  template <class S, class F> void tiles(int thread, int threads, F f) const {
    auto [index, end] = share(thread, threads);
    for (; index < end; ++index) tiles_of(index, f);
  }
  template <class S, class F> void groups(int thread, int threads, F f) const {
    auto [index, end] = share(thread, threads);
    if constexpr (std::is_same<S, float>::value)
      for (; index + runs_at_once <= std::min(end, layout_.size() / pattern_); index += runs_at_once)
        for (int64_t i = 0; i < pattern_; i += tile_size)
          f(Tile{index * pattern_ + i, std::min(tile_size, pattern_ - i), i, pattern_}, RunCount<runs_at_once>());
    for (; index < end; ++index) tiles_of(index, [&](const Tile& tile) { f(tile, RunCount<1>()); });
  }

 private:
  struct Share {
    int64_t begin, end;
  };
  Share share(int thread, int threads) const {
    int64_t patterns = (layout_.size() + pattern_ - 1) / pattern_;
    return {patterns * thread / threads, patterns * (thread + 1) / threads};
  }
  template <class F> void tiles_of(int64_t pattern, F f) const {
    int64_t start = pattern * pattern_, length = std::min(pattern_, layout_.size() - start);
    for (int64_t i = 0; i < length; i += tile_size) f(Tile{start + i, std::min(tile_size, length - i), i});
  }

  Layout layout_;
  int64_t pattern_;
};

class Planes {
 public:
  explicit Planes(const Layout& layout) : layout_(layout), parts_((layout.inner + part_ - 1) / part_) {}
  const Layout& layout() const { return layout_; }
  int64_t width() const { return layout_.channels; }

  template <class T> OneForAll<T> at(const Values<T>& values, int64_t position) const {
    return {values[position]};
  }
  template <class S, class F> void tiles(int thread, int threads, F f) const {
    parts(thread, threads, tile_size, f);
  }
  // The runs follow one another.
  template <class S, class F> void groups(int thread, int threads, F f) const {
    constexpr bool is_float = std::is_same<S, float>::value;
    parts(thread, threads, is_float ? runs_at_once * tile_size : tile_size, [&](const Tile& tile) {
      const int64_t run = is_float ? tile.n / (runs_at_once * line<float>) * line<float> : 0;
      const int64_t done = run * runs_at_once;
      if constexpr (is_float)
        if (run > 0) f(Tile{tile.offset, run, tile.position, run}, RunCount<runs_at_once>());
      if (done < tile.n) f(Tile{tile.offset + done, tile.n - done, tile.position}, RunCount<1>());
    });
  }

 private:
  // Parts of at most `most` values of one plane, as one run.
  template <class F> void parts(int thread, int threads, int64_t most, F f) const {
    int64_t units = layout_.outer * layout_.channels * parts_;
    for (int64_t unit = units * thread / threads; unit < units * (thread + 1) / threads; ++unit) {
      int64_t plane = unit / parts_, first = unit % parts_ * part_;
      int64_t length = std::min(part_, layout_.inner - first);
      int64_t start = plane * layout_.inner + first, channel = plane % layout_.channels;
      for (int64_t i = 0; i < length; i += most) f(Tile{start + i, std::min(most, length - i), channel});
    }
  }

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

// Calls f with a null pointer to the storage type that `dtype` (a code of library.py) stands for.
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
