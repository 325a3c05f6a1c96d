// depthwise_weight_gradient: of a convolution that has a kernel of its own for every channel,
//
//   dweight[c, i, j] = Σ grad[n, c, y, x] · input[n, c, y·stride + i − padding, x·stride + j − padding]
//
// A few channels, as many as a vector holds, are worked on together, row after row of `grad`. The rows of the input
// that it meets lie in a ring, widened, channels innermost and with zeros where the padding is: so both layouts and
// every storage type share one loop, which has no borders. Reads both arrays once; sums a sample in the wide type and
// samples in double.
#include "layout.h"
#include "vector.h"

namespace normpass {
namespace {

struct Depthwise {
  int64_t samples, channels, height, width, out_height, out_width;
  int64_t kernel_height, stride_height, stride_width, padding_height, padding_width;
  bool channels_last;
};

#if defined(__AVX512F__)
constexpr int at_once = 4;  // registers: a row of the kernel, `at_once` of grad, what they meet
#else
constexpr int at_once = 2;
#endif

template <class S> NORMPASS_ALWAYS_INLINE void copy_wide(const S* from, Wide<S>* to, int64_t n) {
  if constexpr (std::is_same<S, Wide<S>>::value) std::memcpy(to, from, n * sizeof(S));
  else widen(from, to, n);
}

// Row y of `count` channels from `channel` on, `width` values each, as [x][lane]; the lanes beyond `count` stay.
template <class S>
void gather_row(const S* from, const Depthwise& d, int64_t height, int64_t width, int64_t sample, int64_t channel,
                int64_t count, int64_t y, Wide<S>* to) {
  using A = Wide<S>;
  constexpr int64_t n = Vector<A>::lanes;
  if (d.channels_last) {
    const S* row = from + ((sample * height + y) * width) * d.channels + channel;
    for (int64_t x = 0; x < width; ++x, row += d.channels) {
      __builtin_prefetch(row + width * d.channels, 0, 2);  // the row below; twice as fast with it
      if (count == n) copy_wide(row, to + x * n, n);
      else copy_wide(row, to + x * n, count);
    }
    return;
  }
  for (int64_t c = 0; c < count; ++c) {
    const S* row = from + ((sample * d.channels + channel + c) * height + y) * width;
    for (int64_t x = 0; x < width; ++x) copy_wide(row + x, to + x * n + c, 1);
  }
}

// One row of the kernel's gradient from one row of `grad` and the row of the input that it meets.
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
void gradient_of_share(const Depthwise& d, const S* grad, const S* input, int64_t begin, int64_t end, double* total) {
  using A = Wide<S>;
  using V = Vector<A>;
  constexpr int64_t n = Vector<A>::lanes;
  const int64_t blocks = (d.channels + n - 1) / n, kernel = d.kernel_height * WIDTH;
  const int64_t columns = (d.out_width + at_once - 1) / at_once * at_once;
  const int64_t pitch = std::max((columns - 1) * STRIDE + WIDTH, d.padding_width + d.width);
  std::vector<V> ring(d.kernel_height * pitch), row(columns), sums(kernel);
  for (int64_t unit = begin; unit < end; ++unit) {
    int64_t sample = unit / blocks, channel = unit % blocks * n, count = std::min(n, d.channels - channel);
    std::fill(ring.begin(), ring.end(), V{});
    std::fill(row.begin(), row.end(), V{});
    std::fill(sums.begin(), sums.end(), V{});
    int64_t next = 0;  // row of the input that has not been gathered yet
    for (int64_t y = 0; y < d.out_height; ++y) {
      const int64_t first = y * d.stride_height - d.padding_height;
      const int64_t stop = std::min(first + d.kernel_height, d.height);
      for (next = std::max(next, first); next < stop; ++next)
        gather_row(input, d, d.height, d.width, sample, channel, count, next,
                   reinterpret_cast<A*>(&ring[next % d.kernel_height * pitch + d.padding_width]));
      gather_row(grad, d, d.out_height, d.out_width, sample, channel, count, y, reinterpret_cast<A*>(row.data()));
      for (int64_t i = std::max<int64_t>(0, -first); i < d.kernel_height && first + i < d.height; ++i)
        add_row<WIDTH, STRIDE, A>(row.data(), &ring[(first + i) % d.kernel_height * pitch], columns, &sums[i * WIDTH]);
    }
    for (int64_t c = 0; c < count; ++c)
      for (int64_t k = 0; k < kernel; ++k) total[(channel + c) * kernel + k] += sums[k].values[c];
  }
}

template <class S, int WIDTH, int STRIDE>
void gradient(const Depthwise& d, const S* grad, const S* input, Wide<S>* dweight, int threads) {
  const int64_t units = d.samples * ((d.channels + Vector<Wide<S>>::lanes - 1) / Vector<Wide<S>>::lanes);
  const int64_t size = d.channels * d.kernel_height * WIDTH;
  std::vector<std::vector<double>> shares(threads, std::vector<double>(size, 0.0));
#pragma omp parallel num_threads(threads)
  {
    int thread = omp_get_thread_num(), all = omp_get_num_threads();
    gradient_of_share<S, WIDTH, STRIDE>(d, grad, input, units * thread / all, units * (thread + 1) / all,
                                        shares[thread].data());
  }
  for (int64_t i = 0; i < size; ++i) {
    double sum = 0;
    for (const std::vector<double>& share : shares) sum += share[i];
    dweight[i] = static_cast<Wide<S>>(sum);
  }
}

}  // namespace
}  // namespace normpass

// Returns 1 for a kernel width or a stride that it has no loop for.
NORMPASS_EXPORT int normpass_depthwise_weight_gradient(
    void* dweight, const void* grad, const void* input, int64_t samples, int64_t channels, int64_t height,
    int64_t width, int64_t out_height, int64_t out_width, int64_t kernel_height, int64_t kernel_width,
    int64_t stride_height, int64_t stride_width, int64_t padding_height, int64_t padding_width, int channels_last,
    int dtype, int threads) {
  using namespace normpass;
  Depthwise d{samples, channels, height, width, out_height, out_width, kernel_height, stride_height, stride_width,
              padding_height, padding_width, channels_last != 0};
  int unknown = 0;
  int status = with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    const S* g = static_cast<const S*>(grad);
    const S* x = static_cast<const S*>(input);
    Wide<S>* to = static_cast<Wide<S>*>(dweight);
    switch (kernel_width * 10 + stride_width) {
      case 51: return gradient<S, 5, 1>(d, g, x, to, threads);
      case 52: return gradient<S, 5, 2>(d, g, x, to, threads);
      case 71: return gradient<S, 7, 1>(d, g, x, to, threads);
      case 72: return gradient<S, 7, 2>(d, g, x, to, threads);
    }
    unknown = 1;
  });
  return status | unknown;
}
