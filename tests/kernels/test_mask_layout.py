"""The mask of a residual join in plain torch; the CUDA kernels are held against it in test_cuda_emulated.py."""

from __future__ import annotations

import pytest
import torch

from normpass.kernels.contract import Layout
from normpass.kernels.masks import bytes_of_mask, packed, unpacked

LAYOUTS = [
    *(Layout(700, 24, 1), Layout(333, 5, 1), Layout(90, 100, 1), Layout(1, 7, 1), Layout(1, 1, 1), Layout(3, 6, 1)),
    *(Layout(6, 3, 49), Layout(3, 5, 196), Layout(9, 24, 8), Layout(500, 1, 9), Layout(7, 3, 3), Layout(0, 8, 1)),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "x".join(map(str, layout)))
def test_what_is_packed_comes_back(layout):
    passes = torch.rand(layout, generator=torch.Generator().manual_seed(0)) > 0.5
    for size in (2, 4, 8):
        mask = packed(passes, size)
        assert mask.dtype is torch.uint8 and mask.shape == (bytes_of_mask(layout, size),)
        assert torch.equal(unpacked(mask, layout, size), passes)


def test_an_eighth_of_a_byte_an_element():
    for layout in (Layout(700, 24, 1), Layout(9, 24, 8), Layout(4, 3, 196)):
        values = layout.outer * layout.channels * layout.inner
        assert all(bytes_of_mask(layout, size) == -(-values // 8) for size in (2, 4, 8))


def test_bits_lie_as_the_kernels_have_them():
    """Positions from the end; of rows, vectors of channels side by side; what fills no byte is 0."""
    rows = torch.zeros(3, 8, 1, dtype=torch.bool)
    rows[2, 0], rows[1, 7] = True, True
    assert packed(rows, 2).tolist() == [1, 128, 0]
    assert packed(rows, 4).tolist() == [1, 128, 0, 0]  # vectors of 4: two rows a byte, two vectors side by side
    planes = torch.zeros(1, 2, 9, dtype=torch.bool)
    planes[0, 0, 8], planes[0, 1, 0] = True, True
    assert packed(planes, 2).tolist() == [1, 0, 0, 1]
