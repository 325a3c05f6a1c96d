// group_norm_act: z = act((x − mean)·a + bias + residual) with the mean and the variance of each group of each sample,
// which are taken first, or given.
#include "groups.h"
#include "moments_of.h"
#include "norm_act.h"

namespace normpass {
namespace {

// The mean and the biased variance of every group of a unit. In planes a group is one run of values; in rows it is some
// channels, all of one size.
template <class S>
void store_moments(const Groups& all, const Unit& unit, const S* x, Wide<S>* mean, Wide<S>* var, int threads) {
  const int64_t per_group = all.is_rows ? all.channels_of_group() : 1;
  const Layout groups{1, unit.groups, all.values_of_group()};
  const std::vector<Moments<double>> found =
      all.is_rows ? moments_of(Rows(unit.layout), x, threads) : moments_of(Planes(groups), x, threads);
  for (int64_t g = 0; g < unit.groups; ++g) {
    Moments<double> group;
    for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) group.merge(found[c]);
    mean[g] = static_cast<Wide<S>>(group.mean);
    var[g] = static_cast<Wide<S>>(group.variance());
  }
}

template <class S> struct Tensors {
  S* z;
  const S *x, *residual;
};

template <class S>
void group_norm_act(const Groups& all, const Tensors<S>& tensors, Wide<S>* mean, Wide<S>* var, bool is_given,
                    const Wide<S>* slope, const Wide<S>* weight, const Wide<S>* bias, double eps, const Activated<Wide<S>>& activated,
                    int threads) {
  using A = Wide<S>;
  const bool streamed = is_streamed<S>(all);
  each_unit(all, threads, [&](const Unit& unit, int of_unit) {
    with_layout(unit.layout, [&](const auto& walk) {
      const S *x = tensors.x + unit.offset, *residual = tensors.residual;
      if (!is_given) store_moments(all, unit, x, mean + unit.first_group, var + unit.first_group, of_unit);
      const Affine<A> affine = affine_of(all, unit, walk.width(), weight, bias, mean, var, eps, slope);
      norm_act<S>(walk, tensors.z + unit.offset, x, residual == nullptr ? nullptr : residual + unit.offset, affine,
                  activated, streamed, of_unit);
    });
  });
}

}  // namespace
}  // namespace normpass

NORMPASS_EXPORT int normpass_group_norm_act(void* z, const void* x, const void* residual, const void* slope,
                                            const void* weight, const void* bias, void* mean, void* var, double eps, int activation,
                                            double arg0, double arg1, int is_given, int64_t samples, int64_t groups,
                                            int64_t channels, int64_t spatial, int is_rows, int dtype, int threads) {
  using namespace normpass;
  return with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    group_norm_act<S>({samples, groups, channels, spatial, is_rows != 0},
                      {static_cast<S*>(z), static_cast<const S*>(x), static_cast<const S*>(residual)},
                      static_cast<A*>(mean), static_cast<A*>(var), is_given != 0, static_cast<const A*>(slope),
                      static_cast<const A*>(weight),
                      static_cast<const A*>(bias), eps, Activated<A>({activation, arg0, arg1}), threads);
  });
}
