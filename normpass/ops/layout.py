"""Layouts, accumulation dtypes and argument checks that every op of this package shares."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

STATISTICS_DTYPES = (torch.float32, torch.float64)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format an op gives its results for the input `x` of shape (N, C, *).

    `channels_last` (4-d) or `channels_last_3d` (5-d) where `x` is stored so, or is a part of what is; otherwise
    `contiguous_format`, also for strides that are neither. Where both hold, as for a map of 1×1, the strides decide
    as they do in ATen; a stride along a dimension of size 1 means nothing and is ATen's to choose.
    """
    candidate = _CHANNELS_LAST.get(x.dim())
    if candidate is None:
        return torch.contiguous_format
    if not x.is_contiguous(memory_format=candidate):
        return torch.contiguous_format if x.is_contiguous() else suggest_memory_format(x)
    if x.is_contiguous() and x.stride(-1) == 1:
        return torch.contiguous_format
    return candidate


def lies_in_order(x: Tensor, memory_format: torch.memory_format) -> bool:
    """Whether the dimensions of `x` follow each other in memory as in `memory_format`, perhaps with gaps."""
    if x.is_contiguous(memory_format=memory_format):
        return True
    dims = range(x.dim())
    order = dims if memory_format is torch.contiguous_format else (0, *dims[2:], 1)
    strides = [x.stride(d) for d in order if x.shape[d] > 1]
    return all([first >= second > 0 for first, second in itertools.pairwise(strides)])


def empty_for_blocks(first: Tensor, count: int) -> Tensor:
    """Memory for `count` rows or samples of which `first` is a block, in its dtype and memory format."""
    options: dict[str, Any] = {"dtype": first.dtype, "device": first.device}
    return torch.empty((count, *first.shape[1:]), memory_format=memory_format_of(first), **options)


def reduced_dims(x: Tensor) -> list[int]:
    """Every dimension of `x` (N, C, *) but the channel."""
    return [0, *range(2, x.dim())]


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """`values` (C,) as a view that broadcasts along dimension 1 of `x`."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which statistics of `x` are kept: float64 for float64, float32 for anything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def in_statistics_dtype(values: Tensor | None, x: Tensor) -> Tensor | None:
    """A per-channel tensor in the dtype of `x`'s statistics (ATen wants no other); None stays None."""
    dtype = statistics_dtype(x)
    return values if values is None or values.dtype == dtype else values.to(dtype)


def or_empty(gradient: Tensor | None, grad: Tensor) -> Tensor:
    """A gradient as an op returns it: an empty tensor of shape (0,) stands for one that is not needed."""
    return grad.new_empty(0) if gradient is None else gradient


def check_input(op: str, x: Tensor) -> None:
    """Raise ValueError unless `x` is a floating tensor of shape (N, C, *)."""
    if x.dim() < 2:
        raise ValueError(f"normpass::{op}: `x` must have shape (N, C, *), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"normpass::{op}: `x` must have a floating dtype, got {x.dtype}")


def check_like(op: str, x: Tensor, name: str, other: Tensor | None) -> None:
    """Raise ValueError unless `other` is None or has the shape and the dtype of `x`."""
    if other is None:
        return
    if other.shape != x.shape:
        raise ValueError(
            f"normpass::{op}: `{name}` must have the shape of `x`, {tuple(x.shape)}, got {tuple(other.shape)}"
        )
    if other.dtype != x.dtype:
        raise ValueError(f"normpass::{op}: `{name}` must have the dtype of `x`, {x.dtype}, got {other.dtype}")


def check_per_channel(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Raise ValueError unless each of `tensors` is None or holds one value per channel of `x`."""
    expected = (x.shape[1],)
    for name, values in tensors.items():
        if values is not None and values.shape != expected:
            raise ValueError(
                f"normpass::{op}: `{name}` must have shape ({x.shape[1]},), one value per channel of `x` "
                f"{tuple(x.shape)}, got {tuple(values.shape)}"
            )
