// The gradients of sample_norm_act from x, with r = rsqrt(var + eps) and m the values of a run:
//
//   plane_sums   planes: Σ dy and Σ dy·x̂ of each channel of each sample
//   gradients    dx = weight·r·dy + B·(x − mean) + C      B = −r²·S2/m,  C = −r·S1/m (0 for an RMS norm)
//
// S1 = Σ weight·dy and S2 = Σ weight·dy·x̂ over the run: of planes folded from the sums of its channels, of rows summed by
// the team that then writes dx. dresidual = dy.
//
// Macros: those of sample_norm_act.cu.
#include "team.cuh"

#include "reduce.cuh"

namespace normpass {

// The tensors of one call; null for what is absent or not wanted. `sums`: Σ dy of each plane, then Σ dy·x̂.
template <class Storage> struct SampleBackward {
  Storage *dx, *dresidual;
  Statistics<Storage>* sums;
  const Storage *grad, *x, *residual;
  Parameters<Statistics<Storage>> parameters;
};

// Vectors of what is read of one batch.
template <class Storage, int VECTOR, bool RESIDUAL> struct HeldVectors {
  static constexpr int HELD = held<Storage, VECTOR>();
  Vector<Storage, VECTOR> grad[HELD], x[HELD], residual[HELD];

  NORMPASS_DEVICE int read(const SampleBackward<Storage>& call, const Member<HELD>& member, long long first,
                           long long batch) {
    return member.each(batch, [&](int k, long long v) {
      long long offset = (first + v) * VECTOR;
      grad[k] = load<VECTOR>(call.grad + offset);
      x[k] = load<VECTOR>(call.x + offset);
      if (RESIDUAL) residual[k] = load<VECTOR>(call.residual + offset);
    });
  }

  template <class T, class Activation>
  NORMPASS_DEVICE T dy(const NormSite<T>& site, const Activation& activation, int k, int i) const {
    T y = site.y(activation, x[k][i]);
    if (RESIDUAL) y = sum_of(y, residual[k][i]);
    return activation.gradient(grad[k][i], y);
  }
};

template <class Storage, int VECTOR, bool RESIDUAL, class Activation>
NORMPASS_DEVICE void plane_sums(const SampleBackward<Storage>& call, const Activation& activation, const Runs& all) {
  using T = Statistics<Storage>;
  constexpr int HELD = held<Storage, VECTOR>();
  Member<HELD> member(all);
  if (member.run >= all.runs) return;  // here a run is one plane
  long long first = member.run * all.vectors, of = quotient(member.run, all.channels);
  RunSite<T, VECTOR, false> site(call.parameters, all, of, call.parameters.mean[of], call.parameters.var[of]);
  site.first_channel += member.run - of * all.channels;
  NormSite<T> sites[1];
  site.sites(0, sites);
  Sums<T> own;
  HeldVectors<Storage, VECTOR, RESIDUAL> now;
  for (long long batch = 0; batch < member.batches; ++batch) {
    int count = now.read(call, member, first, batch);
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      if (k >= count) break;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        T dy = now.dy(sites[0], activation, k, i);
        own.dy += dy;
        own.dy_deviation = multiply_add(dy, now.x[k][i] - site.mean, own.dy_deviation);
      }
    }
  }
  own = merged_by_team<T>(own);
  if (member.index != 0) return;
  call.sums[member.run] = own.dy;
  call.sums[all.runs + member.run] = own.dy_deviation * site.rstd;
}

// S1 and S2 of a run of planes.
template <class Storage, class Site, int HELD>
NORMPASS_DEVICE Sums<Statistics<Storage>> folded(const SampleBackward<Storage>& call, const Site& site,
                                                 const Member<HELD>& member, const Runs& all) {
  Sums<Statistics<Storage>> own;
  for (long long c = member.index; c < all.channels; c += TEAM) {
    long long at = member.run * all.channels + c;
    Statistics<Storage> weight = call.parameters.weight_of(site.first_channel + c);
    own.dy += weight * call.sums[at];
    own.dy_deviation += weight * call.sums[all.runs * all.channels + at];
  }
  return merged_by_team<Statistics<Storage>>(own);
}

template <class Storage, int VECTOR, bool ROWS, bool RESIDUAL, class Activation>
NORMPASS_DEVICE void gradients(const SampleBackward<Storage>& call, const Activation& activation, bool is_centred,
                               const Runs& all) {
  using T = Statistics<Storage>;
  constexpr int HELD = held<Storage, VECTOR>(), CHANNELS = ROWS ? VECTOR : 1;
  Member<HELD> member(all);
  if (member.run >= all.runs) return;
  long long first = member.run * all.vectors;
  RunSite<T, VECTOR, ROWS> site(call.parameters, all, member.run, call.parameters.mean[member.run],
                                call.parameters.var[member.run]);
  HeldVectors<Storage, VECTOR, RESIDUAL> now;
  bool through_sums = call.dx != nullptr;
  T slope = 0, shift = 0;

  if (through_sums) {
    Sums<T> total;
    if constexpr (ROWS) {
      Sums<T> own;
      for (long long batch = 0; batch < member.batches; ++batch) {
        int count = now.read(call, member, first, batch);
#pragma unroll
        for (int k = 0; k < HELD; ++k) {
          if (k >= count) break;
          NormSite<T> sites[CHANNELS];
          site.sites(member.vector(batch, k), sites);
#pragma unroll
          for (int i = 0; i < VECTOR; ++i) {
            T h = now.dy(sites[i], activation, k, i) * sites[i].scale;  // r too
            own.dy += h;
            own.dy_deviation = multiply_add(h, now.x[k][i] - site.mean, own.dy_deviation);
          }
        }
      }
      total = merged_by_team<T>(own);
    } else {
      total = folded(call, site, member, all);
      total.dy *= site.rstd, total.dy_deviation *= site.rstd;
    }
    // Of rows dy_deviation has r once, from the scale, and x̂ another; of planes x̂ has its own.
    T count = T(all.vectors * VECTOR);
    T unit = ROWS ? site.rstd * site.rstd : site.rstd;
    slope = -unit * (total.dy_deviation / count);
    shift = is_centred ? -(total.dy / count) : T(0);
  }

  for (long long batch = member.batches - 1 - blockIdx.y; batch >= 0; batch -= all.parts) {
    bool is_held = ROWS && through_sums && batch == member.batches - 1;
    int count = is_held ? member.count(batch) : now.read(call, member, first, batch);
#pragma unroll
    for (int k = 0; k < HELD; ++k) {
      if (k >= count) break;
      NormSite<T> sites[CHANNELS];
      site.sites(member.vector(batch, k), sites);
      T dx[VECTOR], dresidual[VECTOR];
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) {
        const NormSite<T>& at = sites[site_of<ROWS>(i)];
        T dy = now.dy(at, activation, k, i);
        dresidual[i] = dy;
        dx[i] = multiply_add(dy, at.scale, multiply_add(now.x[k][i] - site.mean, slope, shift));
      }
      long long offset = (first + member.vector(batch, k)) * VECTOR;
      if (call.dresidual != nullptr) store(call.dresidual + offset, dresidual);
      if (call.dx != nullptr) store(call.dx + offset, dx);
    }
  }
}

}  // namespace normpass

#define NORMPASS_SAMPLE_BACKWARD_PARAMETERS                                                                       \
  NORMPASS_STORAGE *__restrict__ dx, NORMPASS_STORAGE *__restrict__ dresidual,                                    \
      normpass::Statistics<NORMPASS_STORAGE> *sums, const NORMPASS_STORAGE *__restrict__ grad,                    \
      const NORMPASS_STORAGE *__restrict__ x, const NORMPASS_STORAGE *__restrict__ residual,                      \
      const normpass::Statistics<NORMPASS_STORAGE> *weight, const normpass::Statistics<NORMPASS_STORAGE> *bias,   \
      const normpass::Statistics<NORMPASS_STORAGE> *mean, const normpass::Statistics<NORMPASS_STORAGE> *var,      \
      double eps, double argument_1, double argument_2, long long is_centred, NORMPASS_RUNS_PARAMETERS

#define NORMPASS_SAMPLE_BACKWARD                                          \
  normpass::SampleBackward<NORMPASS_STORAGE> {                            \
    dx, dresidual, sums, grad, x, residual, { weight, bias, mean, var, eps } \
  }

extern "C" __global__ void __launch_bounds__(normpass::BLOCK, normpass::BLOCKS) plane_sums(NORMPASS_SAMPLE_BACKWARD_PARAMETERS) {
  normpass::NORMPASS_ACTIVATION<normpass::Statistics<NORMPASS_STORAGE>> activation(argument_1, argument_2);
  normpass::plane_sums<NORMPASS_STORAGE, NORMPASS_VECTOR, NORMPASS_RESIDUAL>(NORMPASS_SAMPLE_BACKWARD, activation,
                                                                             NORMPASS_RUNS);
}

extern "C" __global__ void __launch_bounds__(normpass::BLOCK, normpass::BLOCKS) gradients(NORMPASS_SAMPLE_BACKWARD_PARAMETERS) {
  normpass::NORMPASS_ACTIVATION<normpass::Statistics<NORMPASS_STORAGE>> activation(argument_1, argument_2);
  normpass::gradients<NORMPASS_STORAGE, NORMPASS_VECTOR, NORMPASS_ROWS, NORMPASS_RESIDUAL>(
      NORMPASS_SAMPLE_BACKWARD, activation, is_centred != 0, NORMPASS_RUNS);
}
