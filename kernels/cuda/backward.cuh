// The gradients of a norm and its activation, for any Site: a channel that knows y and the deviation u of x̂ = k·u from
// what was kept (`NormSite`: from x, u = x − mean, k = r; `OutputSite` in inplace_abn_backward.cu: from z).
//
//   reduce   dy = g·act'(y), S1 = Σdy, S2 = k·Σ dy·u; dbias = S1, dweight = S2, and what `apply` needs of them
//   apply    dx = a·dy + B·u + C    B = −a·k·S2/m,  C = −a·S1/m;  B = C = 0 for running statistics
//
// Either writes dresidual = dy where it is wanted; `reduce` also writes dx = a·dy for running statistics, so that
// each case moves every tensor as seldom as it can.
//
// The gradient of a z that was handed out twice comes in two parts, grad and other: they are added as they are read, and
// rounded as if their sum had been stored.
//
// Of a residual join act' is known from y + residual, or from the mask that forward has written (mask.cuh).
//
// Macros: those of norm_act.cu, NORMPASS_SITE, and NORMPASS_PARTS where the gradient comes in two.
#pragma once

#include "mask.cuh"
#include "norm_site.cuh"
#include "reduce.cuh"

#ifndef NORMPASS_PARTS
#define NORMPASS_PARTS 1
#endif

namespace normpass {

// The tensors of one call; null for what is absent or not wanted. `coefficients` is B for each channel, then C.
template <class Storage> struct Backward {
  Storage *dx, *dresidual;
  Statistics<Storage>*dweight, *dbias, *coefficients;
  const Storage *grad, *other, *kept, *residual;
  const unsigned char* mask;
  Parameters<Statistics<Storage>> parameters;
};

template <class Activation> struct ReadsY {
  static constexpr bool value = true;
};
template <class T> struct ReadsY<Identity<T>> {
  static constexpr bool value = false;
};

// What `apply` needs of one channel: B and C are slope and shift.
template <class T, class Site> struct Channel {
  Site site;
  T slope, shift;
};

// How many tensors are read: x or z, the parts of the gradient, the residual.
template <bool RESIDUAL> NORMPASS_DEVICE constexpr int tensors_read() { return 1 + NORMPASS_PARTS + (RESIDUAL ? 1 : 0); }

// Vectors of what is read at LOADS positions.
template <class Storage, int VECTOR, int LOADS, bool RESIDUAL> struct Batch {
  static constexpr bool ADDS = NORMPASS_PARTS == 2, MASKED = NORMPASS_MASKED;
  Vector<Storage, VECTOR> grad[LOADS], other[LOADS], kept[LOADS], residual[LOADS];
  unsigned bits[LOADS];
  long long offsets[LOADS];

  template <bool ROWS>
  NORMPASS_DEVICE int read(Walk<VECTOR, ROWS>& walk, const Backward<Storage>& call, const Grid& grid, bool backward,
                           bool reads_kept) {
    return next_vectors(walk, offsets, [&](int k, long long offset) {
      grad[k] = load<VECTOR>(call.grad + offset);
      if (ADDS) other[k] = load<VECTOR>(call.other + offset);
      if (reads_kept) kept[k] = load<VECTOR>(call.kept + offset);
      if (RESIDUAL) residual[k] = load<VECTOR>(call.residual + offset);
      if (MASKED) bits[k] = bits_at(call.mask, walk, grid, backward);
    });
  }

  template <class Site, class Activation>
  NORMPASS_DEVICE Statistics<Storage> dy(const Site& site, const Activation& activation, int k, int i) const {
    Statistics<Storage> whole = grad[k][i];
    if (ADDS) whole = as_stored(sum_of(whole, other[k][i]), Storage());
    if constexpr (MASKED) {
      return activation.gradient_if(bits[k] >> i & 1, whole);
    } else {
      Statistics<Storage> y = site.y(activation, kept[k][i]);
      if (RESIDUAL) y = sum_of(y, residual[k][i]);
      return activation.gradient(whole, y);
    }
  }
};

template <class Storage, int VECTOR, bool ROWS, class Site, bool RESIDUAL, class Activation>
NORMPASS_DEVICE void backward_reduce(const Backward<Storage>& call, const Activation& activation, double count,
                                     Statistics<Storage>* partials, unsigned* arrivals, const Grid& grid) {
  using T = Statistics<Storage>;
  constexpr int CHANNELS = ROWS ? VECTOR : 1;
  constexpr int LOADS = loads_in_flight<Vector<Storage, VECTOR>>(tensors_read<RESIDUAL>(), false);
  Walk<VECTOR, ROWS> walk(grid, false);
  Site sites[CHANNELS];
  Sums<T> own[CHANNELS];
  share_channels<T>(walk, grid, sites, [&](long long channel) { return Site(call.parameters, channel); });

  while (walk.inside()) {
    Batch<Storage, VECTOR, LOADS, RESIDUAL> batch;
    int there = batch.read(walk, call, grid, false, true);
#pragma unroll
    for (int k = 0; k < LOADS; ++k) {
      if (k >= there) break;
      T dresidual[VECTOR], dx[VECTOR];
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        int c = channel_of<ROWS>(i);
        T dy = batch.dy(sites[c], activation, k, i);
        own[c].dy += dy;
        own[c].dy_deviation =
            multiply_add(dy, sites[c].deviation(activation, batch.kept[k][i]), own[c].dy_deviation);
        dresidual[i] = dy;
        dx[i] = dy * sites[c].scale;
      }
      if (call.dresidual != nullptr) store(call.dresidual + batch.offsets[k], dresidual);
      if (call.dx != nullptr) store(call.dx + batch.offsets[k], dx);
    }
  }

  reduce<T>(walk, grid, own, partials, arrivals, [&](long long channel, const Sums<T>& sums) {
    T unit = Site::unit(call.parameters, channel);
    T gradient = sums.dy_deviation * unit;
    if (call.dbias != nullptr) call.dbias[channel] = sums.dy;
    if (call.dweight != nullptr) call.dweight[channel] = gradient;
    if (call.coefficients == nullptr) return;
    Site site(call.parameters, channel);
    call.coefficients[channel] = -(site.scale * unit) * (gradient / T(count));
    call.coefficients[channel + grid.channels] = -site.scale * (sums.dy / T(count));
  });
}

template <class Storage, int VECTOR, bool ROWS, class Site, bool RESIDUAL, class Activation>
NORMPASS_DEVICE void backward_apply(const Backward<Storage>& call, const Activation& activation, const Grid& grid) {
  using T = Statistics<Storage>;
  constexpr int CHANNELS = ROWS ? VECTOR : 1;
  constexpr int LOADS = loads_in_flight<Vector<Storage, VECTOR>>(tensors_read<RESIDUAL>(), true);
  Walk<VECTOR, ROWS> walk(grid, true);
  bool through_sums = call.coefficients != nullptr;
  Channel<T, Site> own[CHANNELS];
  share_channels<T>(walk, grid, own, [&](long long channel) {
    Channel<T, Site> result{Site(call.parameters, channel), 0, 0};
    if (through_sums) {
      result.slope = call.coefficients[channel];
      result.shift = call.coefficients[channel + grid.channels];
    }
    return result;
  });

  while (walk.inside()) {
    Batch<Storage, VECTOR, LOADS, RESIDUAL> batch;
    bool reads_kept = through_sums || (ReadsY<Activation>::value && !NORMPASS_MASKED);
    int there = batch.read(walk, call, grid, true, reads_kept);
#pragma unroll
    for (int k = 0; k < LOADS; ++k) {
      if (k >= there) break;
      T dresidual[VECTOR], dx[VECTOR];
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        int c = channel_of<ROWS>(i);
        T dy = batch.dy(own[c].site, activation, k, i);
        T rest = 0;
        if (through_sums) {
          T deviation = own[c].site.deviation(activation, batch.kept[k][i]);
          rest = multiply_add(deviation, own[c].slope, own[c].shift);
        }
        dresidual[i] = dy;
        dx[i] = multiply_add(dy, own[c].site.scale, rest);
      }
      if (call.dresidual != nullptr) store(call.dresidual + batch.offsets[k], dresidual);
      if (call.dx != nullptr) store(call.dx + batch.offsets[k], dx);
    }
  }
}

}  // namespace normpass

#define NORMPASS_BACKWARD_PARAMETERS                                                                               \
  NORMPASS_STORAGE *__restrict__ dx, NORMPASS_STORAGE *__restrict__ dresidual,                                     \
      normpass::Statistics<NORMPASS_STORAGE> *dweight, normpass::Statistics<NORMPASS_STORAGE> *dbias,              \
      normpass::Statistics<NORMPASS_STORAGE> *coefficients, const NORMPASS_STORAGE *__restrict__ grad,             \
      const NORMPASS_STORAGE *__restrict__ other, const NORMPASS_STORAGE *__restrict__ kept,                       \
      const NORMPASS_STORAGE *__restrict__ residual, const unsigned char *__restrict__ mask,                       \
      const normpass::Statistics<NORMPASS_STORAGE> *weight, const normpass::Statistics<NORMPASS_STORAGE> *bias,    \
      const normpass::Statistics<NORMPASS_STORAGE> *mean, const normpass::Statistics<NORMPASS_STORAGE> *var,       \
      double eps, double argument_1, double argument_2

#define NORMPASS_BACKWARD                                                      \
  normpass::Backward<NORMPASS_STORAGE> {                                       \
    dx, dresidual, dweight, dbias, coefficients, grad, other, kept, residual,  \
        mask, { weight, bias, mean, var, eps }                                 \
  }

extern "C" __global__ void __launch_bounds__(normpass::THREADS, 1)
    reduce(NORMPASS_BACKWARD_PARAMETERS, double count, normpass::Statistics<NORMPASS_STORAGE>* partials,
           unsigned* arrivals, NORMPASS_GRID_PARAMETERS) {
  using T = normpass::Statistics<NORMPASS_STORAGE>;
  normpass::NORMPASS_ACTIVATION<T> activation(argument_1, argument_2);
  normpass::backward_reduce<NORMPASS_STORAGE, NORMPASS_VECTOR, NORMPASS_ROWS, normpass::NORMPASS_SITE<T>,
                            NORMPASS_RESIDUAL>(NORMPASS_BACKWARD, activation, count, partials, arrivals, NORMPASS_GRID);
}

extern "C" __global__ void __launch_bounds__(normpass::THREADS, 1)
    apply(NORMPASS_BACKWARD_PARAMETERS, NORMPASS_GRID_PARAMETERS) {
  using T = normpass::Statistics<NORMPASS_STORAGE>;
  normpass::NORMPASS_ACTIVATION<T> activation(argument_1, argument_2);
  normpass::backward_apply<NORMPASS_STORAGE, NORMPASS_VECTOR, NORMPASS_ROWS, normpass::NORMPASS_SITE<T>,
                           NORMPASS_RESIDUAL>(NORMPASS_BACKWARD, activation, NORMPASS_GRID);
}
