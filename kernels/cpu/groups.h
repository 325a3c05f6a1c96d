// Norms whose statistics are a sample's own: those of a group of channels (group norm), of which a single channel
// (instance norm) and all channels are special cases.
//
// A unit is what can be normalized by itself and lies together: in rows a sample with all its groups, in planes as many
// groups of a sample as it takes to be worth the call. Its passes follow one another, so that a unit that fits a cache
// is read from memory once a direction.
#pragma once

#include "affine.h"

namespace normpass {

struct Groups {
  int64_t samples, groups, channels, spatial;
  bool is_rows;  // channels lie side by side: channels_last, or one value a channel

  int64_t size() const { return samples * channels * spatial; }
  int64_t channels_of_group() const { return channels / groups; }
  int64_t values_of_group() const { return channels_of_group() * spatial; }
};

struct Unit {
  int64_t offset, first_group, groups, first_channel;  // groups are counted over all samples, channels in the sample
  Layout layout;
};

constexpr int64_t values_of_unit = 1 << 14;

// Calls f(unit, threads) for all, several at once where there are enough of them.
template <class F> void each_unit(const Groups& all, int threads, F f) {
  int64_t at_once = all.groups;
  if (!all.is_rows)
    at_once = std::min(all.groups, std::max<int64_t>(1, values_of_unit / std::max<int64_t>(1, all.values_of_group())));
  const int64_t parts = (all.groups + at_once - 1) / at_once, units = all.samples * parts;
  auto run = [&](int64_t index, int of_unit) {
    const int64_t sample = index / parts, first = index % parts * at_once, count = std::min(at_once, all.groups - first);
    const int64_t channel = first * all.channels_of_group(), channels = count * all.channels_of_group();
    const Layout layout = all.is_rows ? Layout{all.spatial, channels, 1} : Layout{1, channels, all.spatial};
    f(Unit{(sample * all.channels + channel) * all.spatial, sample * all.groups + first, count, channel, layout}, of_unit);
  };
  if (units >= 4 * threads || units % threads == 0) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t index = 0; index < units; ++index) run(index, 1);
  } else {
    for (int64_t index = 0; index < units; ++index) run(index, threads);
  }
}

template <class S> bool is_streamed(const Groups& all) {
  return all.size() * static_cast<int64_t>(sizeof(S)) >= streamed_from;
}

// Per-channel values of one group have one mean and variance.
template <class A>
Affine<A> affine_of(const Groups& all, const Unit& unit, int64_t width, const A* weight, const A* bias, const A* mean,
                    const A* var, double eps, const A* slope) {
  auto from = [&](const A* values) { return values == nullptr ? nullptr : values + unit.first_channel; };
  return Affine<A>(width, unit.layout.channels, from(weight), from(bias), mean + unit.first_group,
                   var + unit.first_group, eps, all.channels_of_group(), from(slope));
}

}  // namespace normpass
