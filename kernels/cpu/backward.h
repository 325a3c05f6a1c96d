// The two passes of backward that the fused op and in-place ABN share. With `centred` c, a multiple of x̂:
//
//   reduce   sum_dy = Σdy      sum_dy_c = Σ dy·c
//   apply    dx = A·dy + B·c + C, per channel
//
// A source calls back for each tile of each pass with the gradients of its values: `channel(i)`, what those of value i
// of every run have in common, and `at(channel, run, i)`, dy and c. So each pass is one loop over a tile. The sums are
// taken in the wide type over some tiles, then in double.
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

  template <int RUNS, class Gradients>
  NORMPASS_SHARED void add(Gradients gradients, int64_t n, int64_t position) {
    if (position == 0) {
      if (patterns_ >= patterns_per_flush) flush();
      patterns_ += RUNS;
    }
    A* s1 = dy_.data() + position;
    A* s2 = dy_centred_.data() + position;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      auto channel = gradients.channel(i);
      A dy = 0, products = 0;
#pragma GCC unroll 4
      for (int run = 0; run < RUNS; ++run) {
        Derivative<A> at = gradients.at(channel, run, i);
        dy += at.dy;
        products = multiply_add(at.dy, at.centred, products);
      }
      s1[i] += dy;
      s2[i] += products;
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
    patterns_ = 0;
  }

  int64_t channels_;
  std::vector<A> dy_, dy_centred_;
  Sums total_;
  int patterns_ = 0;
};

template <class A> class PlaneAccumulator {
 public:
  explicit PlaneAccumulator(const Planes& planes) : total_(planes.width()) {}

  template <int RUNS, class Gradients>
  NORMPASS_SHARED void add(Gradients gradients, int64_t n, int64_t channel) {
    // Two loops: with the gradients in it, a reduction would not vectorise.
    alignas(64) A dy[tile_size], products[tile_size];
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      Derivative<A> at = gradients.at(gradients.channel(i), 0, i);
      dy[i] = at.dy;
      products[i] = at.dy * at.centred;
    }
    A s1 = 0, s2 = 0;
#pragma omp simd reduction(+ : s1, s2)
    for (int64_t i = 0; i < n; ++i) {
      s1 += dy[i];
      s2 += products[i];
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
  alignas(64) A grad[tile_size], kept[tile_size], residual[tile_size], result[runs_at_once * tile_size];
};

template <class S, class Walk, class Source> Sums reduce(const Walk& walk, const Source& source, int threads) {
  using A = Wide<S>;
  std::vector<Sums> shares(threads);
#pragma omp parallel num_threads(threads)
  {
    TileBuffers<A> buffers;
    auto sums = accumulator_for<A>(walk);
    int thread = omp_get_thread_num();
    walk.template tiles<S>(thread, omp_get_num_threads(), [&](const Tile& tile) {
      source.first_pass(walk, buffers, tile, [&](auto gradients, auto runs) {
        sums.template add<runs.value>(gradients, tile.n, tile.position);
      });
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

template <int RUNS, class Gradients, class A, class PerChannel>
NORMPASS_SHARED void combine(Gradients gradients, Runs<A> dx, int64_t n, PerChannel slopes, PerChannel by_centred,
             PerChannel constants) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    auto channel = gradients.channel(i);
    A slope = slopes[i], factor = by_centred[i], constant = constants[i];
#pragma GCC unroll 4
    for (int run = 0; run < RUNS; ++run) {
      Derivative<A> at = gradients.at(channel, run, i);
      dx(run, i) = multiply_add(slope, at.dy, multiply_add(factor, at.centred, constant));
    }
  }
}

template <class S, class Walk, class Source>
void apply(const Walk& walk, const Source& source, const Coefficients<Wide<S>>& c, S* dx, int threads) {
  using A = Wide<S>;
  const bool streamed = is_streamed<S>(walk.layout());
  const int64_t stride = walk.width();
#pragma omp parallel num_threads(threads)
  {
    TileBuffers<A> buffers;
    walk.template tiles<S>(omp_get_thread_num(), omp_get_num_threads(), [&](const Tile& tile) {
      Runs<A> target = target_of(dx, stride, buffers.result, tile, streamed);
      auto slope = walk.at(c.slope, tile.position), by_centred = walk.at(c.by_centred, tile.position);
      auto constant = walk.at(c.constant, tile.position);
      source.second_pass(walk, buffers, tile, [&](auto gradients, auto runs) {
        combine<runs.value>(gradients, target, tile.n, slope, by_centred, constant);
      });
      finish_tile(dx, stride, target, tile, streamed);
    });
    if (streamed) end_of_stream();
  }
}

template <class A> void store_sums(const std::vector<double>& sums, void* to) {
  for (size_t c = 0; to != nullptr && c < sums.size(); ++c) static_cast<A*>(to)[c] = static_cast<A>(sums[c]);
}

}  // namespace normpass
