// winograd_conv2d, winograd_weight_gradient: a convolution of 3 × 3 with stride 1, and its gradients, from 16 products
// for every tile of 2 × 2 results where the sum itself takes 36 (S. Winograd; A. Lavin, S. Gray, "Fast algorithms for
// convolutional neural networks", 2016: F(2×2, 3×3)). With d a tile of 4 × 4 of the input, g the kernel, y the results,
//
//   y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A              Σ over the input's channels inside the brackets
//   dL/dg = Gᵀ [(Bᵀ d B) ⊙ (A dL/dy Aᵀ)] G      Σ over the tiles
//
// and dL/dd is the first line with the kernel turned by half a circle and its channels exchanged. Sums over channels or
// tiles are matrix products, one for each of the 16 positions. Some tiles at a time, as many as the caches hold, are
// transformed, multiplied and transformed back, channels innermost; of an array that lies in planes, the pixels of a
// row of tiles are turned into that order first. The matrices hold 0, ±1 and ±1/2 only, and the sums are shorter: this
// rounds about as the sum does.
#include <memory>

#include "layout.h"
#include "matrix_product.h"
#include "winograd.h"

namespace normpass {
namespace {

constexpr int positions = window * window, kernel_size = 9;
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
template <int EDGE, class A, class F>
void transform_tiles(const Convolution& conv, const Images& images, const A* values, int64_t channel, int64_t channels,
                     int64_t begin, int64_t end, int64_t before_row, int64_t before_column, const Staging<A>& staging,
                     const Transformed<A>& to, F f) {
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
        f(pixels, result);
        A* target = to.at(t - begin, c);
#pragma GCC unroll 16
        for (int p = 0; p < positions; ++p) result[p].store(target + p * to.plane);
      }
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

// G g Gᵀ in panels of two vectors of result channels: [position][panel][source channel][channel of the panel].
template <class A>
void transform_weight(const A* weight, const Images& from, const Images& to, const Strides& strides, bool turned,
                      A* result, int threads) {
  using V = Vector<A>;
  constexpr int64_t n = V::lanes;
  const int64_t panels = (to.channels + 2 * n - 1) / (2 * n), plane = panels * from.channels * 2 * n;
#pragma omp parallel for num_threads(threads) collapse(2)
  for (int64_t o = 0; o < panels * 2 * n; o += n)
    for (int64_t first = 0; first < from.channels; first += n) {
      V block[kernel_size * n] = {};  // [source channel][position], a lane for every result channel
      const int64_t lanes = std::max<int64_t>(0, std::min(n, to.channels - o)), count = std::min(n, from.channels - first);
      A* values = reinterpret_cast<A*>(block);
      // In the order in which they lie there, and asking for the next block's: a whole line for a few values.
      const bool by_source = strides.from < strides.to;
      for (int64_t a = 0; a < (by_source ? lanes : count); ++a)
        for (int64_t p = 0; p < kernel_size; ++p) {
          const int64_t position = turned ? kernel_size - 1 - p : p;
          const A* values_of = weight + o * strides.to + first * strides.from + position * strides.position;
          const A* from_here = values_of + a * (by_source ? strides.to : strides.from);
          __builtin_prefetch(from_here + n * strides.from, 0, 3);
          if (by_source)
            for (int64_t i = 0; i < count; ++i) values[(i * kernel_size + p) * n + a] = from_here[i * strides.from];
          else
            for (int64_t i = 0; i < lanes; ++i) values[(a * kernel_size + p) * n + i] = from_here[i * strides.to];
        }
      for (int64_t i = 0; i < count; ++i) {
        V whole[positions];
        kernel_of(block + i * kernel_size, whole);
        A* target = result + (o / (2 * n) * from.channels + first + i) * 2 * n + o % (2 * n);
        for (int p = 0; p < positions; ++p) whole[p].store(target + p * plane);
      }
    }
}

// Tiles to work on at a time, where one fills `values` of type A.
template <class A> int64_t tiles_at_once(int64_t values) {
  int64_t fit = scratch_bytes / (values * static_cast<int64_t>(sizeof(A)));
  return std::max(fewest_tiles, std::min(most_tiles, fit)) / rows_at_once * rows_at_once;
}

template <class A>
void convolve(const Convolution& conv, const A* x, const A* weight, const Strides& strides, bool turned, const A* bias,
              A* y, int threads) {
  using V = Vector<A>;
  constexpr int64_t width = 2 * V::lanes;
  const int64_t channels = conv.from.channels, panels = (conv.to.channels + width - 1) / width, tiles = conv.tiles();
  Scratch<A> kernels(positions * panels * channels * width);
  transform_weight(weight, conv.from, conv.to, strides, turned, kernels.data(), threads);
  // A line more than needed from row to row: else rows of some widths fall onto the same places in the caches.
  const int64_t row = round_up(channels, V::lanes) + line<A>, product_row = panels * width + line<A>;
  int64_t blocks = round_up((tiles - 1) / tiles_at_once<A>(positions * (row + product_row)) + 1, threads);
  const int64_t size = round_up((tiles - 1) / blocks + 1, 4);
  blocks = (tiles - 1) / size + 1;
#pragma omp parallel num_threads(threads)
  {
    Staging<A> in(conv, conv.from, channels, window), out(conv, conv.to, conv.to.channels, tile);
    Scratch<A> inputs(positions * size * row), products(positions * size * product_row);
    Transformed<A> input{inputs.data(), size * row, row, row, 0};
    Transformed<A> product{products.data(), size * product_row, product_row, product_row, 0};
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = b * size, end = std::min(tiles, begin + size);
      transform_tiles<window>(conv, conv.from, x, 0, channels, begin, end, conv.padding_height, conv.padding_width, in,
                              input, [](const V* d, V* to) { input_of(d, to); });
      for (int p = 0; p < positions; ++p)
        for (int64_t panel = 0; panel < panels; ++panel)
          multiply<false>(end - begin, input.values + p * input.plane, row, 1,
                          kernels.data() + (p * panels + panel) * channels * width, channels,
                          product.values + p * product.plane + panel * width, product_row);
      write_tiles(conv, y, bias, begin, end, out, product);
    }
  }
}

// Threads share (group of source channels, tile): a thread's part of a group is a piece with sums of its own.
template <class A>
void weight_gradient(const Convolution& conv, const A* grad, const A* x, A* dweight, const Strides& strides, int threads) {
  using V = Vector<A>;
  constexpr int64_t width = 2 * V::lanes;
  const int64_t tiles = conv.tiles(), all = conv.from.channels, results = conv.to.channels;
  const int64_t group = std::min<int64_t>(128, round_up(all, width)), groups = (all + group - 1) / group;
  const int64_t row = round_up(results, V::lanes) + line<A>, pieces = groups + threads - 1;
  const int64_t size = tiles_at_once<A>(positions * (row + group)), plane = results * group + line<A>;
  std::vector<std::unique_ptr<Scratch<A>>> sums(pieces);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    Staging<A> in(conv, conv.from, group, window), out(conv, conv.to, results, tile);
    Scratch<A> inputs(positions * size * group), gradients(positions * size * row);
    Transformed<A> input{inputs.data(), size * group, width, width, size * width};
    Transformed<A> gradient{gradients.data(), size * row, row, row, 0};
    for (int64_t unit = groups * tiles * thread / team, last = groups * tiles * (thread + 1) / team; unit < last;) {
      const int64_t g = unit / tiles, end = std::min(tiles, last - g * tiles);
      const int64_t channel = g * group, channels = std::min(group, all - channel);
      std::unique_ptr<Scratch<A>>& sum = sums[g + thread];  // no other part of a group has this place
      sum.reset(new Scratch<A>(positions * plane));
      std::fill(sum->data(), sum->data() + positions * plane, A(0));
      for (int64_t begin = unit - g * tiles; begin < end; begin += size) {
        const int64_t stop = std::min(end, begin + size);
        transform_tiles<window>(conv, conv.from, x, channel, channels, begin, stop, conv.padding_height,
                                conv.padding_width, in, input, [](const V* d, V* to) { input_of(d, to); });
        transform_tiles<tile>(conv, conv.to, grad, 0, results, begin, stop, 0, 0, out, gradient,
                              [](const V* d, V* to) { gradient_of(d, to); });
        for (int p = 0; p < positions; ++p)
          for (int64_t c = 0; c < channels; c += width)
            multiply<true>(results, gradient.values + p * gradient.plane, 1, row,
                           input.values + p * input.plane + c * size, stop - begin, sum->data() + p * plane + c, group);
      }
      unit = g * tiles + end;
    }
#pragma omp barrier
#pragma omp for
    for (int64_t o = 0; o < results; ++o)
      for (int64_t c = 0; c < all; c += V::lanes) {
        const int64_t g = c / group, place = o * group + c % group, count = std::min(V::lanes, all - c);
        V total[positions] = {}, result[kernel_size];
        for (int64_t k = 0; k < team; ++k) {  // in the order of the threads
          const int64_t begin = std::max(g * tiles, groups * tiles * k / team);
          const int64_t end = std::min((g + 1) * tiles, groups * tiles * (k + 1) / team);
          if (begin >= end) continue;
          for (int p = 0; p < positions; ++p) total[p] += V::load(sums[g + k]->data() + p * plane + place);
        }
        product_of(total, result);
        for (int p = 0; p < kernel_size; ++p) {
          A* target = dweight + o * strides.to + c * strides.from + p * strides.position;
          if (strides.from == 1 && count == V::lanes) result[p].store(target);
          else
            for (int64_t lane = 0; lane < count; ++lane) target[lane * strides.from] = result[p].values[lane];
        }
      }
  }
}

template <class F> int with_wide_dtype(int dtype, F f) {
  int unknown = 0;
  int status = with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    if constexpr (std::is_same<S, Wide<S>>::value) f(storage);
    else unknown = 1;
  });
  return status | unknown;
}

}  // namespace
}  // namespace normpass

// x (samples, channels, height, width) and y (samples, out_channels, out_height, out_width) in one layout. `weight` is
// that of the convolution, (out_channels, channels, 3, 3), or with `transposed` that of the one whose input's gradient
// this is, (channels, out_channels, 3, 3). Returns 1 for a type that it has no loop for.
NORMPASS_EXPORT int normpass_winograd_conv2d(void* y, const void* x, const void* weight, const void* bias,
                                             int64_t samples, int64_t channels, int64_t height, int64_t width,
                                             int64_t out_channels, int64_t out_height, int64_t out_width,
                                             int64_t padding_height, int64_t padding_width, int transposed,
                                             int channels_last, int weight_channels_last, int dtype, int threads) {
  using namespace normpass;
  const bool last = channels_last != 0;
  Convolution conv{{samples, channels, height, width, last}, {samples, out_channels, out_height, out_width, last},
                   padding_height, padding_width};
  const int64_t inner = transposed ? out_channels : channels;  // channels of the weight's second dimension
  const int64_t outer_step = kernel_size * inner, inner_step = weight_channels_last ? 1 : kernel_size;
  Strides strides{transposed ? inner_step : outer_step, transposed ? outer_step : inner_step,
                  weight_channels_last ? inner : 1};
  return with_wide_dtype(dtype, [&](auto* storage) {
    using A = std::remove_pointer_t<decltype(storage)>;
    convolve(conv, static_cast<const A*>(x), static_cast<const A*>(weight), strides, transposed != 0,
             static_cast<const A*>(bias), static_cast<A*>(y), threads);
  });
}

// dweight (out_channels, channels, 3, 3).
NORMPASS_EXPORT int normpass_winograd_weight_gradient(void* dweight, const void* grad, const void* x, int64_t samples,
                                                      int64_t channels, int64_t height, int64_t width,
                                                      int64_t out_channels, int64_t out_height, int64_t out_width,
                                                      int64_t padding_height, int64_t padding_width, int channels_last,
                                                      int weight_channels_last, int dtype, int threads) {
  using namespace normpass;
  const bool last = channels_last != 0;
  Convolution conv{{samples, channels, height, width, last}, {samples, out_channels, out_height, out_width, last},
                   padding_height, padding_width};
  Strides strides{kernel_size * channels, weight_channels_last ? 1 : kernel_size, weight_channels_last ? channels : 1};
  return with_wide_dtype(dtype, [&](auto* storage) {
    using A = std::remove_pointer_t<decltype(storage)>;
    weight_gradient(conv, static_cast<const A*>(grad), static_cast<const A*>(x), static_cast<A*>(dweight), strides,
                    threads);
  });
}
