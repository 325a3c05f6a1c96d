// winograd_weight_gradient: that of winograd_conv2d's weight, from 16 products for every tile of the result's gradient,
//
//   dL/dg = Gᵀ [(Bᵀ d B) ⊙ (A dL/dy Aᵀ)] G      Σ over the tiles inside the brackets
//
// as one matrix product, with the tiles as its inner dimension, for each of the 16 positions.
#include <atomic>
#include <memory>

#include "winograd_tiles.h"

namespace normpass {
namespace winograd {
namespace {

// Whether a thread of the team has tiles of a group.
inline bool has_part(int64_t thread, int64_t group, int64_t team, int64_t groups, int64_t tiles) {
  const int64_t begin = std::max(group * tiles, groups * tiles * thread / team);
  return begin < std::min((group + 1) * tiles, groups * tiles * (thread + 1) / team);
}

// Threads share (group of source channels, tile): a thread's part of a group is a piece with sums of its own.
// Returns 0, or `all_left`.
template <class A>
int weight_gradient(const Convolution& conv, const A* grad, const A* x, A* dweight, const Strides& strides, int threads) {
  using V = Vector<A>;
  constexpr int64_t width = 2 * V::lanes;
  const int64_t tiles = conv.tiles(), all = conv.from.channels, results = conv.to.channels;
  const int64_t group = std::min<int64_t>(128, round_up(all, width)), groups = (all + group - 1) / group;
  const int64_t row = round_up(results, V::lanes) + line<A>, pieces = groups + threads - 1;
  const int64_t size = tiles_at_once<A>(positions * (row + group)), plane = results * group + line<A>;
  std::vector<std::unique_ptr<Scratch<A>>> sums(pieces);
  std::vector<Extremes> of_inputs(pieces), of_gradients(pieces);
  const double products = static_cast<double>(conv.to.samples * conv.to.height * conv.to.width);
  std::atomic<bool> is_left{false};
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
      Extremes &seen = of_inputs[g + thread], &seen_gradients = of_gradients[g + thread];
      for (int64_t begin = unit - g * tiles; begin < end && !is_left; begin += size) {
        const int64_t stop = std::min(end, begin + size);
        Magnitudes<A, window> some_inputs;
        Magnitudes<A, tile> some_gradients;
        transform_tiles<window>(conv, conv.from, x, channel, channels, begin, stop, conv.padding_height,
                                conv.padding_width, in, input, some_inputs,
                                [](const V* d, V* to) { input_of(d, to); });
        transform_tiles<tile>(conv, conv.to, grad, 0, results, begin, stop, 0, 0, out, gradient, some_gradients,
                              [](const V* d, V* to) { gradient_of(d, to); });
        seen.add(some_inputs, channels), seen_gradients.add(some_gradients, results);
        if (!are_even<A>(seen, seen_gradients, 4 * products)) is_left = true;  // the means may grow, but hardly that much
        for (int p = 0; p < positions; ++p)
          for (int64_t c = 0; c < channels; c += width)
            multiply<true>(results, gradient.values + p * gradient.plane, 1, row,
                           input.values + p * input.plane + c * size, stop - begin, sum->data() + p * plane + c, group);
      }
      unit = g * tiles + end;
    }
#pragma omp barrier
#pragma omp for
    for (int64_t g = 0; g < groups; ++g) {
      Extremes inputs, gradients;
      for (int64_t k = 0; k < team; ++k)
        if (has_part(k, g, team, groups, tiles)) inputs.add(of_inputs[g + k]), gradients.add(of_gradients[g + k]);
      if (!are_even<A>(inputs, gradients, products)) is_left = true;
    }
    const bool goes_on = !is_left;
#pragma omp for
    for (int64_t o = 0; o < (goes_on ? results : 0); ++o)
      for (int64_t c = 0; c < all; c += V::lanes) {
        const int64_t g = c / group, place = o * group + c % group, count = std::min(V::lanes, all - c);
        V total[positions] = {}, result[kernel_size];
        for (int64_t k = 0; k < team; ++k) {  // in the order of the threads
          if (!has_part(k, g, team, groups, tiles)) continue;
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
  return is_left ? all_left : 0;
}

}  // namespace
}  // namespace winograd
}  // namespace normpass

// dweight (out_channels, channels, 3, 3). Returns 0; `all_left` where it must be computed otherwise; `unknown_type` for a
// type that it has no loop for.
NORMPASS_EXPORT int normpass_winograd_weight_gradient(void* dweight, const void* grad, const void* x, int64_t samples,
                                                      int64_t channels, int64_t height, int64_t width,
                                                      int64_t out_channels, int64_t out_height, int64_t out_width,
                                                      int64_t padding_height, int64_t padding_width, int channels_last,
                                                      int weight_channels_last, int dtype, int threads) {
  using namespace normpass;
  using namespace normpass::winograd;
  const bool last = channels_last != 0;
  Convolution conv{{samples, channels, height, width, last}, {samples, out_channels, out_height, out_width, last},
                   padding_height, padding_width};
  Strides strides{kernel_size * channels, weight_channels_last ? 1 : kernel_size, weight_channels_last ? channels : 1};
  return with_wide_dtype(dtype, [&](auto* storage) {
    using A = std::remove_pointer_t<decltype(storage)>;
    return weight_gradient(conv, static_cast<const A*>(grad), static_cast<const A*>(x), static_cast<A*>(dweight), strides,
                           threads);
  });
}
