// The two passes of backward that the fused op and in-place ABN share. With `centred` c, a multiple of x̂:
//
//   reduce   sum_dy = Σdy      sum_dy_c = Σ dy·c
//   apply    dx = A·dy + B·c + C, per channel
//
// A source calls back, for each pass, with a function from i to dy and c of a tile's value i, so that each pass is one
// loop. The sums are taken in the wide type over some tiles, then in double.
#pragma once

#include "affine.h"

namespace normpass {

struct Sums {
  std::vector<double> dy, dy_centred;
  explicit Sums(int64_t channels = 0) : dy(channels, 0.0), dy_centred(channels, 0.0) {}
};

// What a source gives for one value.
template <class A> struct Derivative {
  A dy, centred;
};

// One thread's sums over tiles of rows: a value of its own for every position of the pattern.
template <class A> class RowAccumulator {
 public:
  explicit RowAccumulator(const Rows& rows)
      : channels_(rows.layout().channels), dy_(rows.width(), A(0)), dy_centred_(rows.width(), A(0)),
        total_(rows.layout().channels) {}

  template <class Tile> void add(const Tile& tile, int64_t n, int64_t position) {
    if (position == 0 && ++patterns_ > patterns_per_flush) flush();
    A* s1 = dy_.data() + position;
    A* s2 = dy_centred_.data() + position;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      Derivative<A> at = tile(i);
      s1[i] += at.dy;
      s2[i] = multiply_add(at.dy, at.centred, s2[i]);
    }
  }
  const Sums& total() {
    flush();
    return total_;
  }

 private:
  static constexpr int patterns_per_flush = 64;

  void flush() {
    int64_t width = static_cast<int64_t>(dy_.size());
    for (int64_t row = 0; row < width; row += channels_)
      for (int64_t c = 0; c < channels_; ++c) {
        total_.dy[c] += dy_[row + c];
        total_.dy_centred[c] += dy_centred_[row + c];
      }
    std::fill(dy_.begin(), dy_.end(), A(0));
    std::fill(dy_centred_.begin(), dy_centred_.end(), A(0));
    patterns_ = 1;
  }

  int64_t channels_;
  std::vector<A> dy_, dy_centred_;
  Sums total_;
  int patterns_ = 0;
};

template <class A> class PlaneAccumulator {
 public:
  explicit PlaneAccumulator(const Planes& planes) : total_(planes.width()) {}

  template <class Tile> void add(const Tile& tile, int64_t n, int64_t channel) {
    A s1 = 0, s2 = 0;
#pragma omp simd reduction(+ : s1, s2)
    for (int64_t i = 0; i < n; ++i) {
      Derivative<A> at = tile(i);
      s1 += at.dy;
      s2 += at.dy * at.centred;
    }
    total_.dy[channel] += s1;
    total_.dy_centred[channel] += s2;
  }
  const Sums& total() { return total_; }

 private:
  Sums total_;
};

template <class A> RowAccumulator<A> accumulator_for(const Rows& rows) { return RowAccumulator<A>(rows); }
template <class A> PlaneAccumulator<A> accumulator_for(const Planes& planes) { return PlaneAccumulator<A>(planes); }

// dx = slope·dy + by_centred·c + constant.
template <class A> struct Coefficients {
  std::vector<A> slope, by_centred, constant;
  explicit Coefficients(int64_t width) : slope(width), by_centred(width), constant(width) {}

  void spread(int64_t channels) {
    for (int64_t i = channels; i < static_cast<int64_t>(slope.size()); ++i) {
      slope[i] = slope[i - channels];
      by_centred[i] = by_centred[i - channels];
      constant[i] = constant[i - channels];
    }
  }
};

template <class A> struct TileBuffers {
  alignas(64) A grad[tile_size], kept[tile_size], residual[tile_size], result[tile_size];
};

template <class S, class Walk, class Source> Sums reduce(const Walk& walk, const Source& source, int threads) {
  using A = Wide<S>;
  std::vector<Sums> shares(threads);
#pragma omp parallel num_threads(threads)
  {
    TileBuffers<A> buffers;
    auto sums = accumulator_for<A>(walk);
    int thread = omp_get_thread_num();
    walk.tiles(thread, omp_get_num_threads(), [&](int64_t offset, int64_t n, int64_t position) {
      source.first_pass(walk, buffers, offset, n, position, [&](auto tile) { sums.add(tile, n, position); });
    });
    source.end_of_first_pass();
    shares[thread] = sums.total();
  }
  Sums total(walk.layout().channels);
  for (const Sums& share : shares)
    for (size_t c = 0; c < share.dy.size(); ++c) {
      total.dy[c] += share.dy[c];
      total.dy_centred[c] += share.dy_centred[c];
    }
  return total;
}

template <class Tile, class A, class PerChannel>
void combine(const Tile& tile, A* dx, int64_t n, PerChannel slope, PerChannel by_centred, PerChannel constant) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    Derivative<A> at = tile(i);
    dx[i] = multiply_add(slope[i], at.dy, multiply_add(by_centred[i], at.centred, constant[i]));
  }
}

template <class S, class Walk, class Source>
void apply(const Walk& walk, const Source& source, const Coefficients<Wide<S>>& c, S* dx, int threads) {
  const bool streamed = is_streamed<S>(walk.layout());
#pragma omp parallel num_threads(threads)
  {
    TileBuffers<Wide<S>> buffers;
    walk.tiles(omp_get_thread_num(), omp_get_num_threads(), [&](int64_t offset, int64_t n, int64_t position) {
      Wide<S>* target = target_of(dx + offset, buffers.result, streamed);
      source.second_pass(walk, buffers, offset, n, position, [&](auto tile) {
        combine(tile, target, n, walk.at(c.slope, position), walk.at(c.by_centred, position),
                walk.at(c.constant, position));
      });
      finish_tile(dx + offset, target, n, streamed);
    });
    if (streamed) end_of_stream();
  }
}

template <class A> void store_sums(const std::vector<double>& sums, void* to) {
  for (size_t c = 0; to != nullptr && c < sums.size(); ++c) static_cast<A*>(to)[c] = static_cast<A>(sums[c]);
}

}  // namespace normpass
