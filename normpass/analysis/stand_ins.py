"""What stands for our own functions when facts are collected: what they keep and return, without what they compute.

Through the dispatcher each would take some ten milliseconds on tensors without memory, and a network has hundreds.
A stand-in gives its result and the tensors that the function writes to.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.kernels.masks import bytes_of_mask
from normpass.ops.layout import memory_format_of, new_result, statistics_dtype
from normpass.ops.norm_act import has_mask
from normpass.ops.operands import layout_of
from normpass.ops.pieces import are_pieces, channels_of, memory_format_of_pieces, new_concatenation
from normpass.recipe.notes import copying
from normpass.runtime import prelu, sample_norms
from normpass.runtime.functional import (
    FunctionalBatchNorm,
    is_fusible,
    running_of,
    running_statistics_of,
    split_norm_act,
)
from normpass.runtime.sample_norms import SampleNorm
from normpass.runtime.sharing import Producer, producer_statistics, shared_norm_act, whole_of

StandIn = Callable[..., tuple[Any, Sequence[Tensor]] | None]
"""Gives None where the function itself has to run."""


class _Keeps(torch.autograd.Function):
    """Memory for a result, with some of the arguments kept for backward."""

    @staticmethod
    def forward(ctx: Any, kept: Sequence[bool], result: Callable[[], Tensor], *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*(t for t, is_kept in zip(tensors, kept, strict=True) if is_kept))
        return result()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise AssertionError("facts are collected without a backward")


def _norm_act(
    norm: FunctionalBatchNorm,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str = "identity",
    activation_args: Sequence[float] = (),
    sum_into: str = "",
) -> tuple[Tensor, Sequence[Tensor]] | None:
    if not is_fusible(norm, x, residual, activation, sum_into):
        return None
    mask = _mask(x, residual, activation)
    rebuilds_y = activation != "identity" and not mask
    tensors = (x, residual, norm.weight, norm.bias, *_statistics(norm, x, x.shape[1]), *mask)
    kept = (True, rebuilds_y, True, rebuilds_y, *[True] * (len(tensors) - 4))
    with copying(norm.bias):
        return _Keeps.apply(kept, functools.partial(new_result, x, activation), *tensors), _moved(norm)


def _shared_norm_act(
    norm: FunctionalBatchNorm, activation: str, activation_args: Sequence[float], *producers: Producer
) -> tuple[Tensor, Sequence[Tensor]] | None:
    xs = [p.x for p in producers]
    if not are_pieces(xs) or not is_fusible(norm, whole_of(xs), None, activation):
        return None
    channels = channels_of(xs)
    tensors = (*xs, norm.weight, norm.bias, *_statistics(norm, xs[0], channels))
    with copying(norm.bias):
        result = functools.partial(new_concatenation, xs, memory_format_of_pieces(xs))
        return _Keeps.apply([True] * len(tensors), result, *tensors), _moved(norm)


def _sample_norm_act(
    norm: SampleNorm,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str = "identity",
    activation_args: Sequence[float] = (),
    sum_into: str = "",
) -> tuple[Tensor, Sequence[Tensor]] | None:
    if not sample_norms.is_fusible(norm, x, residual, activation):
        return None
    rebuilds_y = activation != "identity"
    moments = torch.empty(2 * norm.count_of_moments(x), dtype=statistics_dtype(x), device=x.device)
    tensors = (x, residual, norm.weight, norm.bias, moments)
    with copying(norm.bias):
        result = functools.partial(norm.new_result, x, activation)
        return _Keeps.apply((True, rebuilds_y, True, rebuilds_y, True), result, *tensors), norm.moved


def _norm_prelu(norm: prelu.Norm, x: Tensor, slope: Tensor) -> tuple[Tensor, Sequence[Tensor]] | None:
    if not prelu.is_fusible(norm, x, slope):
        return None
    if isinstance(norm, FunctionalBatchNorm):
        statistics, moved = _statistics(norm, x, x.shape[1]), _moved(norm)
        result = functools.partial(new_result, x, prelu.PLACEHOLDER[0])
    else:
        moved, result = norm.moved, functools.partial(norm.new_result, x, prelu.PLACEHOLDER[0])
        statistics = (torch.empty(2 * norm.count_of_moments(x), dtype=statistics_dtype(x), device=x.device),)
    tensors = (x, norm.weight, norm.bias, slope, *statistics)
    with copying(norm.bias):
        return _Keeps.apply([True] * len(tensors), result, *tensors), moved


def _mask(x: Tensor, residual: Tensor | None, activation: str) -> tuple[Tensor, ...]:
    """What backward reads in the place of the residual; nothing where it reads that."""
    if not has_mask(kernels_for(x.device.type), x, residual, activation):
        return ()
    size = bytes_of_mask(layout_of(x, memory_format_of(x)), x.element_size())
    return (torch.empty(size, dtype=torch.uint8, device=x.device),)


def _statistics(norm: FunctionalBatchNorm, x: Tensor, channels: int) -> tuple[Tensor, ...]:
    """What the mean and the variance lie in."""
    fixed = running_statistics_of(norm)
    if fixed is not None:
        return fixed.mean, fixed.var
    return (torch.empty(2 * channels, dtype=statistics_dtype(x), device=x.device),)


def _moved(norm: FunctionalBatchNorm) -> Sequence[Tensor]:
    running = running_of(norm)
    return () if running is None else (running.mean, running.var)


def _producer_statistics(x: Tensor, needs_moments: bool) -> tuple[Producer, Sequence[Tensor]]:
    """Without the moments: nobody reads them in backward, and they are never computed again."""
    return Producer(x), ()


STAND_INS: dict[Any, StandIn] = {
    split_norm_act: _norm_act,
    shared_norm_act: _shared_norm_act,
    producer_statistics: _producer_statistics,
    sample_norms.split_sample_norm_act: _sample_norm_act,
    prelu.split_norm_prelu: _norm_prelu,
}
