"""The pieces of a concatenation along the channels that is not stored: (N, Cᵢ, *) each, C = ΣCᵢ together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from normpass.kernels.contract import Kernels

from .activation import RULES
from .layout import check_input, is_dense_in_both, suggested_format
from .operands import PLAIN_TYPES


def are_pieces(xs: Sequence[Tensor]) -> bool:
    """Whether `xs` are one tensor or more of one dtype, on one device, whose shapes differ in the channels alone."""
    if not xs:
        return False
    first = xs[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    if len(shape) < 2:
        return False
    for x in xs:
        other = x.shape
        if len(other) != len(shape) or other[0] != shape[0] or other[2:] != shape[2:]:
            return False
        if x.dtype != dtype or x.device != device:
            return False
    return True


def check_pieces(op: str, xs: Sequence[Tensor]) -> None:
    """Raise ValueError unless `xs` are floating pieces of one concatenation."""
    if not xs:
        raise ValueError(f"normpass::{op}: `xs` must hold one tensor at least, got none")
    first = xs[0]
    check_input(op, first)
    for index, x in enumerate(xs):
        if not are_pieces((first, x)):
            raise ValueError(
                f"normpass::{op}: `xs[{index}]` must have the dtype, device and shape of `xs[0]` but for the channels, "
                f"{_kind_of(first)}, got {_kind_of(x)}"
            )


def _kind_of(x: Tensor) -> str:
    return f"{x.dtype} on {x.device} of {tuple(x.shape)}"


def channels_of(xs: Sequence[Tensor]) -> int:
    """C, of all pieces together."""
    return sum([x.shape[1] for x in xs])


def memory_format_of_pieces(xs: Sequence[Tensor]) -> torch.memory_format:
    """channels_last where all pieces are stored so, otherwise contiguous: as `torch.cat`."""
    formats = {suggested_format(x) for x in xs}
    return formats.pop() if len(formats) == 1 else torch.contiguous_format


def concatenated(xs: Sequence[Tensor]) -> Tensor:
    """The concatenation as a tensor, dense in the memory format of its pieces."""
    return torch.cat(list(xs), 1).contiguous(memory_format=memory_format_of_pieces(xs))


def new_concatenation(xs: Sequence[Tensor], memory_format: torch.memory_format) -> Tensor:
    """Memory for the norm of the concatenation, dense in `memory_format`; as contiguous where it is both."""
    first = xs[0]
    shape = (first.shape[0], channels_of(xs), *first.shape[2:])
    if is_dense_in_both(shape):
        memory_format = torch.contiguous_format
    return torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=memory_format)


def can_run_pieces(
    kernels: Kernels,
    xs: Sequence[Tensor],
    values: Sequence[Tensor | None],
    activation: str,
    activation_args: Sequence[float],
) -> bool:
    """Whether `kernels` can take these pieces and per-channel `values` as they are; see `operands.can_run`."""
    if not are_pieces(xs) or not kernels.supports(xs[0].dtype) or len(xs) > kernels.most_pieces:
        return False
    channels, device = (channels_of(xs),), xs[0].get_device()
    for x in xs:
        if x.numel() == 0:
            return False
    for t in values:
        if t is not None and (t.shape != channels or t.get_device() != device):
            return False
    for t in (*xs, *values):
        if t is not None and (type(t) not in PLAIN_TYPES or t.is_neg()):
            return False
    rule = RULES.get(activation)
    return rule is not None and len(activation_args) == len(rule.arguments)
