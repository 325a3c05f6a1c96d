// group_norm_act: z = act((x − mean)·a + bias + residual) with the mean and the variance of each group of each sample,
// which are taken first, or given.
#include "groups.h"
#include "moments_of.h"
#include "norm_act.h"

namespace normpass {
namespace {

// Biased variance; the channels of a group are of one size.
template <class A>
void store_moments(const std::vector<Moments<double>>& channels, int64_t per_group, A* mean, A* var) {
  for (size_t first = 0; first < channels.size(); first += per_group) {
    Moments<double> group;
    for (int64_t c = 0; c < per_group; ++c) group.merge(channels[first + c]);
    *mean++ = static_cast<A>(group.mean);
    *var++ = static_cast<A>(group.variance());
  }
}

template <class S> struct Tensors {
  S* z;
  const S *x, *residual;
};

template <class S>
void group_norm_act(const Groups& all, const Tensors<S>& tensors, Wide<S>* mean, Wide<S>* var, bool is_given,
                    const Wide<S>* weight, const Wide<S>* bias, double eps, const Activated<Wide<S>>& activated,
                    int threads) {
  using A = Wide<S>;
  const bool streamed = is_streamed<S>(all);
  each_unit(all, threads, [&](const Unit& unit, int of_unit) {
    with_layout(unit.layout, [&](const auto& walk) {
      const S *x = tensors.x + unit.offset, *residual = tensors.residual;
      if (!is_given)
        store_moments(moments_of(walk, x, of_unit), all.channels_of_group(), mean + unit.first_group,
                      var + unit.first_group);
      if (tensors.z == nullptr) return;
      const Affine<A> affine = affine_of(all, unit, walk.width(), weight, bias, mean, var, eps);
      norm_act<S>(walk, tensors.z + unit.offset, x, residual == nullptr ? nullptr : residual + unit.offset, affine,
                  activated, streamed, of_unit);
    });
  });
}

}  // namespace
}  // namespace normpass

NORMPASS_EXPORT int normpass_group_norm_act(void* z, const void* x, const void* residual, const void* weight,
                                            const void* bias, void* mean, void* var, double eps, int activation,
                                            double arg0, double arg1, int is_given, int64_t samples, int64_t groups,
                                            int64_t channels, int64_t spatial, int is_rows, int dtype, int threads) {
  using namespace normpass;
  return with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    group_norm_act<S>({samples, groups, channels, spatial, is_rows != 0},
                      {static_cast<S*>(z), static_cast<const S*>(x), static_cast<const S*>(residual)},
                      static_cast<A*>(mean), static_cast<A*>(var), is_given != 0, static_cast<const A*>(weight),
                      static_cast<const A*>(bias), eps, Activated<A>({activation, arg0, arg1}), threads);
  });
}
