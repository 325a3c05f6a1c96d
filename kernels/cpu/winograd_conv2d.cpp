// winograd_conv2d: a convolution of 3 × 3 with stride 1, and its gradients, from 16 products for every tile of 2 × 2
// results where the sum itself takes 36 (S. Winograd; A. Lavin, S. Gray, "Fast algorithms for convolutional neural
// networks", 2016: F(2×2, 3×3)). With d a tile of 4 × 4 of the input, g the kernel, y the results,
//
//   y = Aᵀ [(G g Gᵀ) ⊙ (Bᵀ d B)] A              Σ over the input's channels inside the brackets
//   dL/dg = Gᵀ [(Bᵀ d B) ⊙ (A dL/dy Aᵀ)] G      Σ over the tiles
//
// and dL/dd is the first line with the kernel turned by half a circle and its channels exchanged. Sums over channels or
// tiles are matrix products, one for each of the 16 positions. Some tiles at a time, as many as the caches hold, are
// transformed, multiplied and transformed back. The matrices hold 0, ±1 and ±1/2 only, and the sums are shorter: where
// the values of a tile are of about one size, this rounds about as the sum does (`winograd_checks.h`).
#include <atomic>

#include "winograd_tiles.h"

namespace normpass {
namespace winograd {
namespace {

// G g Gᵀ in panels of two vectors of result channels: [position][panel][source channel][channel of the panel]. Returns
// the sums of what it has read.
template <class A>
KernelSums<A> transform_weight(const A* weight, const Images& from, const Images& to, const Strides& strides, bool turned,
                               A* result, int threads) {
  using V = Vector<A>;
  constexpr int64_t n = V::lanes;
  const int64_t panels = (to.channels + 2 * n - 1) / (2 * n), plane = panels * from.channels * 2 * n;
  std::vector<KernelSums<A>> shares(threads);
#pragma omp parallel num_threads(threads)
  {
    KernelSums<A> sums;
#pragma omp for collapse(2)
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
          sums.add(block + i * kernel_size);
          kernel_of(block + i * kernel_size, whole);
          A* target = result + (o / (2 * n) * from.channels + first + i) * 2 * n + o % (2 * n);
          for (int p = 0; p < positions; ++p) whole[p].store(target + p * plane);
        }
      }
    shares[omp_get_thread_num()] = sums;
  }
  for (int t = 1; t < threads; ++t) shares[0].merge(shares[t]);
  return shares[0];
}

// The tiles that are left to be computed otherwise, for all threads.
struct Left {
  int64_t* tiles;
  int64_t most;
  std::atomic<int64_t>& count;

  bool are_too_many() const { return count.load(std::memory_order_relaxed) > most; }
  // Those of a block that begins at `begin`; `of_block` is empty then.
  void take(std::vector<int64_t>& of_block, int64_t begin) const {
    const int64_t n = static_cast<int64_t>(of_block.size()), first = n == 0 ? 0 : count.fetch_add(n);
    for (int64_t i = 0; i < n && first + i < most; ++i) tiles[first + i] = begin + of_block[i];
    of_block.clear();
  }
};

template <class A>
int convolve(const Convolution& conv, const A* x, const A* weight, const Strides& strides, bool turned, const A* bias,
             A* y, const Left& left, int threads) {
  using V = Vector<A>;
  constexpr int64_t width = 2 * V::lanes;
  const int64_t channels = conv.from.channels, panels = (conv.to.channels + width - 1) / width, tiles = conv.tiles();
  Scratch<A> kernels(positions * panels * channels * width);
  const KernelSums<A> sums = transform_weight(weight, conv.from, conv.to, strides, turned, kernels.data(), threads);
  if (!sums.allow(channels * conv.to.channels)) return all_left;
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
    Balance<A> balance;
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; ++b) {
      if (left.are_too_many()) continue;
      const int64_t begin = b * size, end = std::min(tiles, begin + size);
      transform_tiles<window>(conv, conv.from, x, 0, channels, begin, end, conv.padding_height, conv.padding_width, in,
                              input, balance, [](const V* d, V* to) { input_of(d, to); });
      left.take(balance.of_block(), begin);
      for (int p = 0; p < positions; ++p)
        for (int64_t panel = 0; panel < panels; ++panel)
          multiply<false>(end - begin, input.values + p * input.plane, row, 1,
                          kernels.data() + (p * panels + panel) * channels * width, channels,
                          product.values + p * product.plane + panel * width, product_row);
      write_tiles(conv, y, bias, begin, end, out, product);
    }
  }
  return left.are_too_many() ? all_left : static_cast<int>(left.count);
}

}  // namespace
}  // namespace winograd
}  // namespace normpass

// x (samples, channels, height, width) and y (samples, out_channels, out_height, out_width) in one layout. `weight` is
// that of the convolution, (out_channels, channels, 3, 3), or with `transposed` that of the one whose input's gradient
// this is, (channels, out_channels, 3, 3). Returns how many tiles are left to be computed otherwise, with their numbers
// in `left`, in any order; `all_left` where they would be more than `most_left` or the weight is no good; and
// `unknown_type` for a type that it has no loop for.
NORMPASS_EXPORT int normpass_winograd_conv2d(void* y, const void* x, const void* weight, const void* bias, int64_t* left,
                                             int64_t most_left, int64_t samples, int64_t channels, int64_t height,
                                             int64_t width, int64_t out_channels, int64_t out_height,
                                             int64_t out_width, int64_t padding_height, int64_t padding_width,
                                             int transposed, int channels_last, int weight_channels_last, int dtype,
                                             int threads) {
  using namespace normpass;
  using namespace normpass::winograd;
  const bool last = channels_last != 0;
  Convolution conv{{samples, channels, height, width, last}, {samples, out_channels, out_height, out_width, last},
                   padding_height, padding_width};
  const int64_t inner = transposed ? out_channels : channels;  // channels of the weight's second dimension
  const int64_t outer_step = kernel_size * inner, inner_step = weight_channels_last ? 1 : kernel_size;
  Strides strides{transposed ? inner_step : outer_step, transposed ? outer_step : inner_step,
                  weight_channels_last ? inner : 1};
  return with_wide_dtype(dtype, [&](auto* storage) {
    using A = std::remove_pointer_t<decltype(storage)>;
    std::atomic<int64_t> count{0};
    return convolve(conv, static_cast<const A*>(x), static_cast<const A*>(weight), strides, transposed != 0,
                    static_cast<const A*>(bias), static_cast<A*>(y), Left{left, most_left, count}, threads);
  });
}
