"""The mask of a residual join in plain torch: one bit an element, as `cuda/mask.cuh` lays it out.

    z = act(norm(x) + residual), act' one of two numbers  ⇒  backward reads 1 bit in place of the residual's 16 to 64

For an activation with a `TwoSlopes` in the table. A byte has the 8 bits of neighbouring positions of a channel, or of a
vector of channels, counted from the end.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from normpass.kernels.activations import RULES
from normpass.kernels.contract import Layout
from normpass.kernels.cuda.geometry import as_walked, vector_of

BITS = 8


def bytes_of_mask(layout: Layout, itemsize: int) -> int:
    """An eighth of the values; positions that do not fill a byte have one."""
    lines, positions, vector = _shape(layout, itemsize)
    return lines * -(-positions * vector // BITS)


def packed(passes: Tensor, itemsize: int) -> Tensor:
    """The mask, bytes, of an (outer, channels, inner) tensor of booleans."""
    layout = Layout(*passes.shape)
    lines, positions, vector = _shape(layout, itemsize)
    bits = _lines(passes.view(as_walked(layout)), lines, vector).flip(1).reshape(lines, positions * vector)
    filled = F.pad(bits, (0, -bits.shape[1] % BITS)).view(lines, -1, BITS)
    found = (filled.to(torch.uint8) << torch.arange(BITS, dtype=torch.uint8, device=passes.device)).sum(2)
    return (found.t() if _is_rows(layout) else found).to(torch.uint8).flatten()


def unpacked(mask: Tensor, layout: Layout, itemsize: int) -> Tensor:
    """Booleans, (outer, channels, inner)."""
    lines, positions, vector = _shape(layout, itemsize)
    found = mask.view(-1, lines).t() if _is_rows(layout) else mask.view(lines, -1)
    bits = found.unsqueeze(2) >> torch.arange(BITS, dtype=torch.uint8, device=mask.device) & 1
    filled = bits.flatten(1)[:, : positions * vector].view(lines, positions, vector).flip(1)
    return _from_lines(filled, as_walked(layout)).reshape(layout).bool().contiguous()


def gradient_by_mask(grad: Tensor, passes: Tensor, activation: str, args: Sequence[float]) -> Tensor:
    """dL/dy from dL/dz; differentiable in `grad`, as is all that depends on y almost everywhere."""
    slopes = RULES[activation].two_slopes
    assert slopes is not None
    return torch.where(passes, grad, slopes.below(grad, *args))


def _is_rows(layout: Layout) -> bool:
    return as_walked(layout).inner == 1


def _shape(layout: Layout, itemsize: int) -> tuple[int, int, int]:
    """Lines of a byte each, of channels or of vectors of them; positions of a line, values at each."""
    outer, channels, inner = as_walked(layout)
    vector = vector_of(layout, itemsize)
    return (channels // vector, outer, vector) if inner == 1 else (channels, outer * inner // vector, vector)


def _lines(values: Tensor, lines: int, vector: int) -> Tensor:
    """(lines, positions, vector) from what is walked."""
    if values.shape[2] == 1:
        return values.reshape(-1, lines, vector).transpose(0, 1)
    return values.transpose(0, 1).reshape(lines, -1, vector)


def _from_lines(bits: Tensor, walked: Layout) -> Tensor:
    if walked.inner == 1:
        return bits.transpose(0, 1)
    return bits.reshape(walked.channels, walked.outer, walked.inner).transpose(0, 1)
