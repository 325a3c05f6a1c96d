"""What a rewritten graph calls where norms read concatenations of the same tensors.

    producer_statistics   right behind a producer: the moments of its channels, for all norms that will read them
    shared_norm_act       z = act(norm(cat(…))) from what those gave; z carries its recipe

As in `normpass.functional` the norm modules are read when the graph runs. Where one can no longer be fused, the plain
layers run on the concatenation itself: same numbers, no saving.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normpass.functional import (
    NormTensors,
    Statistics,
    fusible,
    move_running_stats,
    next_running,
    plain_norm_act,
    running_statistics_of,
    split_norm_act,
)
from normpass.kernels import kernels_for
from normpass.ops.cat_norm_act import cat_norm_act, cat_norm_act_by
from normpass.ops.eager import eager_device, under_other_derivatives
from normpass.ops.library import is_exporting
from normpass.ops.moments import moments_with_update
from normpass.ops.pieces import are_pieces, channels_of
from normpass.ops.running_stats import update_running_stats
from normpass.ops.shared_gradient import CatNormAct, GradientSum, Reader
from normpass.recipe import is_recording, pass_on, tag


class Producer(NamedTuple):
    """One tensor that norms read as a piece of their concatenations."""

    x: Tensor
    """(N, Cᵢ, *)"""
    statistics: Tensor | None
    """(2, Cᵢ): mean and biased variance of each channel; None where no norm needs them"""
    shared: GradientSum | None
    """where the norms add up its gradient; None where autograd does"""


class Whole(NamedTuple):
    """What `fusible` asks of a tensor, of a concatenation that does not exist."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)


def producer_statistics(x: Any, *norms: Any) -> Producer:
    """The moments of `x`, if one of `norms` (modules, or whether they normalise with the batch's) needs them now."""
    if not _has_moments(x) or is_exporting() or under_other_derivatives():
        return Producer(x, None, None)
    needed = any([_uses_batch_statistics(norm) for norm in norms])
    device = eager_device(x)
    if device is None:
        statistics = torch.stack(torch.ops.normpass.moments.default(x.detach())) if needed else None
        return Producer(x, statistics, None)
    kernels = kernels_for(device)
    statistics = torch.stack(moments_with_update(kernels, x, None)) if needed else None
    if kernels is None or not x.requires_grad or not torch.is_grad_enabled():
        return Producer(x, statistics, None)
    shared = GradientSum()
    alias = Reader.apply(x, None if statistics is None else statistics[0], shared)
    pass_on(x, alias)
    return Producer(alias, statistics, shared)


def shared_norm_act(norm: Any, activation: str, activation_args: Sequence[float], *producers: Producer) -> Tensor:
    """act(norm(cat of `producers`)) without the concatenation; who saves the result saves its recipe instead."""
    prepared = _prepare(norm, activation, activation_args, producers)
    if isinstance(prepared, Tensor):
        return prepared
    device = eager_device(*prepared[0])
    z = _cat_norm_act_on(device, prepared, [p.shared for p in producers])
    if not torch.compiler.is_compiling() and is_recording():
        tag(z, rebuild_cat_norm_act, prepared)
    return z


def prepare_shared_norm_act(
    norm: Any, activation: str, activation_args: Sequence[float], *producers: Producer
) -> tuple | Tensor:
    """What of `shared_norm_act` is to run once a step; for `finish_shared_norm_act`, as `prepare_norm_act`."""
    return _prepare(norm, activation, activation_args, producers)


def finish_shared_norm_act(prepared: tuple | Tensor) -> Tensor:
    """z = act(norm(cat(…))) from what `prepare_shared_norm_act` returned."""
    return prepared if isinstance(prepared, Tensor) else cat_norm_act(*prepared)


def rebuild_cat_norm_act(xs: Sequence[Tensor], *others: Any) -> Tensor:
    """`cat_norm_act` by the shortest way: what a recipe calls."""
    device = eager_device(*xs)
    return cat_norm_act(xs, *others) if device is None else cat_norm_act_by(kernels_for(device), xs, *others)


def _cat_norm_act_on(device: str | None, prepared: tuple, shared: Sequence[GradientSum | None]) -> Tensor:
    xs, weight, bias, mean, var, *options = prepared
    kernels = None if device is None else kernels_for(device)
    if kernels is None:
        return cat_norm_act(*prepared)
    if not torch.is_grad_enabled():
        return cat_norm_act_by(kernels, *prepared)
    if any([own is None and x.requires_grad for own, x in zip(shared, xs, strict=True)]):
        return cat_norm_act(*prepared)
    z: Tensor = CatNormAct.apply(weight, bias, mean, var, kernels, tuple(options), shared, *xs)
    return z


def _prepare(
    norm: Any, activation: str, activation_args: Sequence[float], producers: Sequence[Producer]
) -> tuple | Tensor:
    """The arguments of `cat_norm_act`, the running statistics moved; or the result, where the norm cannot be fused."""
    xs = [p.x for p in producers]
    tensors = fusible(norm, _whole(xs), None, activation) if are_pieces(xs) else None
    if tensors is None:
        return plain_norm_act(norm, torch.cat(xs, 1), None, activation, activation_args, "")
    statistics = _statistics(norm, tensors, producers)
    if statistics is None:
        return split_norm_act(norm, torch.cat(xs, 1), None, activation, activation_args)
    mean, var, of_batch = statistics
    return xs, tensors.weight, tensors.bias, mean, var, norm.eps, of_batch, activation, list(activation_args)


def _statistics(norm: Any, tensors: NormTensors, producers: Sequence[Producer]) -> Statistics | None:
    """What this call normalises with, the running statistics moved; None where a producer has no moments."""
    fixed = running_statistics_of(norm, tensors)
    if fixed is not None:
        return fixed
    parts = [p.statistics for p in producers if p.statistics is not None]
    if len(parts) < len(producers):
        return None
    mean, var = torch.cat(parts, 1).unbind(0)
    running = next_running(norm, tensors)
    if running is not None:
        x = producers[0].x
        count = x.numel() // x.shape[1]
        device = eager_device(x)
        if device is None:
            move_running_stats(running, mean, var, count)
        else:
            update_running_stats(kernels_for(device), running, mean, var, count)
    return Statistics(mean, var, of_batch=True)


def _whole(xs: Sequence[Tensor]) -> Whole:
    first = xs[0]
    return Whole((first.shape[0], channels_of(xs), *first.shape[2:]), first.dtype, first.device)


def _has_moments(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 1 and x.is_floating_point() and x.numel() > 0


def _uses_batch_statistics(norm: Any) -> bool:
    if isinstance(norm, bool):
        return norm
    return norm.training or norm.running_mean is None or norm.running_var is None
