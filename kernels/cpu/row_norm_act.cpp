// row_norm_act: z = act(x̂·weight + bias), with the mean and the variance of each row, which are taken first, or given.
#include "row_norm.h"

namespace normpass {
namespace {

template <class S>
void row_norm_act(const RowNorm& norm, S* z, Wide<S>* mean, Wide<S>* var, const S* x, bool is_given,
                  const Wide<S>* weight, const Wide<S>* bias, double eps, const Activated<Wide<S>>& activated,
                  int threads) {
  using A = Wide<S>;
  const int64_t width = norm.width;
  const bool is_identity = activated.call().code == identity_code;
#pragma omp parallel num_threads(threads)
  {
    RowBuffers<A> buffers(width, weight, bias);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < norm.rows; ++row) {
      const A* values = read_row(x + row * width, buffers.wide.data(), width);
      if (!is_given) {
        const MomentsOfRow<A> moments = moments_of_row(norm, values);
        mean[row] = moments.mean, var[row] = moments.var;
      }
      const A rstd = 1 / std::sqrt(var[row] + static_cast<A>(eps));
      S* const to = z + row * width;
      A* result = buffers.result.data();
      if constexpr (!is_narrow<S>) result = to;
      if (is_identity) {
        affine_row(values, result, width, mean[row], rstd, buffers.weight.data(), buffers.bias.data());
      } else {
        normalize_row(values, buffers.normalized.data(), width, mean[row], rstd);
        activated.value(run_of_row<A>(buffers, nullptr, result, width));
      }
      if constexpr (is_narrow<S>) narrow(result, to, width);
    }
  }
}

}  // namespace
}  // namespace normpass

NORMPASS_EXPORT int normpass_row_norm_act(void* z, const void* x, const void* weight, const void* bias, void* mean,
                                          void* var, double eps, int activation, double arg0, double arg1,
                                          int is_given, int64_t rows, int64_t width, int is_centred, int dtype,
                                          int threads) {
  using namespace normpass;
  return with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    row_norm_act<S>({rows, width, is_centred != 0}, static_cast<S*>(z), static_cast<A*>(mean), static_cast<A*>(var),
                    static_cast<const S*>(x), is_given != 0, static_cast<const A*>(weight),
                    static_cast<const A*>(bias), eps, Activated<A>({activation, arg0, arg1}), threads);
  });
}
