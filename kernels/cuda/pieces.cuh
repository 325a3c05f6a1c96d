// A concatenation along the channels that is never stored: each piece lies dense for itself. The grid walks over the
// whole, and a thread keeps its channels, so that it reads one piece; where its value lies in there follows from where
// it lies in the whole.
//
// The pieces come as kernel parameters, NORMPASS_PIECES (16 or 64) of each kind, for a table in memory would have to be
// copied there first. Those that are not there end beyond all channels.
#pragma once

#include "walk.cuh"

#define NORMPASS_4(OF, NAME) OF(NAME##0), OF(NAME##1), OF(NAME##2), OF(NAME##3)
#define NORMPASS_16(OF, NAME) \
  NORMPASS_4(OF, NAME##0), NORMPASS_4(OF, NAME##1), NORMPASS_4(OF, NAME##2), NORMPASS_4(OF, NAME##3)
#define NORMPASS_64(OF, NAME) \
  NORMPASS_16(OF, NAME##0), NORMPASS_16(OF, NAME##1), NORMPASS_16(OF, NAME##2), NORMPASS_16(OF, NAME##3)
#define NORMPASS_TIMES_(COUNT, OF, NAME) NORMPASS_##COUNT(OF, NAME)
#define NORMPASS_TIMES(COUNT, OF, NAME) NORMPASS_TIMES_(COUNT, OF, NAME)
#define NORMPASS_PARAMETER(NAME) long long NAME
#define NORMPASS_NAME(NAME) NAME

#define NORMPASS_PIECE_PARAMETERS(NAME) NORMPASS_TIMES(NORMPASS_PIECES, NORMPASS_PARAMETER, NAME)
#define NORMPASS_PIECE_TABLE(NAME) \
  normpass::Table { { NORMPASS_TIMES(NORMPASS_PIECES, NORMPASS_NAME, NAME) } }

namespace normpass {

// One number for each piece: a pointer, or the channel behind its last.
struct Table {
  long long values[NORMPASS_PIECES];

  // Without an index that is not a constant, which would put the table into local memory.
  NORMPASS_DEVICE long long at(int piece) const {
    long long found = 0;
#pragma unroll
    for (int p = 0; p < NORMPASS_PIECES; ++p) found = p == piece ? values[p] : found;
    return found;
  }
  NORMPASS_DEVICE int piece_of(long long channel) const {
    int piece = 0;
#pragma unroll
    for (int p = 0; p < NORMPASS_PIECES; ++p) piece += channel >= values[p] ? 1 : 0;
    return piece;
  }
};

// From here on the value is what it is: otherwise the compiler looks it up again for every vector, among all pieces.
#ifdef __CUDA_ARCH__
template <class T> NORMPASS_DEVICE void pin(T*& value) { asm volatile("" : "+l"(value)); }
NORMPASS_DEVICE void pin(long long& value) { asm volatile("" : "+l"(value)); }
NORMPASS_DEVICE void pin(int& value) { asm volatile("" : "+r"(value)); }
#else
template <class T> NORMPASS_DEVICE void pin(T&) {}
#endif

struct Piece {
  int index;
  long long first, channels;

  NORMPASS_DEVICE Piece(const Table& ends, long long channel) : index(ends.piece_of(channel)) {
    pin(index);
    first = index == 0 ? 0 : ends.at(index - 1);
    channels = ends.at(index) - first;
    pin(first);
    pin(channels);
  }

  // Where the value at `offset` of the whole, which a forward walk is at, lies in the piece.
  template <int VECTOR, bool ROWS>
  NORMPASS_DEVICE long long own(const Walk<VECTOR, ROWS>& walk, const Grid& grid, long long offset) const {
    if (ROWS) return offset - walk.position * (grid.channels - channels) - first;
    return offset - (walk.plane * (grid.channels - channels) + first) * grid.inner * VECTOR;
  }
};

}  // namespace normpass
