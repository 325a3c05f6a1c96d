// The rows of a depthwise convolution, transposed or not: sums over the rows in a ring, each with a row of the kernel, in
// columns over a run of consecutive pixels. Of the transposed convolution with stride s the columns j, j + s, … have
// kernels of their own, every s-th column of the kernel in reverse.
#pragma once

#include "depthwise.h"

namespace normpass {

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

inline std::vector<Columns> columns_of(const Convolution& conv) {
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

inline int64_t total_width(const std::vector<Columns>& columns) {  // that of the kernel, if every column of it is met
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

inline Meeting meeting_of(const Convolution& conv, int64_t y) {
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
template <class A> struct MetRows {
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
void convolve_row(const MetRows<A>& rows, const Vector<A>& bias, const Result<A>& to) {
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

// A convolution with its weight. Where it has no loop for a width or a stride, `has_loops` is false.
template <class A> class RowConvolution {
 public:
  using V = Vector<A>;
  RowConvolution(const Convolution& conv, const A* weight)
      : conv_(conv), columns_(columns_of(conv)), kernels_(pack(conv, columns_, weight)), end_(conv.from.width) {
    const int64_t stride = conv.transposed ? 1 : conv.stride_width;
    for (const Columns& c : columns_) {
      const int64_t sevens = round_up(c.count, 7), eights = round_up(c.count, 8);  // images are multiples of either
      functions_.push_back(sevens < eights ? row_function<7, A>(c.width, stride) : row_function<8, A>(c.width, stride));
      before_ = std::max(before_, -c.begin);
      end_ = std::max(end_, c.begin + (std::min(sevens, eights) - 1) * stride + c.width);
    }
  }
  bool has_loops() const { return std::find(functions_.begin(), functions_.end(), nullptr) == functions_.end(); }
  // `columns`: that there are at least, with zeros behind the image.
  Ring<A> ring(int64_t rows, int64_t vectors, int64_t columns = 0) const {
    return {conv_.from, rows, before_, before_ + std::max(end_, columns), vectors};
  }

  // Where the rows that row y of the result meets lie in the ring.
  struct Place {
    Meeting meeting;
    std::vector<int64_t> offsets;
    int64_t first_row() const { return std::min(meeting.row, last()); }
    int64_t end_row() const { return std::max(meeting.row, last()) + 1; }

   private:
    int64_t last() const { return meeting.row + std::max<int64_t>(0, meeting.count - 1) * meeting.row_step; }
  };
  void find(int64_t y, const Ring<A>& ring, Place& place) const {
    const Meeting& m = place.meeting = meeting_of(conv_, y);
    place.offsets.resize(conv_.kernel_height * columns_.size());
    for (size_t k = 0; k < columns_.size(); ++k)
      for (int64_t i = 0; i < m.count; ++i)
        place.offsets[k * conv_.kernel_height + i] =
            ring.offset(m.row + i * m.row_step) + before_ + columns_[k].begin;
  }

  // That row of the result, of the channels from `channel` on, which lie in the ring's vector `vector`; the result's
  // pixels `step` values apart.
  void row(const Ring<A>& ring, const Place& place, int64_t vector, int64_t channel, const V& bias, A* to, int64_t step,
           int64_t lanes, bool streamed) const {
    const Meeting& m = place.meeting;
    const V* kernel = &kernels_[channel / V::lanes * conv_.kernel_height * total_width(columns_)];
    for (size_t k = 0; k < columns_.size(); kernel += conv_.kernel_height * columns_[k].width, ++k) {
      const Columns& part = columns_[k];
      const MetRows<A> rows{ring.pixels(vector), &place.offsets[k * conv_.kernel_height], kernel + m.first * part.width,
                         m.step * part.width, m.count};
      functions_[k](rows, bias, {to + part.first * step, part.step * step, part.count, lanes, streamed});
    }
  }

 private:
  Convolution conv_;
  std::vector<Columns> columns_;
  Values<V> kernels_;
  std::vector<RowFunction<A>> functions_;
  int64_t before_ = 0, end_;
};

}  // namespace normpass
