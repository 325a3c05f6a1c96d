"""How a grid of blocks walks over a tensor; `cuda/walk.cuh` is the other half."""

from __future__ import annotations

import functools
from typing import NamedTuple

from normpass.kernels.contract import Layout

THREADS = 512
"""Of a block; as in `cuda/walk.cuh`. One block a multiprocessor."""

WIDEST_TILE = 32
"""Vectors of channels side by side in a block: 512 bytes of each row."""


MOST_ROUNDS = 8
GOOD_SHARE = 0.95
"""Of the multiprocessors' time until the last block is done, counting blocks alone."""


class Geometry(NamedTuple):
    """How a grid walks over one layout; `cuda/walk.cuh` says what the numbers mean."""

    rows: bool
    vector: int
    tiles: int
    slabs: int
    parameters: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def geometry(layout: Layout, itemsize: int, alignment: int, multiprocessors: int, group: int = 1) -> Geometry:
    """The widest accesses that divide the layout and `alignment` bytes, and about one block a multiprocessor.

    `group`: positions that a thread visits behind one another.
    """
    outer, channels, inner = as_walked(layout)
    vector = vector_of(layout, itemsize, alignment)
    if inner == 1:
        return geometry_of_rows(outer, channels, vector, multiprocessors, group)
    plane = inner // vector
    positions, last = outer * plane, (outer - 1) * channels * inner + inner - vector
    slabs = _slabs(channels, -(-positions // (THREADS * group)), multiprocessors)
    step = slabs * THREADS * group
    stride = step // plane * channels * inner + step % plane * vector
    return Geometry(False, vector, channels, slabs, (channels, 1, positions, plane, step % plane, stride, last))


def geometry_of_rows(rows: int, channels: int, vector: int, multiprocessors: int, group: int = 1) -> Geometry:
    """The same of (rows, channels) in accesses of `vector` values, a divisor of the channels."""
    columns = channels // vector
    tiles = -(-columns // WIDEST_TILE)
    width = -(-columns // tiles)
    tiles = -(-columns // width)
    height = THREADS // width
    slabs = _slabs(tiles, -(-rows // (height * group)), multiprocessors)
    stride = slabs * height * group * channels
    return Geometry(True, vector, tiles, slabs, (channels, width, rows, 1, 0, stride, (rows - 1) * channels))


def as_walked(layout: Layout) -> Layout:
    """A single channel is one plane, however it is stored."""
    outer, channels, inner = layout
    return Layout(1, 1, outer * inner) if channels == 1 else layout


def vector_of(layout: Layout, itemsize: int, alignment: int = 16) -> int:
    """Values of the widest access."""
    _, channels, inner = as_walked(layout)
    vector = max(min(16, alignment) // itemsize, 1)
    while (channels if inner == 1 else inner) % vector:
        vector //= 2
    return vector


def _slabs(tiles: int, most: int, multiprocessors: int) -> int:
    """Slabs of each tile, at most `most`: one block for every multiprocessor, or a few rounds without a poor last."""
    first = min(max(multiprocessors // tiles, 1), most)
    best, best_share = first, 0.0
    for slabs in range(first, most + 1):
        rounds = -(-tiles * slabs // multiprocessors)
        if rounds > MOST_ROUNDS:
            break
        share = tiles * slabs / (rounds * multiprocessors)
        if share > best_share:
            best, best_share = slabs, share
        if best_share >= GOOD_SHARE:
            break
    return best
