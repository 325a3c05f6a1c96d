// z = act((x − mean)·a + bias + residual), with a = weight/sqrt(var + eps): one read of each input, one write. For an
// affine with slopes a PReLU stands for the activation, and there is no residual.
#pragma once

#include "activate.h"
#include "prelu.h"

namespace normpass {

template <class S, class Walk>
void norm_act(const Walk& walk, S* z, const S* x, const S* residual, const Affine<Wide<S>>& affine,
              const Activated<Wide<S>>& activated, bool streamed, int threads) {
  using A = Wide<S>;
#pragma omp parallel num_threads(threads)
  {
    alignas(64) A wide_x[tile_size], wide_residual[tile_size], buffer[tile_size];
    walk.template tiles<S>(omp_get_thread_num(), omp_get_num_threads(), [&](const Tile& tile) {
      Runs<A> from = read_tile(x, 0, wide_x, tile), added{nullptr, 0};
      if (residual != nullptr) added = read_tile(residual, 0, wide_residual, tile);
      Target<A> target = target_of(z, 0, buffer, tile, streamed);
      auto at = affine_at(walk, affine, tile.position);
      if (affine.slope.empty()) activated.value(from, added, target, 1, tile.n, at);
      else prelu(from, target, tile.n, at, walk.at(affine.slope, tile.position));
      finish_tile(z, target, tile);
    });
    if (streamed) end_of_stream();
  }
}

}  // namespace normpass
