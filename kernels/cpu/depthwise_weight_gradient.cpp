// depthwise_weight_gradient: dweight[c, i, j] = Σ grad[n, c, y, x] · z[n, c, y·stride + i − padding, x·stride + j − padding],
// where z is x or act(norm(x)), which is never written.
//
// Row after row of `grad` with the rows of z that it meets. Reads both arrays once; sums a sample in the wide type and
// samples in double.
#include "depthwise.h"

namespace normpass {
namespace {

#if defined(__AVX512F__)
constexpr int at_once = 4;  // registers: a row of the kernel, `at_once` of grad, what they meet
#else
constexpr int at_once = 2;
#endif

struct Convolution {
  Images x, grad;
  int64_t kernel_height, stride_height, padding_height, padding_width;
};

// One row of the kernel's gradient from one row of `grad` and the row of z that it meets.
template <int WIDTH, int STRIDE, class A>
void add_row(const Vector<A>* grad, const Vector<A>* input, int64_t n, Vector<A>* sums) {
  Vector<A> sum[WIDTH];
#pragma GCC unroll 16
  for (int j = 0; j < WIDTH; ++j) sum[j] = sums[j];
  for (int64_t x = 0; x < n; x += at_once) {
    Vector<A> met[WIDTH + STRIDE * (at_once - 1)];
#pragma GCC unroll 16
    for (int j = 0; j < WIDTH + STRIDE * (at_once - 1); ++j) met[j] = input[x * STRIDE + j];
#pragma GCC unroll 4
    for (int i = 0; i < at_once; ++i) {
      Vector<A> g = grad[x + i];
#pragma GCC unroll 16
      for (int j = 0; j < WIDTH; ++j) sum[j].add_product(g, met[STRIDE * i + j]);
    }
  }
#pragma GCC unroll 16
  for (int j = 0; j < WIDTH; ++j) sums[j] = sum[j];
}

template <class S, int WIDTH, int STRIDE>
void gradient_of_share(const Convolution& conv, const S* grad, const S* x, const Entry<Wide<S>>& entry, int64_t vectors,
                       int64_t begin, int64_t end, double* total) {
  using V = Vector<Wide<S>>;
  const int64_t block = vectors * V::lanes, blocks = (conv.x.channels + block - 1) / block;
  const int64_t kernel = conv.kernel_height * WIDTH, columns = round_up(conv.grad.width, at_once);
  const int64_t pitch = std::max((columns - 1) * STRIDE + WIDTH, conv.padding_width + conv.x.width);
  Ring<S> inputs(conv.x, conv.kernel_height, conv.padding_width, pitch, vectors);
  Ring<S> gradients(conv.grad, 1, 0, columns, vectors);
  Values<V> sums(vectors * kernel);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / blocks, channel = unit % blocks * block;
    const int64_t count = std::min(block, conv.x.channels - channel);
    inputs.begin(x, sample, channel, count), gradients.begin(grad, sample, channel, count);
    std::fill(sums.begin(), sums.end(), V{});
    for (int64_t y = 0; y < conv.grad.height; ++y) {
      const int64_t row = y * conv.stride_height - conv.padding_height;
      const int64_t first = std::max<int64_t>(0, -row), stop = std::min(conv.kernel_height, conv.x.height - row);
      if (first >= stop) continue;
      inputs.advance(row + first, row + stop, entry), gradients.advance(y, y + 1, Entry<Wide<S>>{});
      for (int64_t v = 0; v * V::lanes < count; ++v)
        for (int64_t i = first; i < stop; ++i)
          add_row<WIDTH, STRIDE>(gradients.pixels(v), inputs.pixels(v) + inputs.offset(row + i), columns,
                                 &sums[v * kernel + i * WIDTH]);
    }
    for (int64_t c = 0; c < count; ++c)
      for (int64_t k = 0; k < kernel; ++k)
        total[(channel + c) * kernel + k] += sums[c / V::lanes * kernel + k].values[c % V::lanes];
  }
}

template <class S, int WIDTH, int STRIDE>
void gradient(const Convolution& conv, const S* grad, const S* x, const Entry<Wide<S>>& entry, Wide<S>* dweight,
              int threads) {
  const int64_t vectors = vectors_at_once<Wide<S>>(conv.x, threads), block = vectors * Vector<Wide<S>>::lanes;
  const int64_t units = conv.x.samples * ((conv.x.channels + block - 1) / block);
  const int64_t size = conv.x.channels * conv.kernel_height * WIDTH;
  std::vector<std::vector<double>> shares(threads, std::vector<double>(size, 0.0));
#pragma omp parallel num_threads(threads)
  {
    int thread = omp_get_thread_num(), all = omp_get_num_threads();
    gradient_of_share<S, WIDTH, STRIDE>(conv, grad, x, entry, vectors, units * thread / all,
                                        units * (thread + 1) / all, shares[thread].data());
  }
  for (int64_t i = 0; i < size; ++i) {
    double sum = 0;
    for (const std::vector<double>& share : shares) sum += share[i];
    dweight[i] = static_cast<Wide<S>>(sum);
  }
}

}  // namespace
}  // namespace normpass

// `mean` null: z is x. A norm is applied to x of a wide type only. Returns 1 for a kernel width, a stride or a type that
// it has no loop for.
NORMPASS_EXPORT int normpass_depthwise_weight_gradient(
    void* dweight, const void* grad, const void* x, const void* norm_weight, const void* norm_bias, const void* mean,
    const void* var, double eps, int activation, double arg0, double arg1, int64_t samples, int64_t channels,
    int64_t height, int64_t width, int64_t out_height, int64_t out_width, int64_t kernel_height, int64_t kernel_width,
    int64_t stride_height, int64_t stride_width, int64_t padding_height, int64_t padding_width, int channels_last,
    int dtype, int threads) {
  using namespace normpass;
  const bool last = channels_last != 0;
  Convolution conv{{samples, channels, height, width, last}, {samples, channels, out_height, out_width, last},
                   kernel_height, stride_height, padding_height, padding_width};
  int unknown = 0;
  int status = with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    unknown = mean != nullptr && !std::is_same<S, A>::value;
    if (unknown) return;
    const Entry<A> entry = entry_of<A>(channels, norm_weight, norm_bias, mean, var, eps, {activation, arg0, arg1});
    const S *g = static_cast<const S*>(grad), *from = static_cast<const S*>(x);
    A* to = static_cast<A*>(dweight);
    switch (kernel_width * 10 + stride_width) {
      case 31: return gradient<S, 3, 1>(conv, g, from, entry, to, threads);
      case 32: return gradient<S, 3, 2>(conv, g, from, entry, to, threads);
      case 51: return gradient<S, 5, 1>(conv, g, from, entry, to, threads);
      case 52: return gradient<S, 5, 2>(conv, g, from, entry, to, threads);
      case 71: return gradient<S, 7, 1>(conv, g, from, entry, to, threads);
      case 72: return gradient<S, 7, 2>(conv, g, from, entry, to, threads);
    }
    unknown = 1;
  });
  return status | unknown;
}
