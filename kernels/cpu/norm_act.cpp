// norm_act: z = act((x − mean)·a + bias + residual), with slopes a PReLU. Rebuilding z in backward is this kernel again.
#include "norm_act.h"

NORMPASS_EXPORT int normpass_norm_act(void* z, const void* x, const void* residual, const void* slope,
                                 const void* weight, const void* bias, const void* mean, const void* var,
                                 double eps, int activation, double arg0, double arg1, int64_t outer, int64_t channels, int64_t inner, int dtype,
                                 int threads) {
  using namespace normpass;
  return with_affine(dtype, {outer, channels, inner}, {weight, bias, mean, var, eps, slope},
                     [&](auto* storage, const auto& walk, const auto& affine) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    norm_act<S>(walk, static_cast<S*>(z), static_cast<const S*>(x), static_cast<const S*>(residual), affine,
                Activated<A>({activation, arg0, arg1}), is_streamed<S>(walk.layout()), threads);
  });
}
