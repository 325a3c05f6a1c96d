// group_norm_act_backward: from x. With c = x − mean and r = 1/sqrt(var + eps) of its group, m the values of a group:
//
//   y = c·γr + β      dy = grad·act'(y + residual)      dresidual = dy      dγ = Σ r·dy·c      dβ = Σ dy
//   dx = γr·dy − (r³/m)·(Σ γ·dy·c)·c − (r/m)·Σ γ·dy        the sums of dx over the group, the others over a channel
//
// The passes over a unit are those of norm_act_backward.
#include "from_input.h"
#include "groups.h"
#include "prelu.h"

namespace normpass {
namespace {

// The sums over a group make the coefficients of each of its channels.
template <class A>
Coefficients<A> coefficients_of_groups(const Groups& all, const Unit& unit, const A* weight, const A* var, double eps,
                                       const Sums& sums, int64_t width) {
  const int64_t per_group = all.channels_of_group();
  const double count = static_cast<double>(all.values_of_group());
  Coefficients<A> result(width, true);
  for (int64_t g = 0; g < unit.groups; ++g) {
    double dy = 0, dy_centred = 0;
    for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
      const double slope = weight == nullptr ? 1 : weight[unit.first_channel + c];
      dy += slope * sums.dy[c];
      dy_centred += slope * sums.dy_centred[c];
    }
    const double rstd = 1 / std::sqrt(static_cast<double>(var[unit.first_group + g]) + eps);
    for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
      result.by_centred[c] = static_cast<A>(-rstd * rstd * (dy_centred * rstd / count));
      result.constant[c] = static_cast<A>(-rstd * (dy / count));
    }
  }
  result.spread(unit.layout.channels);
  return result;
}

// The sums of every channel of every sample, for the gradients of the weight and the bias.
struct ChannelSums {
  std::vector<double> dy, dy_normalized, dslope;
  explicit ChannelSums(int64_t count) : dy(count), dy_normalized(count), dslope(count) {}

  template <class A>
  void keep(const Groups& all, const Unit& unit, const Sums& sums, const A* var, double eps) {
    const int64_t first = unit.first_group * all.channels_of_group();
    for (int64_t c = 0; c < unit.layout.channels; ++c) {
      const double variance = var[unit.first_group + c / all.channels_of_group()];
      dy[first + c] = sums.dy[c];
      dy_normalized[first + c] = sums.dy_centred[c] / std::sqrt(variance + eps);
      if (!sums.dslope.empty()) dslope[first + c] = sums.dslope[c];
    }
  }
};

template <class A> void store_over_samples(const std::vector<double>& sums, const Groups& all, void* to) {
  for (int64_t c = 0; to != nullptr && c < all.channels; ++c) {
    double total = 0;
    for (int64_t n = 0; n < all.samples; ++n) total += sums[n * all.channels + c];
    static_cast<A*>(to)[c] = static_cast<A>(total);
  }
}

template <class S> struct Tensors {
  S *dx, *dresidual;
  const S *grad, *x, *residual;
};

template <class S>
void backward(const Groups& all, const Tensors<S>& tensors, void* dweight, void* dbias, void* dslope,
              const Wide<S>* slope, const Wide<S>* weight, const Wide<S>* bias, const Wide<S>* mean, const Wide<S>* var, double eps,
              const Activated<Wide<S>>& activated, int threads) {
  using A = Wide<S>;
  const bool streamed = is_streamed<S>(all);
  ChannelSums channel_sums(all.samples * all.channels);
  each_unit(all, threads, [&](const Unit& unit, int of_unit) {
    auto at = [&](auto* values) { return values == nullptr ? nullptr : values + unit.offset; };
    with_layout(unit.layout, [&](const auto& walk) {
      const Affine<A> affine = affine_of(all, unit, walk.width(), weight, bias, mean, var, eps, slope);
      auto passes = [&](const auto& source, bool is_streamed) {
        const Sums sums = reduce<S>(walk, source, of_unit);
        channel_sums.keep(all, unit, sums, var, eps);
        if (tensors.dx == nullptr) return;
        const auto coefficients = coefficients_of_groups(all, unit, weight, var, eps, sums, walk.width());
        apply<S>(walk, source, coefficients, at(tensors.dx), is_streamed, of_unit);
      };
      if (slope != nullptr) return passes(FromPrelu<S>{at(tensors.grad), at(tensors.x), affine}, streamed);
      FromInput<S> source{at(tensors.grad), at(tensors.x), at(tensors.residual), at(tensors.dresidual), affine,
                          activated, false};
      if (source.dresidual == nullptr && is_written<S>(activated)) source.dresidual = at(tensors.dx);
      passes(source, streamed && source.dresidual != at(tensors.dx));
    });
  });
  store_over_samples<A>(channel_sums.dy_normalized, all, dweight);
  store_over_samples<A>(channel_sums.dy, all, dbias);
  store_over_samples<A>(channel_sums.dslope, all, dslope);
}

}  // namespace
}  // namespace normpass

NORMPASS_EXPORT int normpass_group_norm_act_backward(void* dx, void* dresidual, void* dweight, void* dbias,
                                                     void* dslope, const void* grad, const void* x,
                                                     const void* residual, const void* slope, const void* weight, const void* bias, const void* mean,
                                                     const void* var, double eps, int activation, double arg0,
                                                     double arg1, int64_t samples, int64_t groups, int64_t channels,
                                                     int64_t spatial, int is_rows, int dtype, int threads) {
  using namespace normpass;
  return with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    backward<S>({samples, groups, channels, spatial, is_rows != 0},
                {static_cast<S*>(dx), static_cast<S*>(dresidual), static_cast<const S*>(grad),
                 static_cast<const S*>(x), static_cast<const S*>(residual)},
                dweight, dbias, dslope, static_cast<const A*>(slope), static_cast<const A*>(weight), static_cast<const A*>(bias),
                static_cast<const A*>(mean), static_cast<const A*>(var), eps, Activated<A>({activation, arg0, arg1}),
                threads);
  });
}
