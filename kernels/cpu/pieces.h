// A concatenation along the channels that is never stored: its pieces lie dense, each for itself, and what belongs to
// the whole (z, its gradient) is dense as one tensor. Piece p has the channels from `first` on.
//
//   rows     the values of a piece in one row stand together in both: walked over in blocks of rows, one piece after
//            another
//   planes   walked over as the whole is; a plane belongs to one piece
#pragma once

#include "affine.h"

namespace normpass {

struct Piece {
  int64_t first, channels;
};

inline std::vector<Piece> pieces_of(const int64_t* channels, int64_t count) {
  std::vector<Piece> pieces(count);
  int64_t first = 0;
  for (int64_t p = 0; p < count; ++p) {
    pieces[p] = {first, channels[p]};
    first += channels[p];
  }
  return pieces;
}

// Some rows of a piece, at most tile_size values of each: `own` is the offset of the first value in the piece, `whole`
// in the concatenation.
struct Strip {
  int64_t piece, channel;  // the first channel, counted in the concatenation
  int64_t own, whole;
  int64_t rows, n;
};

// Calls f(strip) for one thread's share of the rows, blocks of `block` rows one after another; all strips of a piece in
// a block come together.
template <class F>
void strips(const Layout& layout, const std::vector<Piece>& pieces, int64_t block, int thread, int threads, F f) {
  int64_t begin = layout.outer * thread / threads, end = layout.outer * (thread + 1) / threads;
  for (int64_t row = begin; row < end; row += block) {
    int64_t rows = std::min(block, end - row);
    for (size_t p = 0; p < pieces.size(); ++p) {
      const Piece& piece = pieces[p];
      for (int64_t c = 0; c < piece.channels; c += tile_size) {
        int64_t channel = piece.first + c;
        f(Strip{static_cast<int64_t>(p), channel, row * piece.channels + c, row * layout.channels + channel, rows,
                std::min(tile_size, piece.channels - c)});
      }
    }
  }
}

// A part of one plane: as a tile of the whole, and its offset in its piece.
struct PlanePart {
  int64_t piece, own;
  Tile tile;
};

// Calls f(part) for one thread's share of the planes.
template <class S, class F>
void plane_parts(const Planes& planes, const std::vector<Piece>& pieces, int thread, int threads, F f) {
  const Layout& layout = planes.layout();
  std::vector<int64_t> owner;
  for (size_t p = 0; p < pieces.size(); ++p) owner.insert(owner.end(), pieces[p].channels, static_cast<int64_t>(p));
  planes.template tiles<S>(thread, threads, [&](const Tile& tile) {
    int64_t sample = tile.offset / (layout.channels * layout.inner);
    int64_t within = tile.offset - (sample * layout.channels + tile.position) * layout.inner;
    const Piece& piece = pieces[owner[tile.position]];
    int64_t own = (sample * piece.channels + tile.position - piece.first) * layout.inner + within;
    f(PlanePart{owner[tile.position], own, tile});
  });
}

// `count` runs of n values from `from`, widened into `buffer` where they are stored narrow.
template <class S>
Runs<Wide<S>> read_runs(const S* from, int64_t stride, Wide<S>* buffer, int count, int64_t n) {
  if constexpr (std::is_same<S, Wide<S>>::value) {
    return {from, stride};
  } else {
    for (int run = 0; run < count; ++run) widen(from + run * stride, buffer + run * tile_size, n);
    return {buffer, tile_size};
  }
}

// The rows of a strip, f(row, runs): four at a time, then one by one.
template <class F> NORMPASS_ALWAYS_INLINE void groups_of_rows(const Strip& strip, F f) {
  int64_t row = 0;
  for (; row + runs_at_once <= strip.rows; row += runs_at_once) f(row, std::integral_constant<int, runs_at_once>());
  for (; row < strip.rows; ++row) f(row, std::integral_constant<int, 1>());
}

}  // namespace normpass
