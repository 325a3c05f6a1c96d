// running_stats: one step of BatchNorm's running statistics, in place; the variance becomes the unbiased one.
#include "layout.h"

namespace normpass {
namespace {

template <class A>
void update(A* running_mean, A* running_var, const A* mean, const A* var, double momentum, int64_t count,
            int64_t channels) {
  A kept = static_cast<A>(1 - momentum), share = static_cast<A>(momentum);
  A unbiased_share = static_cast<A>(momentum * static_cast<double>(count) / static_cast<double>(count - 1));
  for (int64_t c = 0; c < channels; ++c) {
    running_mean[c] = running_mean[c] * kept + mean[c] * share;
    running_var[c] = running_var[c] * kept + var[c] * unbiased_share;
  }
}

}  // namespace
}  // namespace normpass

NORMPASS_EXPORT int normpass_running_stats(void* running_mean, void* running_var, const void* mean, const void* var,
                                      double momentum, int64_t count, int64_t channels, int dtype) {
  using namespace normpass;
  return with_dtype(dtype, [&](auto* storage) {
    using A = Wide<std::remove_pointer_t<decltype(storage)>>;
    update(static_cast<A*>(running_mean), static_cast<A*>(running_var), static_cast<const A*>(mean),
           static_cast<const A*>(var), momentum, count, channels);
  });
}
