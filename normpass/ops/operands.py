"""What stands between an op's arguments and a kernel, which wants dense memory in one layout and one dtype."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from normpass.kernels.contract import Kernels, Layout, Norm

from .activation import RULES

MaybeTensor = TypeVar("MaybeTensor", Tensor, "Tensor | None")

Options = tuple[float, bool, str, Sequence[float]]
"""eps, batch_statistics, activation and its arguments: what an op takes after its tensors."""

PLAIN_TYPES = (Tensor, Parameter)
"""The types whose memory is what it says; any other subclass may mean something else by it."""


def can_run(
    kernels: Kernels,
    x: Tensor,
    likes: Sequence[Tensor | None] = (),
    values: Sequence[Tensor | None] = (),
    activation: str = "identity",
    activation_args: Sequence[float] = (),
) -> bool:
    """Whether `kernels` can take `x` (N, C, *), `likes` of its shape and dtype and `values` (C,), as they are.

    False for what is empty, of a dtype they do not know, on several devices or a tensor subclass, and for arguments
    that do not fit: the reference, which runs then, says what is wrong. So nothing needs to be checked twice.
    """
    shape, dtype, device = x.shape, x.dtype, x.get_device()
    if type(x) not in PLAIN_TYPES or len(shape) < 2 or x.numel() == 0 or not kernels.supports(dtype):
        return False
    for t in likes:
        if t is not None and (t.shape != shape or t.dtype != dtype):
            return False
    channels = shape[1:2]
    for t in values:
        if t is not None and t.shape != channels:
            return False
    for t in (*likes, *values):  # without the dispatcher nobody resolves a negative bit
        if t is not None and (t.get_device() != device or type(t) not in PLAIN_TYPES or t.is_neg()):
            return False
    rule = RULES.get(activation)
    return rule is not None and len(activation_args) == len(rule.arguments)


def layout_of(x: Tensor, memory_format: torch.memory_format) -> Layout:
    """How `x` (N, C, *) lies in memory once it is dense in `memory_format`."""
    batch, channels, *_ = x.shape
    values = x.numel() // channels
    if memory_format is torch.contiguous_format:
        return Layout(batch, channels, values // batch)
    return Layout(values, channels, 1)


def per_channel_operand(values: MaybeTensor, dtype: torch.dtype) -> MaybeTensor:
    """A per-channel tensor as kernels read it: contiguous, in `dtype`; None stays None."""
    if values is None:
        return values
    return (values if values.dtype == dtype else values.to(dtype)).contiguous()


Values = tuple["Tensor | None", "Tensor | None", Tensor, Tensor]
"""weight, bias, mean and var of a norm, each (C,)."""


def norm_operand(
    values: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor],
    options: Options,
    dtype: torch.dtype,
    slope: Tensor | None = None,
) -> Norm:
    """A norm as kernels read it, in the statistics dtype `dtype`."""
    weight, bias, mean, var = values
    eps, _, activation, activation_args = options
    return tuple.__new__(  # in half the time of `Norm(…)`
        Norm,
        (
            per_channel_operand(weight, dtype),
            per_channel_operand(bias, dtype),
            per_channel_operand(mean, dtype),
            per_channel_operand(var, dtype),
            eps,
            activation,
            activation_args,
            slope if slope is None else per_channel_operand(slope, dtype),
        ),
    )


def dense(t: MaybeTensor, memory_format: torch.memory_format) -> MaybeTensor:
    """`t` as kernels read it: dense in `memory_format`; None stays None."""
    return t if t is None else t.contiguous(memory_format=memory_format)


def new_like(x: Tensor, memory_format: torch.memory_format, needed: bool) -> Tensor | None:
    """Memory for a result like `x`, dense in `memory_format`; None if it is not needed."""
    return torch.empty_like(x, memory_format=memory_format) if needed else None


def new_per_channel(like: Tensor | None, dtype: torch.dtype, needed: bool) -> Tensor | None:
    """Memory for the gradient of a norm's vector `like`, in the statistics dtype; None if it is not needed.

    Contiguous: kernels write it in order, and a layer norm's weight may be a transposed one.
    """
    if like is None or not needed:
        return None
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def in_dtype_of(like: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """A per-channel gradient in the dtype of its parameter."""
    if gradient is None or like is None or gradient.dtype == like.dtype:
        return gradient
    return gradient.to(like.dtype)
