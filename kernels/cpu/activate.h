// An activation over a run of values, with the norm and the residual before it: one loop for each activation and wide
// type (activate.cpp), behind a pointer. The kernels have only those loops inside that cost little; of the others they read
// what such a loop has left in the cache. So the costly loops are compiled once, not once for every kernel.
#pragma once

#include "affine.h"

namespace normpass {

struct ActivationCall {
  int code;
  double arg0, arg1;
};

enum ActivationCode : int {
#define NORMPASS_CODE(CODE, NAME, TYPE) NAME##_code = CODE,
  NORMPASS_FOR_EACH_ACTIVATION(NORMPASS_CODE)
#undef NORMPASS_CODE
};

// y = (x − mean)·scale + shift + residual, of n values. What is null is not there. (No struct in it: fields that are
// written one by one and copied together are not forwarded, see tile.h.)
template <class A> struct Run {
  const A *x, *residual, *grad;
  A* result;
  const A *mean, *scale, *shift;
  int64_t step = 0;  // of mean, scale and shift there are as many values as of x (1), or a line for all lines of x (0)
  int64_t n = 0;
  // What will be read next, to be asked for while these are computed with: so many values further for every vector.
  const A *next_x = nullptr, *next_grad = nullptr;
  int64_t next_x_step = 0, next_grad_step = 0;
  A *dy = nullptr, *dy_sums = nullptr, *centred_sums = nullptr;  // of `both`
};

template <class A> NORMPASS_ALWAYS_INLINE void prefetch_line(const A* next, int64_t step, int64_t begin) {
  for (int64_t i = 0; i < line<A> / lanes<A>; ++i) __builtin_prefetch(next + (begin / lanes<A> + i) * step, 0, 2);
}

template <class A> struct ActivationLoops {
  using Loop = void (*)(const ActivationCall&, const Run<A>&);
  Loop value[2][2];     // [step][whether there is a residual]: result = act(y)
  Loop gradient[2][2];  // result = grad·act'(y)
  // result = act(y), dy = grad·act'(y); the step is 0, there is no residual. For every value of a line the sums of dy and
  // of dy·(x − mean) of all lines are added to those that are there. In place, for no line may be there twice.
  Loop both;
  Loop inverse;  // result = act⁻¹(x)
  bool is_costly;
};

const ActivationLoops<float>* activation_loops(float);
const ActivationLoops<double>* activation_loops(double);

// A line of one value.
template <class A> struct LineOf {
  alignas(64) A values[line<A>];
  constexpr explicit LineOf(A value) : values{} {
    for (int64_t i = 0; i < line<A>; ++i) values[i] = value;
  }
};

// One activation.
template <class A> class Activated {
 public:
  explicit Activated(const ActivationCall& call) : call_(call), loops_(activation_loops(A()) + call.code) {}
  const ActivationCall& call() const { return call_; }
  bool is_costly() const { return loops_->is_costly; }
  // Calls f with it, where it is costly with the identity.
  template <class F> NORMPASS_ALWAYS_INLINE void with_cheap(F f) const {
    switch (call_.code) {
#define NORMPASS_CASE(CODE, NAME, TYPE)                                            \
  case CODE:                                                                       \
    if constexpr (!TYPE<A>::is_costly) return f(TYPE<A>(call_.arg0, call_.arg1)); \
    else break;
      NORMPASS_FOR_EACH_ACTIVATION(NORMPASS_CASE)
#undef NORMPASS_CASE
    }
    f(Identity<A>(0, 0));
  }
  bool is_leaky_relu() const { return call_.code == leaky_relu_code; }
  LeakyRelu<A> leaky_relu() const { return LeakyRelu<A>(call_.arg0, call_.arg1); }
  // z = act(y) and dy = grad·act'(y), of the runs of a tile.
  template <class PerChannel>
  void value(const Runs<A>& x, const Runs<A>& residual, const Target<A>& z, int runs, int64_t n,
             const AffineAt<PerChannel>& at) const {
    each_run({nullptr, 0}, x, residual, z, runs, n, at, loops_->value);
  }
  template <class PerChannel>
  void gradient(const Runs<A>& grad, const Runs<A>& x, const Runs<A>& residual, const Target<A>& dy, int runs,
                int64_t n, const AffineAt<PerChannel>& at) const {
    each_run(grad, x, residual, dy, runs, n, at, loops_->gradient);
  }
  void value(const Run<A>& run) const { loops_->value[run.step][run.residual != nullptr](call_, run); }
  void gradient(const Run<A>& run) const { loops_->gradient[run.step][run.residual != nullptr](call_, run); }
  void both(const Run<A>& run) const { loops_->both(call_, run); }
  void inverse(const Run<A>& run) const { loops_->inverse(call_, run); }

 private:
  using Loop = typename ActivationLoops<A>::Loop;

  template <class PerChannel>
  void each_run(const Runs<A>& grad, const Runs<A>& x, const Runs<A>& residual, const Target<A>& result, int runs,
                int64_t n, const AffineAt<PerChannel>& at, const Loop (&loops)[2][2]) const {
    const int64_t ahead = runs == 1 ? tile_size : runs * x.stride;
    const int64_t grad_ahead = runs == 1 ? tile_size : runs * grad.stride;
    if constexpr (std::is_same<PerChannel, OnePerValue<A>>::value) {
      Run<A> run{x.values, residual.values, grad.values, result.values, at.mean.values, at.scale.values,
                 at.shift.values, 1, n, x.values + ahead, grad.values + grad_ahead, lanes<A>, lanes<A>};
      go(run, runs, x.stride, residual.stride, grad.stride, result.stride, loops[1][residual.values != nullptr]);
    } else {
      const LineOf<A> mean(at.mean.value), scale(at.scale.value), shift(at.shift.value);
      Run<A> run{x.values, residual.values, grad.values, result.values, mean.values, scale.values, shift.values, 0, n,
                 x.values + ahead, grad.values + grad_ahead, lanes<A>, lanes<A>};
      go(run, runs, x.stride, residual.stride, grad.stride, result.stride, loops[0][residual.values != nullptr]);
    }
  }
  void go(Run<A>& run, int runs, int64_t x, int64_t residual, int64_t grad, int64_t result, Loop loop) const {
    for (int i = 0; i < runs; ++i) {
      loop(call_, run);
      run.x += x, run.grad += grad, run.residual += residual, run.result += result;
      run.next_x += x, run.next_grad += grad;
    }
  }

  ActivationCall call_;
  const ActivationLoops<A>* loops_;
};

}  // namespace normpass
