// norm_act_depthwise_backward: of y = conv(z), z = act(norm(x)), where conv has a kernel of its own for every channel and z
// was never written. With c = x − mean and r = 1/sqrt(var + eps):
//
//   dz = convᵀ(grad)      dy = dz·act'(c·a + bias)      dweight = r·Σdy·c      dbias = Σdy
//   dx = a·dy − (a·r²/m)·(Σdy·c)·c − (a/m)·Σdy      (batch statistics)      dx = a·dy      (running statistics)
//
// and the gradient of the convolution's weight, from z and grad. Two passes, of which the first computes dz, z and all
// sums, row by row, and the second writes dx. It computes dz and dy again, or, where these cost more than their way to
// memory and back, reads the dy that the first has written where dx will be.
#include "depthwise_gradient.h"
#include "depthwise_rows.h"
#include "from_input.h"

namespace normpass {
namespace {

template <class A> struct Norm {
  const A *weight, *bias, *mean, *var;
  double eps;
  Affine<A> affine(int64_t width, int64_t channels) const { return {width, channels, weight, bias, mean, var, eps}; }
};

// Of one vector of channels.
template <class A> struct PerLane : VectorChannels<A> {
  static constexpr int64_t n = lanes<A>;
  alignas(64) A by_centred[n], constant[n];

  PerLane(const Affine<A>& affine, int64_t channel) : VectorChannels<A>(affine, channel) {}
  PerLane(const Affine<A>& affine, const Coefficients<A>& coefficients, int64_t channel) : PerLane(affine, channel) {
    std::memcpy(by_centred, coefficients.by_centred.data() + channel, sizeof(by_centred));
    std::memcpy(constant, coefficients.constant.data() + channel, sizeof(constant));
  }
};

// Makes z of x and dy of dz, in place, and adds Σdy and Σdy·c to the totals.
template <class A>
void first_pass(A* x, A* dz, int64_t count, const PerLane<A>& at, double* dy_total, double* centred_total,
                const Ahead<A>& next_x, const Ahead<A>& next_grad, const Activated<A>& activated) {
  alignas(64) A dy_sums[line<A>] = {}, centred_sums[line<A>] = {};
  activated.both({x, nullptr, dz, x, at.mean, at.scale, at.shift, 0, count * lanes<A>, next_x.pixel, next_grad.pixel,
                  next_x.step, next_grad.step, dz, dy_sums, centred_sums});
  for (int64_t i = 0; i < line<A>; ++i) {
    dy_total[i % lanes<A>] += dy_sums[i];
    centred_total[i % lanes<A>] += centred_sums[i];
  }
}

// dx of some pixels, in place of x. THROUGH: the statistics.
template <bool THROUGH, class A>
NORMPASS_SHARED void second_pass(A* x, const A* dy, int64_t count, const PerLane<A>& at, const Ahead<A>& next_x,
                                 const Ahead<A>& next_grad) {
  constexpr int64_t n = lanes<A>;
  for (int64_t p = 0; p < count * n; p += n) {
    next_x.prefetch(p / n), next_grad.prefetch(p / n);
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = 0; i < n; ++i) {
      A rest = 0;
      if constexpr (THROUGH) rest = multiply_add(at.by_centred[i], x[p + i] - at.mean[i], at.constant[i]);
      x[p + i] = multiply_add(at.scale[i], dy[p + i], rest);
    }
  }
}

// The pixels of one vector of channels to their places, `step` values apart.
template <class A>
void store_pixels(const A* pixels, int64_t count, A* to, int64_t step, int64_t lanes, bool streamed) {
  using V = Vector<A>;
  for (int64_t p = 0; p < count; ++p, to += step) {
    const V value = V::load(pixels + p * V::lanes);
    if (lanes < V::lanes) value.store_some(to, lanes);
    else if (streamed) value.stream(to);
    else value.store(to);
  }
}

template <class A> struct Backward {
  using V = Vector<A>;
  const Convolution& conv;  // transposed: from grad to dz
  const RowConvolution<A>& rows;
  const Affine<A>& affine;
  Activated<A> activated;
  const A *grad, *x;
  int threads;

  int64_t vectors = vectors_at_once<A>(conv.to, threads), block = vectors * V::lanes;
  int64_t blocks = (conv.to.channels + block - 1) / block, units = conv.to.samples * blocks;

  // Calls f(begin, end, thread) for a thread's units, each `block` channels of a sample.
  template <class F> void share(F f) const {
#pragma omp parallel num_threads(threads)
    {
      const int thread = omp_get_thread_num(), all = omp_get_num_threads();
      f(units * thread / all, units * (thread + 1) / all, thread);
    }
  }

  // The sums of one thread's units, and with `add` those of the weight's gradient.
  // `kept`: where dy is written to, or null.
  void first(int64_t begin, int64_t end, AddRow<A> add, A* kept, Sums& sums, double* weight_sums) const {
    const bool streamed = is_streamed(conv.to, kept);
    const Images &images = conv.to, &of_grad = conv.from;
    const int64_t height = conv.kernel_height, width = conv.kernel_width, kernel = height * width;
    const int64_t columns = round_up(of_grad.width, gradients_at_once);
    const int64_t pitch = std::max((columns - 1) * conv.stride_width + width, conv.padding_width + images.width);
    Ring<A> gradients = rows.ring(height + 1, vectors, columns);
    Ring<A> inputs(images, height, conv.padding_width, pitch, vectors);
    typename RowConvolution<A>::Place place;
    Values<A> dz(images.width * V::lanes);
    Values<V> kernel_sums(vectors * kernel);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / blocks, channel = unit % blocks * block;
      const int64_t count = std::min(block, images.channels - channel);
      gradients.begin(grad, sample, channel, count), inputs.begin(x, sample, channel, count);
      std::fill(kernel_sums.begin(), kernel_sums.end(), V{});
      int64_t next = 0;  // row of grad whose rows of z are not complete yet
      for (int64_t row = 0; row < images.height; ++row) {
        rows.find(row, gradients, place);
        gradients.advance(0, (row + conv.padding_height) / conv.stride_height + 1);
        inputs.advance(row, row + 1);
        int64_t stop = next;
        while (stop < of_grad.height &&
               std::min(stop * conv.stride_height - conv.padding_height + height, images.height) <= row + 1)
          ++stop;
        for (int64_t v = 0, c = 0; c < count; ++v, c += V::lanes) {
          const Ahead<A> next_x = inputs.ahead(v), next_grad = gradients.ahead(v);
          rows.row(gradients, place, v, channel + c, V{}, dz.data(), V::lanes, V::lanes, false);
          const PerLane<A> at(affine, channel + c);
          first_pass(inputs.row(v, row), dz.data(), images.width, at, &sums.dy[channel + c],
                     &sums.dy_centred[channel + c], next_x, next_grad, activated);
          if (kept != nullptr) {
            A* to = kept + (sample * images.height + row) * images.width * images.channels + channel + c;
            store_pixels(dz.data(), images.width, to, images.channels, std::min(V::lanes, count - c), streamed);
          }
          for (int64_t y = next; add != nullptr && y < stop; ++y) {
            const int64_t top = y * conv.stride_height - conv.padding_height;
            for (int64_t i = std::max<int64_t>(0, -top); i < std::min(height, images.height - top); ++i)
              add(gradients.first_pixel(v, y), inputs.pixels(v) + inputs.offset(top + i), columns,
                  &kernel_sums[v * kernel + i * width]);
          }
        }
        next = stop;
      }
      if (add != nullptr) add_lanes(kernel_sums, kernel, count, weight_sums + channel * kernel);
    }
    if (streamed) end_of_stream();
  }

  // dx of one thread's units.
  void second(int64_t begin, int64_t end, const Coefficients<A>& coefficients, A* dx) const {
    const Images& images = conv.to;
    const bool streamed = is_streamed(images, dx);
    Ring<A> gradients = rows.ring(conv.kernel_height, vectors), inputs(images, 1, 0, images.width, vectors);
    typename RowConvolution<A>::Place place;
    Values<A> dz(images.width * V::lanes);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t sample = unit / blocks, channel = unit % blocks * block;
      const int64_t count = std::min(block, images.channels - channel);
      gradients.begin(grad, sample, channel, count), inputs.begin(x, sample, channel, count);
      for (int64_t row = 0; row < images.height; ++row) {
        rows.find(row, gradients, place);
        if (place.meeting.count > 0) gradients.advance(place.first_row(), place.end_row());
        inputs.advance(row, row + 1);
        A* to = dx + (sample * images.height + row) * images.width * images.channels + channel;
        for (int64_t v = 0, c = 0; c < count; ++v, c += V::lanes) {
          const int64_t lanes = std::min(V::lanes, count - c);
          const Ahead<A> next_x = inputs.ahead(v), next_grad = gradients.ahead(v);
          rows.row(gradients, place, v, channel + c, V{}, dz.data(), V::lanes, V::lanes, false);
          const PerLane<A> at(affine, coefficients, channel + c);
          A* pixels = inputs.row(v, row);
          activated.gradient({pixels, nullptr, dz.data(), dz.data(), at.mean, at.scale, at.shift, 0,
                              images.width * V::lanes, pixels, dz.data()});
          if (coefficients.through) second_pass<true>(pixels, dz.data(), images.width, at, next_x, next_grad);
          else second_pass<false>(pixels, dz.data(), images.width, at, next_x, next_grad);
          store_pixels(pixels, images.width, to + c, images.channels, lanes, streamed);
        }
      }
    }
    if (streamed) end_of_stream();
  }
};

template <class A> struct Results {
  A *dx, *dnorm_weight, *dnorm_bias, *dweight;
};

template <class A>
int backward(const Convolution& conv, const Results<A>& to, const A* grad, const A* x, const A* weight, const Norm<A>& norm,
             bool batch_statistics, const ActivationCall& activation, int threads) {
  const int64_t channels = conv.to.channels, kernel = conv.kernel_height * conv.kernel_width;
  const Affine<A> affine = norm.affine(round_up(channels, Vector<A>::lanes), channels);
  const RowConvolution<A> rows(conv, weight);
  const AddRow<A> add = add_row_function<A>(conv.kernel_width, conv.stride_width);
  if (!rows.has_loops() || add == nullptr) return 1;
  const Backward<A> pass{conv, rows, affine, Activated<A>(activation), grad, x, threads};
  const bool through = to.dx != nullptr && batch_statistics;
  const bool first = to.dnorm_weight != nullptr || to.dnorm_bias != nullptr || to.dweight != nullptr || through;
  const bool keeps = first && to.dx != nullptr && (pass.activated.is_costly() || !is_streamed(conv.to, to.dx));
  const size_t all = affine.mean.size();
  Sums total(all);
  if (first) {
    std::vector<Sums> shares(threads, Sums(all));
    std::vector<std::vector<double>> weights(threads, std::vector<double>(to.dweight == nullptr ? 0 : channels * kernel));
    pass.share([&](int64_t begin, int64_t end, int thread) {
      pass.first(begin, end, to.dweight == nullptr ? nullptr : add, keeps ? to.dx : nullptr, shares[thread],
                 weights[thread].data());
    });
    for (const Sums& share : shares)
      for (size_t c = 0; c < all; ++c) total.dy[c] += share.dy[c], total.dy_centred[c] += share.dy_centred[c];
    if (to.dweight != nullptr) add_shares(weights, to.dweight);
  }
  if (to.dx != nullptr) {
    const Sums* sums = batch_statistics ? &total : nullptr;
    const Layout layout{conv.to.samples * conv.to.height * conv.to.width, channels, 1};
    if (keeps) {
      const Rows walk(layout);
      const Affine<A> spread = norm.affine(walk.width(), channels);
      const FromInput<A> source{nullptr, x, nullptr, to.dx, spread, Activated<A>(activation), false};
      apply<A>(walk, source, coefficients_of(spread, norm.var, norm.eps, sums, layout), to.dx, is_streamed<A>(layout), threads);
    } else {
      const Coefficients<A> coefficients = coefficients_of(affine, norm.var, norm.eps, sums, layout);
      pass.share([&](int64_t begin, int64_t end, int) { pass.second(begin, end, coefficients, to.dx); });
    }
  }
  for (int64_t c = 0; c < channels; ++c) {
    if (to.dnorm_bias != nullptr) to.dnorm_bias[c] = static_cast<A>(total.dy[c]);
    if (to.dnorm_weight != nullptr)
      to.dnorm_weight[c] = static_cast<A>(total.dy_centred[c] / std::sqrt(static_cast<double>(norm.var[c]) + norm.eps));
  }
  return 0;
}

}  // namespace
}  // namespace normpass

// x and dx (samples, channels, height, width), grad (samples, channels, out_height, out_width), channels_last; what is
// null is not needed. Returns 1 for a type, a kernel width or a stride that it has no loop for.
NORMPASS_EXPORT int normpass_norm_act_depthwise_backward(
    void* dx, void* dnorm_weight, void* dnorm_bias, void* dweight, const void* grad, const void* x, const void* weight,
    const void* norm_weight, const void* norm_bias, const void* mean, const void* var, double eps, int batch_statistics,
    int activation, double arg0, double arg1, int64_t samples, int64_t channels, int64_t height, int64_t width,
    int64_t out_height, int64_t out_width, int64_t kernel_height, int64_t kernel_width, int64_t stride_height,
    int64_t stride_width, int64_t padding_height, int64_t padding_width, int dtype, int threads) {
  using namespace normpass;
  const Convolution conv{{samples, channels, out_height, out_width, true}, {samples, channels, height, width, true},
                         kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width, true};
  int unknown = 0;
  int status = with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    if constexpr (std::is_same<S, Wide<S>>::value) {
      const Results<S> to{static_cast<S*>(dx), static_cast<S*>(dnorm_weight), static_cast<S*>(dnorm_bias),
                          static_cast<S*>(dweight)};
      const Norm<S> norm{static_cast<const S*>(norm_weight), static_cast<const S*>(norm_bias),
                         static_cast<const S*>(mean), static_cast<const S*>(var), eps};
      unknown = backward<S>(conv, to, static_cast<const S*>(grad), static_cast<const S*>(x),
                            static_cast<const S*>(weight), norm, batch_statistics != 0, {activation, arg0, arg1},
                            threads);
    } else {
      unknown = 1;
    }
  });
  return status | unknown;
}
