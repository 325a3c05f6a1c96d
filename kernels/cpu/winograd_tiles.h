// Some tiles at a time, transformed and transformed back: what the convolution and its weight's gradient share. Channels
// lie innermost; of an array that lies in planes, the pixels of a row of tiles are turned into that order first.
#pragma once

#include "layout.h"
#include "matrix_product.h"
#include "winograd_checks.h"

namespace normpass {
namespace winograd {

constexpr int positions = window * window;
constexpr int64_t scratch_bytes = int64_t(1) << 19;  // that a thread's tiles fill; twice as much is as good
constexpr int64_t fewest_tiles = 48, most_tiles = 240;  // at a time; with fewer, reading the weights takes longer

struct Images {
  int64_t samples, channels, height, width;
  bool channels_last;
};

struct Convolution {
  Images from, to;
  int64_t padding_height, padding_width;
  int64_t tile_rows() const { return (to.height + tile - 1) / tile; }
  int64_t tile_columns() const { return (to.width + tile - 1) / tile; }
  int64_t tiles() const { return to.samples * tile_rows() * tile_columns(); }
};

// Where the values of a weight lie: from result channel to result channel, source channel, position in the kernel.
struct Strides {
  int64_t to, from, position;
};

// --- pixels, channels innermost ----------------------------------------------------------------------------------

// Pixels from (top, left) of a sample on; those outside of it count as zeros and must not be read or written.
template <class T> struct Region {
  T* pixel;  // at (0, 0) of the region, which may lie outside of the sample
  int64_t row, column;
  int64_t first_row, end_row, first_column, end_column;  // that exist

  bool has(int64_t y, int64_t x) const {
    return y >= first_row && y < end_row && x >= first_column && x < end_column;
  }
  Region<const T> to_read() const { return {pixel, row, column, first_row, end_row, first_column, end_column}; }
};

template <class T>
Region<T> region_of(const Images& images, T* values, int64_t sample, int64_t channel, int64_t top, int64_t left,
                    int64_t rows, int64_t columns) {
  int64_t column = images.channels, row = images.width * column;
  int64_t first_row = std::max<int64_t>(0, -top), end_row = std::min(rows, images.height - top);
  int64_t first_column = std::max<int64_t>(0, -left), end_column = std::min(columns, images.width - left);
  T* pixel = values + (sample * images.height + top) * row + left * column + channel;
  return {pixel, row, column, first_row, end_row, first_column, end_column};
}

// The same of an array in planes: copied to `staged` (TO_PLANES: from there) with `pitch` values for a pixel.
template <bool TO_PLANES, class T, class A>
void turn(const Images& images, T* values, int64_t sample, int64_t channel, int64_t channels, int64_t top, int64_t left,
          const Region<A>& staged) {
  using V = Vector<A>;
  const int64_t plane = images.height * images.width;
  for (int64_t y = staged.first_row; y < staged.end_row; ++y)
    for (int64_t c = 0; c < channels; c += V::lanes) {
      T* row = values + ((sample * images.channels + channel + c) * images.height + top + y) * images.width + left;
      A* pixels = staged.pixel + y * staged.row + c;
      const int64_t count = std::min(V::lanes, channels - c);
      for (int64_t x = staged.first_column; x < staged.end_column; x += V::lanes) {
        const int64_t n = std::min(V::lanes, staged.end_column - x);
        V block[V::lanes];
        for (int64_t i = 0; i < count; ++i)  // rows of the tiles below: the processor does not see them coming
          __builtin_prefetch(row + i * plane + tile * images.width + x, TO_PLANES, 2);
        if (TO_PLANES) {
          for (int64_t i = 0; i < n; ++i) block[i] = V::load(pixels + (x + i) * staged.column);
          for (int64_t i = n; i < V::lanes; ++i) block[i] = V{};
          transpose<A>(block);
          for (int64_t i = 0; i < count; ++i) {
            if (n == V::lanes) block[i].store(const_cast<A*>(row + i * plane + x));
            else block[i].store_some(const_cast<A*>(row + i * plane + x), n);
          }
        } else {
          for (int64_t i = 0; i < count; ++i)
            block[i] = n == V::lanes ? V::load(row + i * plane + x) : V::load_some(row + i * plane + x, n);
          for (int64_t i = count; i < V::lanes; ++i) block[i] = V{};
          transpose<A>(block);
          for (int64_t i = 0; i < n; ++i) block[i].store(pixels + (x + i) * staged.column);
        }
      }
    }
}

// The pixels of tiles that stand side by side.
template <class A> class Staging {
 public:
  // `edge` rows and columns for a tile.
  Staging(const Convolution& convolution, const Images& images, int64_t channels, int64_t edge)
      : pitch_(round_up(channels, Vector<A>::lanes)),
        values_(images.channels_last ? 0 : edge * (convolution.tile_columns() * tile + edge - tile) * pitch_) {}

  template <class T> Region<A> staged(const Region<T>& place, int64_t columns) const {
    return {values_.data(), columns * pitch_, pitch_, place.first_row, place.end_row, place.first_column,
            place.end_column};
  }

 private:
  int64_t pitch_;
  Scratch<A> values_;
};

// Calls f(first tile, end, sample, row of pixels, column of pixels) for the parts of [begin, end) in one row of tiles.
template <class F> void each_run(const Convolution& conv, int64_t begin, int64_t end, F f) {
  const int64_t columns = conv.tile_columns(), rows = conv.tile_rows();
  while (begin < end) {
    int64_t line = begin / columns, x = begin % columns, stop = std::min(end, begin - x + columns);
    f(begin, stop, line / rows, line % rows * tile, x * tile);
    begin = stop;
  }
}

// --- from and to the transformed arrays ---------------------------------------------------------------------------

// A transformed array: of `positions` planes, each with a vector of channels for every tile.
template <class A> struct Transformed {
  A* values;
  int64_t plane;        // from position to position
  int64_t row;          // from tile to tile
  int64_t panel_width;  // channels that lie together, a multiple of a vector
  int64_t panel;        // from one such group to the next
  A* at(int64_t t, int64_t channel) const {
    return values + channel / panel_width * panel + t * row + channel % panel_width;
  }
};

// Of the tiles [begin, end), `channels` from `channel` on. EDGE: rows and columns of a tile, and what is done to it.
// `checks` sees all values of a tile, a vector of channels at a time; what it makes of them is a local variable, for a
// vector that is kept elsewhere is stored each time.
template <int EDGE, class A, class Checks, class F>
void transform_tiles(const Convolution& conv, const Images& images, const A* values, int64_t channel, int64_t channels,
                     int64_t begin, int64_t end, int64_t before_row, int64_t before_column, const Staging<A>& staging,
                     const Transformed<A>& to, Checks& checks, F f) {
  using V = Vector<A>;
  each_run(conv, begin, end, [&](int64_t first, int64_t stop, int64_t sample, int64_t y, int64_t x) {
    const int64_t columns = (stop - first) * tile + EDGE - tile, top = y - before_row, left = x - before_column;
    Region<const A> region = region_of(images, values, sample, channel, top, left, EDGE, columns);
    int64_t whole = channels / V::lanes * V::lanes;  // channels that may be read a vector at a time
    if (!images.channels_last) {
      Region<A> here = staging.staged(region, columns);
      turn<false>(images, values, sample, channel, channels, top, left, here);
      region = here.to_read();
      whole = channels;
    }
    for (int64_t t = first; t < stop; ++t) {
      const int64_t column = (t - first) * tile;
      const A* corner = region.pixel + column * region.column;
      const bool inside = region.first_row == 0 && region.end_row == EDGE && region.first_column <= column &&
                          region.end_column >= column + EDGE;
      auto sums = checks.begin({t == first, y == 0, y + 1 < conv.to.height, x + column + 1 < conv.to.width});
      for (int64_t c = 0; c < channels; c += V::lanes) {
        V pixels[EDGE * EDGE], result[positions];
        if (inside && c < whole) {
#pragma GCC unroll 4
          for (int i = 0; i < EDGE; ++i)
#pragma GCC unroll 4
            for (int j = 0; j < EDGE; ++j)
              pixels[i * EDGE + j] = V::load(corner + i * region.row + j * region.column + c);
        } else {
          for (int i = 0; i < EDGE; ++i)
            for (int j = 0; j < EDGE; ++j) {
              const A* pixel = corner + i * region.row + j * region.column + c;
              if (!region.has(i, column + j)) pixels[i * EDGE + j] = V{};
              else pixels[i * EDGE + j] = c < whole ? V::load(pixel) : V::load_some(pixel, channels - c);
            }
        }
        sums.add(pixels);
        f(pixels, result);
        A* target = to.at(t - begin, c);
#pragma GCC unroll 16
        for (int p = 0; p < positions; ++p) result[p].store(target + p * to.plane);
      }
      checks.end(t - begin, sums);
    }
  });
}

template <class A>
void write_tiles(const Convolution& conv, A* values, const A* bias, int64_t begin, int64_t end, const Staging<A>& staging,
                 const Transformed<A>& from) {
  using V = Vector<A>;
  const Images& images = conv.to;
  each_run(conv, begin, end, [&](int64_t first, int64_t stop, int64_t sample, int64_t y, int64_t x) {
    const int64_t columns = (stop - first) * tile, channels = images.channels;
    Region<A> region = region_of(images, values, sample, 0, y, x, tile, columns);
    int64_t whole = channels / V::lanes * V::lanes;
    if (!images.channels_last) {
      region = staging.staged(region, columns);
      whole = channels;
    }
    for (int64_t t = first; t < stop; ++t) {
      const int64_t column = (t - first) * tile;
      A* corner = region.pixel + column * region.column;
      for (int64_t c = 0; c < channels; c += V::lanes) {
        V products[positions], pixels[tile * tile], shift{};
        const A* source = from.at(t - begin, c);
#pragma GCC unroll 16
        for (int p = 0; p < positions; ++p) products[p] = V::load(source + p * from.plane);
        output_of(products, pixels);
        if (bias != nullptr)
          shift = c + V::lanes <= channels ? V::load(bias + c) : V::load_some(bias + c, channels - c);
        for (int i = 0; i < tile; ++i)
          for (int j = 0; j < tile; ++j) {
            if (!region.has(i, column + j)) continue;
            A* pixel = corner + i * region.row + j * region.column + c;
            V value = bias == nullptr ? pixels[i * tile + j] : pixels[i * tile + j] + shift;
            if (c < whole) value.store(pixel);
            else value.store_some(pixel, channels - c);
          }
      }
    }
    if (!images.channels_last) turn<true>(images, values, sample, 0, channels, y, x, region);
  });
}

// Tiles to work on at a time, where one fills `values` of type A.
template <class A> int64_t tiles_at_once(int64_t values) {
  int64_t fit = scratch_bytes / (values * static_cast<int64_t>(sizeof(A)));
  return std::max(fewest_tiles, std::min(most_tiles, fit)) / rows_at_once * rows_at_once;
}

// What f returns for the type that `dtype` stands for, or `unknown_type`.
template <class F> int with_wide_dtype(int dtype, F f) {
  int result = unknown_type;
  with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    if constexpr (std::is_same<S, Wide<S>>::value) result = f(storage);
  });
  return result;
}

}  // namespace winograd
}  // namespace normpass
