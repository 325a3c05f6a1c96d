// The moments of the channels of one share of a tensor, in one pass.
//
// Values are summed as deviations from the mean of those before them, block by block, and the blocks are merged in
// double with Chan's formula (include/moments.h). A few values are read twice, to have a mean to begin with. So
// nothing cancels: a sum of squares about 0 has a relative error of 0.25 at mean/std = 1000 in float.
#pragma once

#include "layout.h"

namespace normpass {

template <class S> const Wide<S>* read_values(const S* from, Wide<S>* buffer, int64_t n) {
  return read_tile(from, 0, buffer, {0, n, 0}).values;
}

// --- rows ------------------------------------------------------------------------------------------------------

constexpr int64_t patterns_to_begin_with = 16, patterns_per_block = 128, patterns_at_once = 4;

// The sums of a block, and the moments of the blocks before it, for every position of a pattern.
template <class A> struct RowMoments {
  double count = 0;
  Values<A> shift, sum, squares;
  std::vector<double> mean, m2;

  explicit RowMoments(int64_t width) : shift(width), sum(width), squares(width), mean(width), m2(width) {}

  // `ahead`: from these patterns to those that come next.
  template <int PATTERNS>
  void add(const A* const (&values)[PATTERNS], int64_t n, int64_t position, int64_t ahead) {
    int64_t i = 0;
    for (; i + line<A> <= n; i += line<A>) {
#pragma GCC unroll 4
      for (int p = 0; p < PATTERNS; ++p) __builtin_prefetch(values[p] + i + ahead, 0, 2);
      add_some(values, line<A>, i, position + i);
    }
    add_some(values, n - i, i, position + i);
  }

  template <int PATTERNS>
  NORMPASS_ALWAYS_INLINE void add_some(const A* const (&values)[PATTERNS], int64_t n, int64_t begin, int64_t position) {
    A* s = sum.data() + position;
    A* q = squares.data() + position;
    const A* about = shift.data() + position;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      A deviations = 0, products = 0;
#pragma GCC unroll 4
      for (int p = 0; p < PATTERNS; ++p) {
        A deviation = values[p][begin + i] - about[i];
        deviations += deviation;
        products = multiply_add(deviation, deviation, products);
      }
      s[i] += deviations;
      q[i] += products;
    }
  }

  void begin(int64_t patterns) {
    for (size_t i = 0; i < shift.size(); ++i) shift[i] = sum[i] / static_cast<A>(patterns);
    std::fill(sum.begin(), sum.end(), A(0));
    std::fill(squares.begin(), squares.end(), A(0));
  }

  void close_block(int64_t patterns) {
    double n = static_cast<double>(patterns);
    for (size_t i = 0; i < shift.size(); ++i) {
      Moments<double> before;
      before.count = count, before.mean = mean[i], before.m2 = m2[i];
      before.merge(moments_from_shifted_sums<double>(n, shift[i], sum[i], squares[i]));
      mean[i] = before.mean, m2[i] = before.m2;
      shift[i] = static_cast<A>(before.mean);
      sum[i] = squares[i] = A(0);
    }
    count += n;
  }
};

template <class S, int PATTERNS>
void add_patterns(const S* from, int64_t width, RowMoments<Wide<S>>& moments) {
  using A = Wide<S>;
  constexpr bool is_widened = !std::is_same<S, A>::value;
  alignas(64) A widened[PATTERNS][tile_size];
  for (int64_t i = 0; i < width; i += tile_size) {
    int64_t n = std::min(tile_size, width - i);
    const A* values[PATTERNS];
    for (int p = 0; p < PATTERNS; ++p) values[p] = read_values(from + p * width + i, widened[p], n);
    moments.add(values, n, i, is_widened ? 0 : PATTERNS * width);
  }
}

template <class S>
void sum_patterns(const S* x, int64_t width, int64_t begin, int64_t end, RowMoments<Wide<S>>& moments) {
  int64_t i = begin;
  for (; i + patterns_at_once <= end; i += patterns_at_once)
    add_patterns<S, patterns_at_once>(x + i * width, width, moments);
  for (; i < end; ++i) add_patterns<S, 1>(x + i * width, width, moments);
}

template <class S>
void moments_of_share(const Rows& rows, const S* x, int thread, int threads, std::vector<Moments<double>>& channels) {
  using A = Wide<S>;
  int64_t width = rows.width(), size = rows.layout().size(), patterns = size / width;
  int64_t begin = patterns * thread / threads, end = patterns * (thread + 1) / threads;
  int64_t count = static_cast<int64_t>(channels.size());
  if (begin < end) {
    RowMoments<A> moments(width);
    int64_t few = std::min(patterns_to_begin_with, end - begin);
    sum_patterns(x, width, begin, begin + few, moments);
    moments.begin(few);
    for (int64_t i = begin; i < end; i += patterns_per_block) {
      int64_t stop = std::min(end, i + patterns_per_block);
      sum_patterns(x, width, i, stop, moments);
      moments.close_block(stop - i);
    }
    for (int64_t i = 0; i < width; ++i) channels[i % count].merge(moments.count, moments.mean[i], moments.m2[i]);
  }
  for (int64_t i = patterns * width; thread == 0 && i < size; i += tile_size) {  // rows that fill no pattern
    alignas(64) A widened[tile_size];
    int64_t n = std::min(tile_size, size - i);
    const A* values = read_values(x + i, widened, n);
    for (int64_t p = 0; p < n; ++p) channels[(i + p) % count].merge(1.0, values[p], 0.0);
  }
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

template <class S>
void moments_of_share(const Planes& planes, const S* x, int thread, int threads,
                      std::vector<Moments<double>>& channels) {
  using A = Wide<S>;
  planes.template tiles<S>(thread, threads, [&](const Tile& tile) {
    alignas(64) A widened[tile_size];
    const A* values = read_values(x + tile.offset, widened, tile.n);
    Moments<double>& own = channels[tile.position];
    A shift = own.count == 0 ? sum_of(values, tile.n) / static_cast<A>(tile.n) : static_cast<A>(own.mean);
    own.merge(moments_about(shift, values, tile.n));
  });
}

// --- both ------------------------------------------------------------------------------------------------------

// Those of every channel of `walk`.
template <class S, class Walk>
std::vector<Moments<double>> moments_of(const Walk& walk, const S* x, int threads) {
  const int64_t channels = walk.layout().channels;
  std::vector<std::vector<Moments<double>>> shares(threads);
#pragma omp parallel num_threads(threads)
  {
    std::vector<Moments<double>>& share = shares[omp_get_thread_num()];
    share.resize(channels);
    moments_of_share(walk, x, omp_get_thread_num(), omp_get_num_threads(), share);
  }
  std::vector<Moments<double>> total(channels);
  for (const std::vector<Moments<double>>& share : shares)
    for (size_t c = 0; c < share.size(); ++c) total[c].merge(share[c]);
  return total;
}

}  // namespace normpass
