// row_norm_act_backward: from x. With x̂ = (x − mean)·r of a row of m values:
//
//   dy = grad·act'(x̂·weight + bias)      h = weight·dy      dweight = Σ dy·x̂      dbias = Σ dy      over the rows
//   dx = r·(h − Σh/m − x̂·Σ(h·x̂)/m)        the sums over the row; without Σh for an RMS norm
//
// One read of x and grad, one write of dx: what a row needs twice is in the cache.
#include "row_norm.h"

namespace normpass {
namespace {

struct RowSums {
  double h, h_normalized;
};

// The sums of a row, and what it adds to those of the positions.
template <class A>
NORMPASS_SHARED RowSums add_row(const RowBuffers<A>& buffers, const A* dy, A* dweight, A* dbias, int64_t width) {
  const A *normalized = buffers.normalized.data(), *weight = buffers.weight.data();
  RowSums sums{0, 0};
  for (int64_t part = 0; part < width; part += row_part) {
    alignas(64) A h_sums[line<A>] = {}, products[line<A>] = {};
    each_line<A>(std::min(row_part, width - part), [&](int64_t begin, auto values) {
      const int64_t count = values, at = part + begin;
#pragma GCC ivdep
#pragma GCC unroll 1
      for (int64_t i = 0; i < count; ++i) {
        const A outer = dy[at + i], normal = normalized[at + i], h = weight[at + i] * outer;
        h_sums[i] += h;
        products[i] = multiply_add(h, normal, products[i]);
        dweight[at + i] = multiply_add(outer, normal, dweight[at + i]);
        dbias[at + i] += outer;
      }
    });
    sums.h += static_cast<double>(sum_of_line(h_sums));
    sums.h_normalized += static_cast<double>(sum_of_line(products));
  }
  return sums;
}

template <class A>
NORMPASS_SHARED void write_row(const RowBuffers<A>& buffers, const A* dy, A* dx, int64_t width, A rstd, A mean_h,
                               A mean_product) {
  const A *normalized = buffers.normalized.data(), *weight = buffers.weight.data();
  each_line<A>(width, [&](int64_t begin, auto values) {
    const int64_t count = values;
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = begin + i;
      dx[at] = rstd * (weight[at] * dy[at] - mean_h - normalized[at] * mean_product);
    }
  });
}

// Of the positions, over the rows of one thread: in the wide type over some rows, then in double.
template <class A> struct PositionSums {
  static constexpr int rows_per_flush = 64;
  Values<A> dweight, dbias;
  std::vector<double> total_dweight, total_dbias;
  int rows = 0;

  explicit PositionSums(int64_t width)
      : dweight(width, A(0)), dbias(width, A(0)), total_dweight(width), total_dbias(width) {}
  void count_row() {
    if (++rows == rows_per_flush) flush();
  }
  void flush() {
    for (size_t i = 0; i < total_dbias.size(); ++i) {
      total_dweight[i] += dweight[i], total_dbias[i] += dbias[i];
      dweight[i] = dbias[i] = A(0);
    }
    rows = 0;
  }
};

template <class S> struct Tensors {
  S* dx;
  const S *grad, *x;
};

template <class S>
void backward(const RowNorm& norm, const Tensors<S>& tensors, void* dweight, void* dbias, const Wide<S>* weight,
              const Wide<S>* bias, const Wide<S>* mean, const Wide<S>* var, double eps,
              const Activated<Wide<S>>& activated, int threads) {
  using A = Wide<S>;
  const int64_t width = norm.width;
  const bool is_identity = activated.call().code == identity_code;
  std::vector<std::vector<double>> dweights(threads), dbiases(threads);
#pragma omp parallel num_threads(threads)
  {
    RowBuffers<A> buffers(width, weight, bias);
    Values<A> wide_grad(width);
    PositionSums<A> sums(width);
#pragma omp for schedule(static)
    for (int64_t row = 0; row < norm.rows; ++row) {
      const A* x = read_row(tensors.x + row * width, buffers.wide.data(), width);
      const A* grad = read_row(tensors.grad + row * width, wide_grad.data(), width);
      const A rstd = 1 / std::sqrt(var[row] + static_cast<A>(eps));
      normalize_row(x, buffers.normalized.data(), width, mean[row], rstd);
      const A* dy = is_identity ? grad : buffers.dy.data();
      if (!is_identity) activated.gradient(run_of_row(buffers, grad, buffers.dy.data(), width));
      const RowSums of_row = add_row(buffers, dy, sums.dweight.data(), sums.dbias.data(), width);
      sums.count_row();
      if (tensors.dx == nullptr) continue;
      S* const to = tensors.dx + row * width;
      A* result = buffers.result.data();
      if constexpr (!is_narrow<S>) result = to;
      write_row(buffers, dy, result, width, rstd, norm.is_centred ? static_cast<A>(of_row.h / width) : A(0),
                static_cast<A>(of_row.h_normalized / width));
      if constexpr (is_narrow<S>) narrow(result, to, width);
    }
    sums.flush();
    dweights[omp_get_thread_num()] = std::move(sums.total_dweight);
    dbiases[omp_get_thread_num()] = std::move(sums.total_dbias);
  }
  auto store = [&](const std::vector<std::vector<double>>& shares, void* to) {
    for (int64_t i = 0; to != nullptr && i < width; ++i) {
      double total = 0;
      for (const auto& share : shares)
        if (!share.empty()) total += share[i];
      static_cast<A*>(to)[i] = static_cast<A>(total);
    }
  };
  store(dweights, dweight), store(dbiases, dbias);
}

}  // namespace
}  // namespace normpass

NORMPASS_EXPORT int normpass_row_norm_act_backward(void* dx, void* dweight, void* dbias, const void* grad, const void* x,
                                                   const void* weight, const void* bias, const void* mean,
                                                   const void* var, double eps, int activation, double arg0,
                                                   double arg1, int64_t rows, int64_t width, int is_centred, int dtype,
                                                   int threads) {
  using namespace normpass;
  return with_dtype(dtype, [&](auto* storage) {
    using S = std::remove_pointer_t<decltype(storage)>;
    using A = Wide<S>;
    backward<S>({rows, width, is_centred != 0},
                {static_cast<S*>(dx), static_cast<const S*>(grad), static_cast<const S*>(x)}, dweight, dbias,
                static_cast<const A*>(weight), static_cast<const A*>(bias), static_cast<const A*>(mean),
                static_cast<const A*>(var), eps, Activated<A>({activation, arg0, arg1}), threads);
  });
}
