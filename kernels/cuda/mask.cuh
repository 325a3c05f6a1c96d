// One bit an element: on which side of its kink the activation of a residual join was, for a backward that then reads
// neither the residual nor computes y again. Where act' is one of two numbers (ReLU, hardtanh, leaky ReLU) that is all
// it needs to know.
//
// A byte has 8 values, GROUP vectors at neighbouring positions, counted from the end as the forward's walk visits them.
// So one thread of the forward writes whole bytes in every layout, and neighbouring threads neighbouring bytes.
//
//   rows     byte[position / GROUP][vector of channels]        planes     byte[channel][position / GROUP]
//   bit (position modulo GROUP)·VECTOR + i is value i of the vector
//
// normpass/kernels/masks.py is the same in torch.
//
// Macro: NORMPASS_MASKED, 1 where there is a mask.
#pragma once

#include "walk.cuh"

#ifndef NORMPASS_MASKED
#define NORMPASS_MASKED 0
#endif

namespace normpass {

// Positions whose vectors fill a byte.
template <int VECTOR> NORMPASS_DEVICE constexpr int group_of() { return 8 / VECTOR; }

// Where the byte of a position, counted from the end, lies in the mask.
template <int VECTOR, bool ROWS>
NORMPASS_DEVICE long long byte_of(const Grid& grid, long long channel, unsigned long long position) {
  constexpr unsigned GROUP = group_of<VECTOR>();
  long long group = position / GROUP;
  if (ROWS) return group * (grid.channels / VECTOR) + channel / VECTOR;
  return channel * ((static_cast<unsigned long long>(grid.positions) + GROUP - 1) / GROUP) + group;
}

// The bits of the vector that `walk` is at; that of value i is bit i.
template <int VECTOR, bool ROWS>
NORMPASS_DEVICE unsigned bits_at(const unsigned char* mask, const Walk<VECTOR, ROWS>& walk, const Grid& grid,
                                 bool backward) {
  unsigned long long position = backward ? walk.position : grid.positions - 1 - walk.position;
  unsigned shift = position % group_of<VECTOR>() * VECTOR;
  return mask[byte_of<VECTOR, ROWS>(grid, walk.channel, position)] >> shift;
}

}  // namespace normpass
