// The loops of activate.h, line by line. The last line begins earlier where it would not be full: to write a value twice
// changes nothing.
#include "activate.h"

namespace normpass {
namespace {

template <class A> Run<A> part_of(const Run<A>& run, int64_t begin, int64_t n) {
  const int64_t channel = begin * run.step;
  auto from = [begin](auto* values) { return values == nullptr ? nullptr : values + begin; };
  return {from(run.x), from(run.residual), from(run.grad), run.result + begin, run.mean + channel, run.scale + channel,
          run.shift + channel, run.step, n, run.next_x, run.next_grad, 0, 0, from(run.dy), run.dy_sums, run.centred_sums};
}

// A run whose last line cannot begin earlier, for it has no other or is written in place.
template <class A> bool is_apart(const Run<A>& run) {
  return run.n < line<A> || (run.n % line<A> != 0 && (run.result == run.x || run.result == run.grad));
}

// Such a run: its lines as they are, and what fills none as a copy.
template <class A, class Loop> void apart(const ActivationCall& call, const Run<A>& run, Loop loop) {
  const int64_t whole = run.n / line<A> * line<A>;
  if (whole > 0) loop(call, part_of(run, 0, whole));
  const Run<A> rest = part_of(run, whole, run.n - whole);
  Run<A> copy = part_of(run, whole, line<A>);
  alignas(64) A x[line<A>] = {}, residual[line<A>] = {}, grad[line<A>] = {}, result[line<A>], dy[line<A>];
  auto read = [&rest](const A* from, A* to) {
    if (from != nullptr) std::memcpy(to, from, rest.n * sizeof(A));
  };
  read(rest.x, x), read(rest.residual, residual), read(rest.grad, grad);
  copy.x = x, copy.residual = residual, copy.grad = grad, copy.result = result, copy.dy = dy;
  loop(call, copy);
  auto write = [&rest](const A* from, A* to) {
    if (to != nullptr) std::memcpy(to, from, rest.n * sizeof(A));
  };
  write(result, rest.result), write(dy, rest.dy);
}

// The per-channel values of a run. A line is copied: then the compiler knows that no result is written there.
template <class A, int STEP> struct ChannelsOf {
  const A *mean, *scale, *shift;
  explicit ChannelsOf(const Run<A>& run) : mean(run.mean), scale(run.scale), shift(run.shift) {}
};
template <class A> struct ChannelsOf<A, 0> {
  alignas(64) A mean[line<A>], scale[line<A>], shift[line<A>];
  explicit ChannelsOf(const Run<A>& run) {
    std::memcpy(mean, run.mean, sizeof(mean));
    std::memcpy(scale, run.scale, sizeof(scale));
    std::memcpy(shift, run.shift, sizeof(shift));
  }
};

template <class A, class Activation, int STEP, bool ADDS>
void value(const ActivationCall& call, const Run<A>& run) {
  if (is_apart(run)) return apart(call, run, value<A, Activation, STEP, ADDS>);
  const Activation activation(call.arg0, call.arg1);
  const ChannelsOf<A, STEP> channels(run);
  const A *x = run.x, *residual = run.residual;
  A* const result = run.result;
  const A* next_x = run.next_x;
  const int64_t last = run.n - line<A>, x_step = run.next_x_step;
  for (int64_t begin = 0;; begin = std::min(begin + line<A>, last)) {
    prefetch_line(next_x, x_step, begin);
    if (ADDS) __builtin_prefetch(residual + begin + tile_size, 0, 2);
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = 0; i < line<A>; ++i) {
      const int64_t at = begin + i, c = STEP * begin + i;
      A y = multiply_add(x[at] - channels.mean[c], channels.scale[c], channels.shift[c]);
      if (ADDS) y += residual[at];
      result[at] = activation.value(y);
    }
    if (begin == last) return;
  }
}

template <class A, class Activation, int STEP, bool ADDS>
void gradient(const ActivationCall& call, const Run<A>& run) {
  if (is_apart(run)) return apart(call, run, gradient<A, Activation, STEP, ADDS>);
  const Activation activation(call.arg0, call.arg1);
  const ChannelsOf<A, STEP> channels(run);
  const A *x = run.x, *residual = run.residual, *grad = run.grad;
  A* const result = run.result;
  const A *next_x = run.next_x, *next_grad = run.next_grad;
  const int64_t last = run.n - line<A>, x_step = run.next_x_step, grad_step = run.next_grad_step;
  for (int64_t begin = 0;; begin = std::min(begin + line<A>, last)) {
    prefetch_line(next_x, x_step, begin);
    prefetch_line(next_grad, grad_step, begin);
    if (ADDS) __builtin_prefetch(residual + begin + tile_size, 0, 2);
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = 0; i < line<A>; ++i) {
      const int64_t at = begin + i, c = STEP * begin + i;
      A y = multiply_add(x[at] - channels.mean[c], channels.scale[c], channels.shift[c]);
      if (ADDS) y += residual[at];
      result[at] = activation.gradient(grad[at], y);
    }
    if (begin == last) return;
  }
}

// By loops of their own value and gradient would compute the same exponentials.
template <class A, class Activation> void both(const ActivationCall& call, const Run<A>& run) {
  if (is_apart(run)) return apart(call, run, both<A, Activation>);
  const Activation activation(call.arg0, call.arg1);
  const ChannelsOf<A, 0> channels(run);
  const A *x = run.x, *grad = run.grad;
  A *const result = run.result, *const dy = run.dy;
  const A *next_x = run.next_x, *next_grad = run.next_grad;
  const int64_t last = run.n - line<A>, x_step = run.next_x_step, grad_step = run.next_grad_step;
  alignas(64) A dy_sums[line<A>] = {}, centred_sums[line<A>] = {};
  for (int64_t begin = 0;; begin += line<A>) {
    prefetch_line(next_x, x_step, begin);
    prefetch_line(next_grad, grad_step, begin);
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = 0; i < line<A>; ++i) {
      const int64_t at = begin + i;
      const A centred = x[at] - channels.mean[i], y = multiply_add(centred, channels.scale[i], channels.shift[i]);
      const A gradient = activation.gradient(grad[at], y);
      result[at] = activation.value(y);
      dy[at] = gradient;
      dy_sums[i] += gradient;
      centred_sums[i] = multiply_add(gradient, centred, centred_sums[i]);
    }
    if (begin == last) break;
  }
  for (int64_t i = 0; i < line<A>; ++i) run.dy_sums[i] += dy_sums[i];
  for (int64_t i = 0; i < line<A>; ++i) run.centred_sums[i] += centred_sums[i];
}

template <class A, class Activation> void inverse(const ActivationCall& call, const Run<A>& run) {
  if (is_apart(run)) return apart(call, run, inverse<A, Activation>);
  const Activation activation(call.arg0, call.arg1);
  const A* z = run.x;
  A* const y = run.result;
  const int64_t last = run.n - line<A>;
  for (int64_t begin = 0;; begin = std::min(begin + line<A>, last)) {
    prefetch_line(run.next_x, run.next_x_step, begin);
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = begin; i < begin + line<A>; ++i) y[i] = activation.inverse(z[i]);
    if (begin == last) return;
  }
}

template <class A, class T> constexpr ActivationLoops<A> loops_of() {
  return {{{value<A, T, 0, false>, value<A, T, 0, true>}, {value<A, T, 1, false>, value<A, T, 1, true>}},
          {{gradient<A, T, 0, false>, gradient<A, T, 0, true>}, {gradient<A, T, 1, false>, gradient<A, T, 1, true>}},
          both<A, T>,
          inverse<A, T>,
          T::is_costly};
}

template <class A> constexpr ActivationLoops<A> loops[] = {
#define NORMPASS_LOOPS(CODE, NAME, TYPE) loops_of<A, TYPE<A>>(),
    NORMPASS_FOR_EACH_ACTIVATION(NORMPASS_LOOPS)
#undef NORMPASS_LOOPS
};

}  // namespace

const ActivationLoops<float>* activation_loops(float) { return loops<float>; }
const ActivationLoops<double>* activation_loops(double) { return loops<double>; }

}  // namespace normpass
