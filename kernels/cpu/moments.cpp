// moments: mean and biased variance of every channel, in one pass.
#include "moments_of.h"

NORMPASS_EXPORT int normpass_moments(void* mean, void* var, const void* x, int64_t outer, int64_t channels, int64_t inner,
                                int dtype, int threads) {
  using namespace normpass;
  return with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    with_layout({outer, channels, inner}, [&](const auto& walk) {
      const std::vector<Moments<double>> of_x = moments_of(walk, static_cast<const S*>(x), threads);
      for (int64_t c = 0; c < channels; ++c) {
        static_cast<A*>(mean)[c] = static_cast<A>(of_x[c].mean);
        static_cast<A*>(var)[c] = static_cast<A>(of_x[c].variance());
      }
    });
  });
}
