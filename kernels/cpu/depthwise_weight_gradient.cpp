// depthwise_weight_gradient: dweight[c, i, j] = Σ grad[n, c, y, x] · x[n, c, y·stride + i − padding, x·stride + j − padding]
//
// Row after row of `grad` with the rows of x that it meets. Reads both arrays once; sums a sample in the wide type and
// samples in double.
#include "depthwise_gradient.h"

namespace normpass {
namespace {

struct Gradient {
  Images x, grad;
  int64_t kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width;
};

template <class S>
void gradient_of_share(const Gradient& of, const S* grad, const S* x, int64_t vectors,
                       AddRow<Wide<S>> add, int64_t begin, int64_t end, double* total) {
  using V = Vector<Wide<S>>;
  const int64_t block = vectors * V::lanes, blocks = (of.x.channels + block - 1) / block;
  const int64_t kernel = of.kernel_height * of.kernel_width, columns = round_up(of.grad.width, gradients_at_once);
  const int64_t pitch = std::max((columns - 1) * of.stride_width + of.kernel_width, of.padding_width + of.x.width);
  Ring<S> inputs(of.x, of.kernel_height, of.padding_width, pitch, vectors), gradients(of.grad, 1, 0, columns, vectors);
  Values<V> sums(vectors * kernel);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t sample = unit / blocks, channel = unit % blocks * block;
    const int64_t count = std::min(block, of.x.channels - channel);
    inputs.begin(x, sample, channel, count), gradients.begin(grad, sample, channel, count);
    std::fill(sums.begin(), sums.end(), V{});
    for (int64_t y = 0; y < of.grad.height; ++y) {
      const int64_t row = y * of.stride_height - of.padding_height;
      const int64_t first = std::max<int64_t>(0, -row), stop = std::min(of.kernel_height, of.x.height - row);
      if (first >= stop) continue;
      inputs.advance(row + first, row + stop, Entry<Wide<S>>{}), gradients.advance(y, y + 1, Entry<Wide<S>>{});
      for (int64_t v = 0; v * V::lanes < count; ++v) {
        for (int64_t i = first; i < stop; ++i)
          add(gradients.pixels(v), inputs.pixels(v) + inputs.offset(row + i), columns,
              &sums[v * kernel + i * of.kernel_width]);
      }
    }
    add_lanes(sums, kernel, count, total + channel * kernel);
  }
}

template <class S>
int gradient(const Gradient& of, const S* grad, const S* x, Wide<S>* dweight, int threads) {
  const AddRow<Wide<S>> add = add_row_function<Wide<S>>(of.kernel_width, of.stride_width);
  if (add == nullptr) return 1;
  const int64_t vectors = vectors_at_once<Wide<S>>(of.x, threads), block = vectors * Vector<Wide<S>>::lanes;
  const int64_t units = of.x.samples * ((of.x.channels + block - 1) / block);
  const int64_t size = of.x.channels * of.kernel_height * of.kernel_width;
  std::vector<std::vector<double>> shares(threads, std::vector<double>(size, 0.0));
#pragma omp parallel num_threads(threads)
  {
    int thread = omp_get_thread_num(), all = omp_get_num_threads();
    gradient_of_share(of, grad, x, vectors, add, units * thread / all, units * (thread + 1) / all,
                      shares[thread].data());
  }
  add_shares(shares, dweight);
  return 0;
}

}  // namespace
}  // namespace normpass

// Returns 1 for a kernel width, a stride or a type that it has no loop for.
NORMPASS_EXPORT int normpass_depthwise_weight_gradient(
    void* dweight, const void* grad, const void* x, int64_t samples, int64_t channels, int64_t height, int64_t width, int64_t out_height, int64_t out_width, int64_t kernel_height, int64_t kernel_width,
    int64_t stride_height, int64_t stride_width, int64_t padding_height, int64_t padding_width, int channels_last,
    int dtype, int threads) {
  using namespace normpass;
  const bool last = channels_last != 0;
  const Gradient of{{samples, channels, height, width, last}, {samples, channels, out_height, out_width, last},
                    kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width};
  int unknown = 0;
  int status = with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    unknown = gradient(of, static_cast<const S*>(grad), static_cast<const S*>(x), static_cast<Wide<S>*>(dweight), threads);
  });
  return status | unknown;
}
