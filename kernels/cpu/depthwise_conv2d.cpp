// depthwise_conv2d: y[n, c, i, j] = Σ z[n, c, i·stride + p − padding, j·stride + q − padding] · weight[c, p, q] + bias[c],
// where z is x or act(norm(x)), which is never written; and the gradient of z, which is the transposed convolution.
//
// Both are sums over rows in the ring, in columns over a run of consecutive pixels: of the transposed convolution with
// stride s the columns j, j + s, … have kernels of their own, every s-th column of the kernel in reverse.
#include "depthwise.h"

namespace normpass {
namespace {

constexpr int64_t fewest_units = 4;  // for a thread; where there are fewer, the rows of a sample are shared

struct Convolution {
  Images from, to;
  int64_t kernel_height, kernel_width, stride_height, stride_width, padding_height, padding_width;
  bool transposed;
};

// The columns of the result that one kernel makes: every `step`-th, from `first` on.
struct Columns {
  int64_t first, step, count;  // of the result
  int64_t begin;               // the pixel that the first one meets first, from the sample's left edge on
  int64_t width;               // of the kernel
};

std::vector<Columns> columns_of(const Convolution& conv) {
  if (!conv.transposed) return {{0, 1, conv.to.width, -conv.padding_width, conv.kernel_width}};
  std::vector<Columns> all;
  const int64_t stride = conv.stride_width;
  for (int64_t first = 0; first < std::min(stride, conv.to.width); ++first) {
    const int64_t last = (first + conv.padding_width) % stride;  // column of the kernel that comes last
    const int64_t width = (conv.kernel_width - last + stride - 1) / stride;
    const int64_t count = (conv.to.width - first + stride - 1) / stride;
    all.push_back({first, stride, count, (first + conv.padding_width - last) / stride - (width - 1), width});
  }
  return all;
}

int64_t total_width(const std::vector<Columns>& columns) {  // that of the kernel, if every column of it is met
  int64_t width = 0;
  for (const Columns& c : columns) width += c.width;
  return width;
}

// The kernel's rows that meet a row of the result, and the rows that they meet.
struct Meeting {
  int64_t first, step;  // rows of the kernel: first, first + step, …
  int64_t count;
  int64_t row, row_step;
};

Meeting meeting_of(const Convolution& conv, int64_t y) {
  const int64_t kernel = conv.kernel_height, stride = conv.stride_height, height = conv.from.height;
  int64_t first, step, row, row_step;
  if (conv.transposed) {
    first = (y + conv.padding_height) % stride, step = stride;
    row = (y + conv.padding_height) / stride, row_step = -1;
    if (row >= height) first += (row - height + 1) * stride, row = height - 1;
  } else {
    first = std::max<int64_t>(0, conv.padding_height - y * stride), step = 1;
    row = y * stride - conv.padding_height + first, row_step = 1;
  }
  const int64_t of_kernel = first < kernel ? (kernel - first + step - 1) / step : 0;
  const int64_t of_rows = row_step > 0 ? height - row : row + 1;
  return {first, step, std::max<int64_t>(0, std::min(of_kernel, of_rows)), row, row_step};
}

// The rows that a row of the result meets: places in the ring, and the kernel's rows, `step` vectors apart.
template <class A> struct Rows {
  const Vector<A>* pixels;
  const int64_t* offsets;
  const Vector<A>* kernel;
  int64_t step, count;
};

// Where n pixels of the result lie, `step` values apart.
template <class A> struct Result {
  A* values;
  int64_t step, n, lanes;
  bool streamed;
};

// AT_ONCE pixels at a time, their sums in registers.
template <int AT_ONCE, int WIDTH, int STRIDE, class A>
void convolve_row(const Rows<A>& rows, const Vector<A>& bias, const Result<A>& to) {
  using V = Vector<A>;
  for (int64_t x = 0; x < to.n; x += AT_ONCE) {
    V sum[AT_ONCE];
#pragma GCC unroll 8
    for (int i = 0; i < AT_ONCE; ++i) sum[i] = bias;
    const V* kernel = rows.kernel;
    for (int64_t r = 0; r < rows.count; ++r, kernel += rows.step) {
      const V* met = rows.pixels + rows.offsets[r] + x * STRIDE;
#pragma GCC unroll 8
      for (int j = 0; j < WIDTH; ++j)
#pragma GCC unroll 8
        for (int i = 0; i < AT_ONCE; ++i) sum[i].add_product(met[i * STRIDE + j], kernel[j]);
    }
    A* pixel = to.values + x * to.step;
    if (x + AT_ONCE <= to.n && to.lanes == V::lanes) {
      if (to.streamed)
#pragma GCC unroll 8
        for (int i = 0; i < AT_ONCE; ++i) sum[i].stream(pixel + i * to.step);
      else
#pragma GCC unroll 8
        for (int i = 0; i < AT_ONCE; ++i) sum[i].store(pixel + i * to.step);
    } else {
      for (int64_t i = 0; i < std::min<int64_t>(AT_ONCE, to.n - x); ++i) {
        if (to.lanes < V::lanes) sum[i].store_some(pixel + i * to.step, to.lanes);
        else sum[i].store(pixel + i * to.step);
      }
    }
  }
}

template <class A> using RowFunction = decltype(&convolve_row<7, 3, 1, A>);

template <int AT_ONCE, class A> RowFunction<A> row_function(int64_t width, int64_t stride) {
  switch (width * 10 + stride) {
    case 11: return convolve_row<AT_ONCE, 1, 1, A>;
    case 21: return convolve_row<AT_ONCE, 2, 1, A>;
    case 31: return convolve_row<AT_ONCE, 3, 1, A>;
    case 41: return convolve_row<AT_ONCE, 4, 1, A>;
    case 51: return convolve_row<AT_ONCE, 5, 1, A>;
    case 71: return convolve_row<AT_ONCE, 7, 1, A>;
    case 32: return convolve_row<AT_ONCE, 3, 2, A>;
    case 52: return convolve_row<AT_ONCE, 5, 2, A>;
    case 72: return convolve_row<AT_ONCE, 7, 2, A>;
  }
  return nullptr;
}

// The kernels of every vector of channels: [vector][columns][row][column][lane].
template <class A>
Values<Vector<A>> pack(const Convolution& conv, const std::vector<Columns>& columns, const A* weight) {
  constexpr int64_t n = Vector<A>::lanes;
  const int64_t size = conv.kernel_height * conv.kernel_width, channels = conv.from.channels;
  Values<Vector<A>> packed((channels + n - 1) / n * conv.kernel_height * total_width(columns), Vector<A>{});
  A* to = reinterpret_cast<A*>(packed.data());
  for (int64_t first = 0; first < channels; first += n)
    for (const Columns& c : columns)
      for (int64_t i = 0; i < conv.kernel_height; ++i)
        for (int64_t j = 0; j < c.width; ++j, to += n) {
          const int64_t last = conv.transposed ? (c.first + conv.padding_width) % conv.stride_width : 0;
          const int64_t column = conv.transposed ? last + (c.width - 1 - j) * conv.stride_width : j;
          for (int64_t lane = 0; lane < std::min(n, channels - first); ++lane)
            to[lane] = weight[(first + lane) * size + i * conv.kernel_width + column];
        }
  return packed;
}

template <class A>
int convolve(const Convolution& conv, A* y, const A* x, const A* weight, const A* bias, const Entry<A>& entry,
             int threads) {
  using V = Vector<A>;
  const std::vector<Columns> columns = columns_of(conv);
  const int64_t stride = conv.transposed ? 1 : conv.stride_width, channels = conv.from.channels;
  std::vector<RowFunction<A>> functions;
  int64_t before = 0, end = conv.from.width;
  for (const Columns& c : columns) {
    const int64_t sevens = round_up(c.count, 7), eights = round_up(c.count, 8);  // sizes of images are multiples of either
    functions.push_back(sevens < eights ? row_function<7, A>(c.width, stride) : row_function<8, A>(c.width, stride));
    if (functions.back() == nullptr) return 1;
    before = std::max(before, -c.begin);
    end = std::max(end, c.begin + (std::min(sevens, eights) - 1) * stride + c.width);
  }
  const Values<V> kernels = pack(conv, columns, weight);
  const int64_t size = conv.kernel_height * total_width(columns), vectors = vectors_at_once<A>(conv.from, threads);
  const int64_t block = vectors * V::lanes;
  const int64_t blocks = (channels + block - 1) / block, bands =
      std::min(conv.to.height, (fewest_units * threads - 1) / (blocks * conv.from.samples) + 1);
  const int64_t units = conv.from.samples * blocks * bands;
  const bool streamed = static_cast<int64_t>(sizeof(A)) * conv.to.samples * channels * conv.to.height * conv.to.width >=
                        streamed_from && channels % V::lanes == 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0;
#pragma omp parallel num_threads(threads)
  {
    Ring<A> ring(conv.from, conv.kernel_height, before, before + end, vectors);
    std::vector<int64_t> offsets(conv.kernel_height * columns.size());
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t unit = units * thread / team; unit < units * (thread + 1) / team; ++unit) {
      const int64_t sample = unit / (blocks * bands), channel = unit / bands % blocks * block, band = unit % bands;
      const int64_t count = std::min(block, channels - channel);
      const int64_t first = conv.to.height * band / bands, stop = conv.to.height * (band + 1) / bands;
      ring.begin(x, sample, channel, count);
      for (int64_t row = first; row < stop; ++row) {
        const Meeting m = meeting_of(conv, row);
        const int64_t last = m.row + (m.count - 1) * m.row_step;
        if (m.count > 0) ring.advance(std::min(m.row, last), std::max(m.row, last) + 1, entry);
        for (size_t k = 0; k < columns.size(); ++k)
          for (int64_t i = 0; i < m.count; ++i)
            offsets[k * conv.kernel_height + i] = ring.offset(m.row + i * m.row_step) + before + columns[k].begin;
        for (int64_t c = 0; c < count; c += V::lanes) {
          const int64_t lanes = std::min(V::lanes, count - c);
          V shift{};
          if (bias != nullptr)
            shift = lanes == V::lanes ? V::load(bias + channel + c) : V::load_some(bias + channel + c, lanes);
          const V* kernel = &kernels[(channel + c) / V::lanes * size];
          A* to = y + (sample * conv.to.height + row) * conv.to.width * channels + channel + c;
          for (size_t k = 0; k < columns.size(); kernel += conv.kernel_height * columns[k].width, ++k) {
            const Columns& part = columns[k];
            const Rows<A> rows{ring.pixels(c / V::lanes), &offsets[k * conv.kernel_height], kernel + m.first * part.width,
                               m.step * part.width, m.count};
            functions[k](rows, shift, {to + part.first * channels, part.step * channels, part.count, lanes, streamed});
          }
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
