// The two passes of backward that the fused op and in-place ABN share. With `centred` c, a multiple of x̂:
//
//   reduce   sum_dy = Σdy      sum_dy_c = Σ dy·c
//   apply    dx = scale·dy + B·c + C, per channel; scale·dy for running statistics
//
// A source that `has_slope` calls back a second time in the first pass, with values of which the sum alone is wanted.
//
// A source calls back for each tile of each pass with the gradients of its values: `channel(i)`, what those of value i
// of every run have in common, its scale too, and `at(channel, run, i)`, dy and c; where `writes`, the first pass
// writes `written(channel, dy, run, i)` to `target`. So each pass is one loop over a tile. The sums are taken in the
// wide type over some tiles, then in double.
#pragma once

#include "affine.h"

namespace normpass {

struct Sums {
  std::vector<double> dy, dy_centred, dslope;
  explicit Sums(int64_t channels = 0) : dy(channels, 0.0), dy_centred(channels, 0.0) {}
};

template <class Source> constexpr bool has_slope = false;
template <class Gradients> constexpr bool is_of_slope = false;

struct NoSums {
  template <class Walk> explicit NoSums(const Walk&) {}
};

// What a source gives for one value.
template <class A> struct Derivative {
  A dy, centred;
};

// The sums over all lines of a tile. Where STEP is 1, every position has sums of its own; where it is 0, all lines are
// added to the sums of one, and what fills no line to `rest`. (That to be added to some of the sums of a line, which
// are one register, would wait for all stores before.)
template <int RUNS, int STEP, class A, class Gradients>
NORMPASS_ALWAYS_INLINE void add_sums(const Gradients& gradients, int64_t n, A* dy_sums, A* centred_sums,
                                     Derivative<A>& rest) {
  auto add = [&](int64_t i, A& dy, A& centred, auto write) NORMPASS_INLINED_LAMBDA {
    auto channel = gradients.channel(i);
    A sum = 0, product = 0;
#pragma GCC unroll 4
    for (int run = 0; run < RUNS; ++run) {
      Derivative<A> at = gradients.at(channel, run, i);
      write(run, channel, at.dy);
      sum += at.dy;
      product = multiply_add(at.dy, at.centred, product);
    }
    dy += sum;
    centred += product;
  };
  auto add_line = [&](int64_t begin, auto values, auto write) NORMPASS_INLINED_LAMBDA {
    gradients.template prefetch<RUNS>(begin);
    const int64_t count = values;
    if constexpr (STEP == 0 && is_rest<decltype(values)>) {
      for (int64_t i = 0; i < count; ++i)
        add(begin + i, rest.dy, rest.centred,
            [&](int run, const auto& channel, A dy) NORMPASS_INLINED_LAMBDA { write(run, i, channel, dy); });
    } else {
      A* const sums = dy_sums + STEP * begin;
      A* const products = centred_sums + STEP * begin;
#pragma GCC ivdep
#pragma GCC unroll 1
      for (int64_t i = 0; i < count; ++i)
        add(begin + i, sums[i], products[i],
            [&](int run, const auto& channel, A dy) NORMPASS_INLINED_LAMBDA { write(run, i, channel, dy); });
    }
  };
  if constexpr (Gradients::writes) {
    write_lines<RUNS>(n, gradients.target, [&](int64_t begin, auto values, const Line<A>& to) {
      add_line(begin, values, [&](int run, int64_t i, const auto& channel, A dy) NORMPASS_INLINED_LAMBDA {
        to(run, i) = gradients.written(channel, dy, run, begin + i);
      });
    });
  } else {
    each_line<A>(n, [&](int64_t begin, auto values) {
      add_line(begin, values, [](int, int64_t, const auto&, A) {});
    });
  }
}

// One thread's sums over tiles of rows: a value of its own for every position of the pattern.
template <class A> class RowAccumulator {
 public:
  explicit RowAccumulator(const Rows& rows)
      : channels_(rows.layout().channels), dy_(rows.width(), A(0)), dy_centred_(rows.width(), A(0)),
        total_(rows.layout().channels) {}

  template <int RUNS, class Gradients>
  NORMPASS_SHARED void add(const Gradients& gradients, int64_t n, int64_t position) {
    if (position == 0) {
      if (patterns_ >= patterns_per_flush) flush();
      patterns_ += RUNS;
    }
    Derivative<A> none;
    add_sums<RUNS, 1>(gradients, n, dy_.data() + position, dy_centred_.data() + position, none);
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
  Values<A> dy_, dy_centred_;
  Sums total_;
  int patterns_ = 0;
};

// Of a tile of one plane.
template <int RUNS, class A, class Gradients>
NORMPASS_SHARED Derivative<A> sums_of_plane(const Gradients& gradients, int64_t n) {
  alignas(64) A dy[line<A>] = {}, centred[line<A>] = {};
  Derivative<A> rest{0, 0};
  add_sums<RUNS, 0>(gradients, n, dy, centred, rest);
  return {sum_of_line(dy) + rest.dy, sum_of_line(centred) + rest.centred};
}

template <class A> class PlaneAccumulator {
 public:
  explicit PlaneAccumulator(const Planes& planes) : total_(planes.width()) {}

  template <int RUNS, class Gradients> void add(const Gradients& gradients, int64_t n, int64_t channel) {
    Derivative<A> sum = sums_of_plane<RUNS, A>(gradients, n);
    total_.dy[channel] += sum.dy;
    total_.dy_centred[channel] += sum.centred;
  }
  const Sums& total() { return total_; }

 private:
  Sums total_;
};

template <class A> RowAccumulator<A> accumulator_for(const Rows& rows) { return RowAccumulator<A>(rows); }
template <class A> PlaneAccumulator<A> accumulator_for(const Planes& planes) { return PlaneAccumulator<A>(planes); }

// dx = scale·dy + by_centred·c + constant, where the scale is the source's; with running statistics scale·dy alone, for
// 0·c would be NaN where c is infinite.
template <class A> struct Coefficients {
  Values<A> by_centred, constant;
  bool through;  // the statistics: whether what is added to scale·dy is there
  Coefficients(int64_t width, bool through) : by_centred(width), constant(width), through(through) {}

  void spread(int64_t channels) {
    for (int64_t i = channels; i < static_cast<int64_t>(constant.size()); ++i) {
      by_centred[i] = by_centred[i - channels];
      constant[i] = constant[i - channels];
    }
  }
};

// Those of c = x − mean, for `layout`; without `sums` those of running statistics. The sum is multiplied by r before the
// slope is: a·r² of large values alone is below the smallest double.
template <class A>
Coefficients<A> coefficients_of(const Affine<A>& affine, const A* var, double eps, const Sums* sums,
                                const Layout& layout) {
  Coefficients<A> result(static_cast<int64_t>(affine.mean.size()), sums != nullptr);
  if (sums == nullptr) return result;
  double count = static_cast<double>(layout.count());
  for (int64_t c = 0; c < layout.channels; ++c) {
    double slope = affine.scale[c], rstd = 1 / std::sqrt(static_cast<double>(var[c]) + eps);
    result.by_centred[c] = static_cast<A>(-(slope * rstd) * (sums->dy_centred[c] * rstd / count));
    result.constant[c] = static_cast<A>(-slope * sums->dy[c] / count);
  }
  result.spread(layout.channels);
  return result;
}

template <class A> struct TileBuffers {
  alignas(64) A grad[tile_size], kept[tile_size], residual[tile_size];
  alignas(64) A result[runs_at_once * tile_size], inverse[runs_at_once * tile_size];
};

template <class S, class Walk, class Source> Sums reduce(const Walk& walk, const Source& source, int threads) {
  using A = Wide<S>;
  std::vector<Sums> shares(threads);
#pragma omp parallel num_threads(threads)
  {
    TileBuffers<A> buffers;
    auto sums = accumulator_for<A>(walk);
    std::conditional_t<has_slope<Source>, decltype(sums), NoSums> slope_sums(walk);
    int thread = omp_get_thread_num();
    walk.template groups<S>(thread, omp_get_num_threads(), [&](const Tile& tile, auto runs) {
      source.template first_pass<runs.value>(walk, buffers, tile, [&](const auto& gradients) NORMPASS_INLINED_LAMBDA {
        if constexpr (is_of_slope<std::decay_t<decltype(gradients)>>)
          slope_sums.template add<runs.value>(gradients, tile.n, tile.position);
        else
          sums.template add<runs.value>(gradients, tile.n, tile.position);
      });
    });
    source.end_of_first_pass();
    shares[thread] = sums.total();
    if constexpr (has_slope<Source>) shares[thread].dslope = slope_sums.total().dy;
  }
  Sums total(walk.layout().channels);
  if (has_slope<Source>) total.dslope.resize(total.dy.size());
  for (const Sums& share : shares) {
    for (size_t c = 0; c < share.dy.size(); ++c) {
      total.dy[c] += share.dy[c];
      total.dy_centred[c] += share.dy_centred[c];
    }
    for (size_t c = 0; c < share.dslope.size(); ++c) total.dslope[c] += share.dslope[c];
  }
  return total;
}

template <class PerChannel> struct CoefficientsAt {
  PerChannel by_centred, constant;
};

// THROUGH the statistics: a template's argument, for with a choice inside GCC vectorises no such loop.
template <bool THROUGH, class Gradients, class A, class PerChannel>
NORMPASS_SHARED void combine(const Gradients& gradients, const Target<A>& dx, int64_t n,
                             const CoefficientsAt<PerChannel>& at) {
  write_lines<1>(n, dx, [&](int64_t begin, auto values, const Line<A>& to) {
    gradients.template prefetch<1>(begin);
    const int64_t count = values;
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = 0; i < count; ++i) {
      auto channel = gradients.channel(begin + i);
      Derivative<A> value = gradients.at(channel, 0, begin + i);
      A rest = 0;
      if constexpr (THROUGH) rest = multiply_add(at.by_centred[begin + i], value.centred, at.constant[begin + i]);
      to(0, i) = multiply_add(channel.scale, value.dy, rest);
    }
  });
}

template <class S, class Walk, class Source>
void apply(const Walk& walk, const Source& source, const Coefficients<Wide<S>>& c, S* dx, bool streamed, int threads) {
  using A = Wide<S>;
#pragma omp parallel num_threads(threads)
  {
    TileBuffers<A> buffers;
    walk.template tiles<S>(omp_get_thread_num(), omp_get_num_threads(), [&](const Tile& tile) {
      using PerChannel = decltype(walk.at(c.constant, tile.position));
      Target<A> target = target_of(dx, 0, buffers.result, tile, streamed);
      CoefficientsAt<PerChannel> at{walk.at(c.by_centred, tile.position), walk.at(c.constant, tile.position)};
      source.second_pass(walk, buffers, tile, [&](const auto& gradients) NORMPASS_INLINED_LAMBDA {
        if (c.through) combine<true>(gradients, target, tile.n, at);
        else combine<false>(gradients, target, tile.n, at);
      });
      finish_tile(dx, target, tile);
    });
    if (streamed) end_of_stream();
  }
}

template <class A> void store_sums(const std::vector<double>& sums, void* to) {
  for (size_t c = 0; to != nullptr && c < sums.size(); ++c) static_cast<A*>(to)[c] = static_cast<A>(sums[c]);
}

}  // namespace normpass
