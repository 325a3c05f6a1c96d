"""Layouts, accumulation dtypes and argument checks that every op of this package shares."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import make_channels_last_strides_for, make_contiguous_strides_for, suggest_memory_format
from torch.utils._python_dispatch import _disable_current_modes

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}

STATISTICS_DTYPES = (torch.float32, torch.float64)


def memory_format_of(x: Tensor) -> torch.memory_format:
    """The memory format in which ATen's batch norm gives its result for `x` of shape (N, C, *).

    Of a dense `x` its own, and where both hold, as for a map of 1×1, contiguous; of a part of something
    `channels_last` that; contiguous for strides that are neither. Convolutions and concatenations decide otherwise
    where both hold: see `convolution_format` and `normpass.ops.pieces`.
    """
    candidate = _CHANNELS_LAST.get(x.dim())
    if candidate is None or x.is_contiguous():
        return torch.contiguous_format
    return candidate if x.is_contiguous(memory_format=candidate) else suggest_memory_format(x)


def activated_format(x: Tensor, activation: str) -> torch.memory_format:
    """That of an activation behind a norm of `x`.

    A pointwise function of ATen gives what is dense in both formats as contiguous. (Its strides differ along
    dimensions of one value only; but a convolution behind it goes by them.)
    """
    memory_format = memory_format_of(x)
    if activation == "identity" or memory_format is torch.contiguous_format or not is_dense_in_both(x.shape):
        return memory_format
    return torch.contiguous_format


def new_result(x: Tensor, activation: str) -> Tensor:
    """Memory for an activation behind a norm of `x`."""
    return torch.empty_like(x, memory_format=activated_format(x, activation))


def is_dense_in_both(shape: Sequence[int]) -> bool:
    """Whether (N, C, *) lies alike in both memory formats: one channel, or one value a channel of a sample."""
    return shape[1] == 1 or all([size == 1 for size in shape[2:]])


def suggested_format(x: Tensor) -> torch.memory_format:
    """`Tensor.suggest_memory_format()` of ATen, which Python cannot call."""
    candidate = _CHANNELS_LAST.get(x.dim())
    if candidate is None:
        return torch.contiguous_format
    is_last, is_first = x.is_contiguous(memory_format=candidate), x.is_contiguous()
    if is_first and not is_last:
        return torch.contiguous_format
    return candidate if is_last and not is_first and 1 not in x.shape else suggest_memory_format(x)


def convolution_format(x: Tensor, weight: Tensor) -> torch.memory_format:
    """The memory format in which ATen gives the result of a convolution on the CPU: that of `x` or of `weight`."""
    own = suggested_format(x)
    return suggested_format(weight) if own is torch.contiguous_format else own


def dense_in(x: Tensor, memory_format: torch.memory_format) -> Tensor:
    """`x` dense in `memory_format`, along dimensions of one value too."""
    x = x.contiguous(memory_format=memory_format)
    if memory_format is torch.contiguous_format and x.dim() in _CHANNELS_LAST and is_dense_in_both(x.shape):
        return x.view(-1).view(x.shape)
    return x


def sum_lies_as_norm(x: Tensor, residual: Tensor, sum_into: str) -> bool:
    """Whether the norm of `x` plus `residual` lies as the norm alone, in the format that `memory_format_of` names.

    `sum_into`: which of the two is written over, "norm" or "residual"; "residual +" where it comes first.
    """
    memory_format = memory_format_of(x)
    if memory_format is not torch.contiguous_format and is_dense_in_both(x.shape):
        return False  # which of the two formats it is depends on who wrote where
    if sum_into == "norm" or (residual.is_contiguous(memory_format=memory_format) and 1 not in x.shape):
        return True
    if sum_into == "residual":
        return is_canonical(residual, memory_format)
    shape, strides = tuple(x.shape), residual.stride()
    if all([type(n) is int for n in (*shape, *strides)]):
        return _sum_is_canonical(shape, strides, memory_format, sum_into == "residual +")
    return _follows(residual, memory_format)


def lies_as_new(t: Tensor) -> bool:
    """Whether a pointwise function of ATen lays out its result as `t`, as far as `t` is dense in a memory format."""
    memory_format = memory_format_of(t)
    return not t.is_contiguous(memory_format=memory_format) or is_canonical(t, memory_format)


def is_canonical(t: Tensor, memory_format: torch.memory_format) -> bool:
    """Whether the strides of `t` are those of a new tensor, along dimensions of one value too."""
    is_last = memory_format is not torch.contiguous_format
    new = make_channels_last_strides_for(t.shape) if is_last else make_contiguous_strides_for(t.shape)
    return all([a == b for a, b in zip(t.stride(), new, strict=True)])


@functools.lru_cache(maxsize=4096)
def _sum_is_canonical(
    shape: tuple[int, ...], strides: tuple[int, ...], memory_format: torch.memory_format, is_first: bool
) -> bool:
    """Whether a tensor in `memory_format` plus one of these strides lies in that format: ATen is asked."""
    with _disable_current_modes():
        norm = torch.empty(shape, device="meta", memory_format=memory_format)
        residual = torch.empty_strided(shape, strides, device="meta")
        found = residual + norm if is_first else norm + residual
    return found.stride() == norm.stride()


def _follows(x: Tensor, memory_format: torch.memory_format) -> bool:
    """Whether the dimensions of `x` follow each other in memory as in `memory_format`, perhaps with gaps."""
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
