"""Single tiles of a 3×3 convolution by the vendor's: those that Winograd's products would not give exactly enough.

    y[tile]  ⇐  conv(window of x)      2×2 results from the 4×4 values that they depend on

The windows are gathered into one batch, with zeros where they lie outside of x.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TILE, WINDOW = 2, 4


def compute_tiles(
    y: Tensor, tiles: Tensor, x: Tensor, padding: Sequence[int], convolve: Callable[[Tensor], Tensor]
) -> None:
    """Write the results of some tiles to `y`.

    Args:
        y: the result of the convolution, (N, O, H, W).
        tiles: their numbers, counted row by row and sample by sample, int64.
        x: (N, C, *), which is convolved; padding: rows and columns of zeros around it.
        convolve: makes (tiles, O, 2, 2) of windows (tiles, C, 4, 4).
    """
    wide = (y.shape[3] + TILE - 1) // TILE
    tall = (y.shape[2] + TILE - 1) // TILE
    tiles = tiles.sort().values  # their order is that of the threads, and the vendor may round by place
    sample = tiles // (tall * wide)
    corner = [tiles // wide % tall * TILE, tiles % wide * TILE]
    found = convolve(_gather(x, sample, [c - p for c, p in zip(corner, padding, strict=True)]))
    samples, rows, columns = _pixels(sample, corner, TILE)
    there = (rows < y.shape[2]) & (columns < y.shape[3])
    target = y.permute(0, 2, 3, 1)
    target[samples[there], rows[there], columns[there]] = found.permute(0, 2, 3, 1)[there]


def _gather(x: Tensor, sample: Tensor, corner: Sequence[Tensor]) -> Tensor:
    """Windows (tiles, C, 4, 4) of x from `corner`, rows and columns, on."""
    samples, rows, columns = _pixels(sample, corner, WINDOW)
    tall, wide = x.shape[2:]
    outside = (rows < 0) | (rows >= tall) | (columns < 0) | (columns >= wide)
    found = x.permute(0, 2, 3, 1)[samples, rows.clamp(0, tall - 1), columns.clamp(0, wide - 1)]
    return found.masked_fill_(outside.unsqueeze(-1), 0).permute(0, 3, 1, 2)


def _pixels(sample: Tensor, corner: Sequence[Tensor], edge: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, row and column of every pixel of squares of `edge` pixels, each (tiles, edge, edge)."""
    steps = torch.arange(edge)
    rows = corner[0].view(-1, 1, 1) + steps.view(-1, 1)
    columns = corner[1].view(-1, 1, 1) + steps
    return tuple(torch.broadcast_tensors(sample.view(-1, 1, 1), rows, columns))  # type: ignore[return-value]
