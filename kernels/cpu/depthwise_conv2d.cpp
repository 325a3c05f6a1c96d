// depthwise_conv2d: y[n, c, i, j] = Σ z[n, c, i·stride + p − padding, j·stride + q − padding] · weight[c, p, q] + bias[c],
// where z is x or act(norm(x)), which is never written; and the gradient of z, which is the transposed convolution.
#include "depthwise_rows.h"

namespace normpass {
namespace {

constexpr int64_t fewest_units = 4;  // for a thread; where there are fewer, the rows of a sample are shared

template <class A>
int convolve(const Convolution& conv, A* y, const A* x, const A* weight, const A* bias, const Entry<A>& entry,
             int threads) {
  using V = Vector<A>;
  const RowConvolution<A> rows(conv, weight);
  if (!rows.has_loops()) return 1;
  const int64_t channels = conv.from.channels, height = conv.to.height;
  const int64_t vectors = vectors_at_once<A>(conv.from, threads), block = vectors * V::lanes;
  const int64_t blocks = (channels + block - 1) / block;
  const int64_t bands = std::min(height, (fewest_units * threads - 1) / (blocks * conv.from.samples) + 1);
  const int64_t units = conv.from.samples * blocks * bands;
  const bool streamed = is_streamed(conv.to, y);
#pragma omp parallel num_threads(threads)
  {
    Ring<A> ring = rows.ring(conv.kernel_height, vectors);
    typename RowConvolution<A>::Place place;
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t unit = units * thread / team; unit < units * (thread + 1) / team; ++unit) {
      const int64_t sample = unit / (blocks * bands), channel = unit / bands % blocks * block, band = unit % bands;
      const int64_t count = std::min(block, channels - channel);
      ring.begin(x, sample, channel, count);
      for (int64_t row = height * band / bands; row < height * (band + 1) / bands; ++row) {
        rows.find(row, ring, place);
        if (place.meeting.count > 0) ring.advance(place.first_row(), place.end_row(), entry);
        A* to = y + (sample * height + row) * conv.to.width * channels + channel;
        for (int64_t c = 0; c < count; c += V::lanes) {
          const int64_t lanes = std::min(V::lanes, count - c);
          V shift{};
          if (bias != nullptr)
            shift = lanes == V::lanes ? V::load(bias + channel + c) : V::load_some(bias + channel + c, lanes);
          rows.row(ring, place, c / V::lanes, channel + c, shift, to + c, channels, lanes, streamed);
        }
      }
    }
    if (streamed) end_of_stream();
  }
  return 0;
}

}  // namespace
}  // namespace normpass

// x (samples, channels, height, width) and y (samples, channels, out_height, out_width), channels_last; `weight`
// (channels, 1, kernel_height, kernel_width). `transposed`: y is the gradient of the input of the convolution with
// these arguments and x that of its result. `mean` null: x goes in as it is. Returns 1 for a type, a kernel width or a
// stride that it has no loop for.
NORMPASS_EXPORT int normpass_depthwise_conv2d(
    void* y, const void* x, const void* weight, const void* bias, const void* norm_weight, const void* norm_bias,
    const void* mean, const void* var, double eps, int activation, double arg0, double arg1, int64_t samples,
    int64_t channels, int64_t height, int64_t width, int64_t out_height, int64_t out_width, int64_t kernel_height,
    int64_t kernel_width, int64_t stride_height, int64_t stride_width, int64_t padding_height, int64_t padding_width,
    int transposed, int dtype, int threads) {
  using namespace normpass;
  Convolution conv{{samples, channels, height, width, true},
                   {samples, channels, out_height, out_width, true},
                   kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width,
                   transposed != 0};
  int unknown = 0;
  int status = with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    if constexpr (std::is_same<S, Wide<S>>::value) {
      const Entry<S> entry = entry_of<S>(channels, norm_weight, norm_bias, mean, var, eps, {activation, arg0, arg1});
      unknown = convolve<S>(conv, static_cast<S*>(y), static_cast<const S*>(x), static_cast<const S*>(weight),
                            static_cast<const S*>(bias), entry, threads);
    } else {
      unknown = 1;
    }
  });
  return status | unknown;
}
