// moments: mean and biased variance of every channel, in one pass.
//
// Values are summed as deviations from the mean of those before them, block by block, and the blocks are merged in
// double with Chan's formula (include/moments.h). The first block is read twice, to have a mean to begin with. So
// nothing cancels: a sum of squares about 0 has a relative error of 0.25 at mean/std = 1000 in float.
#include "layout.h"

namespace normpass {
namespace {

constexpr int64_t patterns_per_block = 128;

// One thread's moments, for every position of a layout's width.
template <class A> struct Partial {
  std::vector<double> count, mean, m2;

  explicit Partial(int64_t width) : count(width, 0.0), mean(width, 0.0), m2(width, 0.0) {}
  void merge(int64_t i, const Moments<double>& other) {
    Moments<double> own;
    own.count = count[i], own.mean = mean[i], own.m2 = m2[i];
    own.merge(other);
    count[i] = own.count, mean[i] = own.mean, m2[i] = own.m2;
  }
};

// --- rows ------------------------------------------------------------------------------------------------------

template <class A> struct RowSums {
  std::vector<A> shift, sum, squares;
  explicit RowSums(int64_t width) : shift(width, A(0)), sum(width, A(0)), squares(width, A(0)) {}

  void add(const A* __restrict values, int64_t n, int64_t position) {
    A* __restrict s = sum.data() + position;
    A* __restrict q = squares.data() + position;
    const A* __restrict about = shift.data() + position;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      A deviation = values[i] - about[i];
      s[i] += deviation;
      q[i] = multiply_add(deviation, deviation, q[i]);
    }
  }
};

// `counts[i]` is how many values position i got in this block: the last pattern may be cut short.
template <class A> void close_block(RowSums<A>& sums, Partial<A>& partial, int64_t whole, int64_t cut) {
  int64_t width = static_cast<int64_t>(sums.shift.size());
  for (int64_t i = 0; i < width; ++i) {
    double count = static_cast<double>(whole + (i < cut));
    if (count > 0)
      partial.merge(i, moments_from_shifted_sums<double>(count, sums.shift[i], sums.sum[i], sums.squares[i]));
    sums.shift[i] = static_cast<A>(partial.mean[i]);
    sums.sum[i] = sums.squares[i] = A(0);
  }
}

template <class S> void sum_rows(const Rows& rows, const S* x, int64_t begin, int64_t end, RowSums<Wide<S>>& sums) {
  alignas(64) Wide<S> widened[tile_size];
  int64_t width = rows.width(), size = rows.layout().size();
  for (int64_t index = begin; index < end; ++index) {
    int64_t start = index * width, length = std::min(width, size - start);
    for (int64_t i = 0; i < length; i += tile_size) {
      int64_t n = std::min(tile_size, length - i);
      sums.add(read_tile(x + start + i, widened, n), n, i);
    }
  }
}

template <class S> Partial<Wide<S>> moments_of_share(const Rows& rows, const S* x, int thread, int threads) {
  using A = Wide<S>;
  int64_t width = rows.width(), size = rows.layout().size();
  int64_t patterns = (size + width - 1) / width, cut = size % width;
  int64_t begin = patterns * thread / threads, end = patterns * (thread + 1) / threads;
  Partial<A> partial(width);
  RowSums<A> sums(width);
  for (int64_t i = begin; i < end; i += patterns_per_block) {
    int64_t stop = std::min(end, i + patterns_per_block);
    bool ends_cut = cut != 0 && stop == patterns;
    int64_t whole = stop - i - ends_cut;
    if (i == begin) {  // the values themselves first, for their rough mean
      sum_rows(rows, x, i, stop, sums);
      for (int64_t p = 0; p < width; ++p) {
        int64_t count = whole + (ends_cut && p < cut);
        sums.shift[p] = count > 0 ? sums.sum[p] / static_cast<A>(count) : A(0);
        sums.sum[p] = sums.squares[p] = A(0);
      }
    }
    sum_rows(rows, x, i, stop, sums);
    close_block(sums, partial, whole, ends_cut ? cut : 0);
  }
  return partial;
}

// --- planes ----------------------------------------------------------------------------------------------------

template <class A> A sum_of(const A* values, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += values[i];
  return sum;
}

template <class A> Moments<double> moments_about(A shift, const A* values, int64_t n) {
  A sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum, squares)
  for (int64_t i = 0; i < n; ++i) {
    A deviation = values[i] - shift;
    sum += deviation;
    squares += deviation * deviation;
  }
  return moments_from_shifted_sums<double>(static_cast<double>(n), shift, sum, squares);
}

template <class S> Partial<Wide<S>> moments_of_share(const Planes& planes, const S* x, int thread, int threads) {
  using A = Wide<S>;
  Partial<A> partial(planes.width());
  planes.tiles(thread, threads, [&](int64_t offset, int64_t n, int64_t channel) {
    alignas(64) A widened[tile_size];
    const A* values = read_tile(x + offset, widened, n);
    bool is_first = partial.count[channel] == 0;
    A shift = is_first ? sum_of(values, n) / static_cast<A>(n) : static_cast<A>(partial.mean[channel]);
    partial.merge(channel, moments_about(shift, values, n));
  });
  return partial;
}

// --- both ------------------------------------------------------------------------------------------------------

template <class S, class Walk> void moments(const Walk& walk, const void* x, void* mean, void* var, int threads) {
  using A = Wide<S>;
  int64_t channels = walk.layout().channels, width = walk.width();
  std::vector<Partial<A>> partials(threads, Partial<A>(0));
#pragma omp parallel num_threads(threads)
  {
    int thread = omp_get_thread_num();
    partials[thread] = moments_of_share(walk, static_cast<const S*>(x), thread, omp_get_num_threads());
  }
  std::vector<Moments<double>> total(channels);
  for (const Partial<A>& partial : partials)
    for (int64_t i = 0; i < (partial.count.empty() ? 0 : width); ++i)
      total[i % channels].merge(partial.count[i], partial.mean[i], partial.m2[i]);
  for (int64_t c = 0; c < channels; ++c) {
    static_cast<A*>(mean)[c] = static_cast<A>(total[c].mean);
    static_cast<A*>(var)[c] = static_cast<A>(total[c].variance());
  }
}

}  // namespace
}  // namespace normpass

NORMPASS_EXPORT int normpass_moments(void* mean, void* var, const void* x, int64_t outer, int64_t channels, int64_t inner,
                                int dtype, int threads) {
  using namespace normpass;
  return with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    with_layout({outer, channels, inner}, [&](const auto& walk) { moments<S>(walk, x, mean, var, threads); });
  });
}
