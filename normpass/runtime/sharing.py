"""What a rewritten graph calls where norms read concatenations of the same tensors.

    producer_statistics   right behind a producer: the moments of its channels, for all norms that will read them
    shared_norm_act       z = act(norm(cat(…))) from what those gave; z carries its recipe

As in `normpass.runtime.functional`: where a norm cannot be fused, the plain functions run on the concatenation
itself, same numbers, no saving.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.kernels.contract import Kernels
from normpass.onlookers import is_exporting, under_other_derivatives
from normpass.ops.activation import RULES
from normpass.ops.cat_norm_act import cat_norm_act, run_cat_norm_act
from normpass.ops.eager import eager_device
from normpass.ops.layout import suggested_format
from normpass.ops.moments import moments_with_update
from normpass.ops.operands import can_run
from normpass.ops.pieces import are_pieces, channels_of
from normpass.ops.running_stats import move_running_stats, update_running_stats
from normpass.ops.shared_gradient import CatNormAct, Reader
from normpass.recipe.notes import copied, copying, is_recording, notes_now, tag
from normpass.recipe.recipes import Kept
from normpass.runtime.functional import (
    Statistics,
    fused_norm_act,
    is_fusible,
    plain_norm_act,
    running_of,
    running_statistics_of,
    split_norm_act,
    watch_running,
)
from normpass.runtime.prelu import fused_norm_prelu, split_norm_prelu
from normpass.runtime.sample_norms import fused_sample_norm_act, split_sample_norm_act


class Producer(NamedTuple):
    """One tensor that norms read as a piece of their concatenations."""

    x: Tensor
    """(N, Cᵢ, *)"""
    statistics: Tensor | None = None
    """(2, Cᵢ): mean and biased variance of each channel; None where they were not asked for"""
    memory_format: torch.memory_format | None = None
    """in which x is dense; None where x is not for kernels without the dispatcher"""
    kept: Kept | None = None
    """x as recipes keep it, one for all"""
    stream: int = 0
    """the CUDA stream it was read on; autograd synchronises streams for its own gradients only"""


class Whole(NamedTuple):
    """What `fusible` asks of a tensor, of a concatenation that does not exist."""

    shape: Sequence[int]
    dtype: torch.dtype
    device: torch.device

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)


def producer_statistics(x: Any, needs_moments: bool) -> Producer:
    """The moments of `x`, if one of the norms that read it normalizes with the batch's."""
    if not _has_moments(x) or is_exporting() or under_other_derivatives():
        return Producer(x)
    statistics = _moments(x) if needs_moments else None
    device = eager_device(x)
    kernels = None if device is None else kernels_for(device)
    memory_format = suggested_format(x)
    if kernels is None or not can_run(kernels, x) or not x.is_contiguous(memory_format=memory_format):
        return Producer(x, statistics)
    if x.requires_grad and torch.is_grad_enabled():
        x = Reader.apply(x, memory_format)
    notes = notes_now()
    kept = Kept(x) if notes is not None and notes.recipe_of(x) is None else None
    return Producer(x, statistics, memory_format, kept, _stream(x))


def shared_norm_act(norm: Any, activation: str, activation_args: Sequence[float], *producers: Producer) -> Tensor:
    """act(norm(cat of `producers`)) without the concatenation; who saves the result saves its recipe instead."""
    return _shared(norm, activation, activation_args, producers, is_rebuilt=True)


def kept_shared_norm_act(norm: Any, activation: str, activation_args: Sequence[float], *producers: Producer) -> Tensor:
    """The same without a recipe: who saves the result keeps it."""
    return _shared(norm, activation, activation_args, producers, is_rebuilt=False)


WITHOUT_RECIPE: dict[Any, Callable[..., Tensor]] = {
    split_norm_act: fused_norm_act,
    shared_norm_act: kept_shared_norm_act,
    split_sample_norm_act: fused_sample_norm_act,
    split_norm_prelu: fused_norm_prelu,
}
"""What rebuilds its result -> the same that keeps it."""


def _shared(
    norm: Any, activation: str, activation_args: Sequence[float], producers: Sequence[Producer], is_rebuilt: bool
) -> Tensor:
    prepared = _prepare(norm, activation, activation_args, producers)
    if isinstance(prepared, Tensor):
        return prepared
    with copying(prepared[2]):
        return _run(prepared, producers, is_rebuilt)


def _run(prepared: tuple, producers: Sequence[Producer], is_rebuilt: bool) -> Tensor:
    fast = _without_dispatcher(prepared, producers)
    if fast is None:
        z = cat_norm_act(*prepared)
        if is_rebuilt:
            values = prepared[1:5] if z.requires_grad else tuple(map(copied, prepared[1:5]))
            tag(z, cat_norm_act, (prepared[0], *values, *prepared[5:]))
        return z
    kernels, memory_format = fast
    xs, weight, bias, mean, var, *options = prepared
    values = weight, bias, mean, var
    if torch.is_grad_enabled():
        z = CatNormAct.apply(*values, kernels, memory_format, tuple(options), *xs)
    else:
        z = run_cat_norm_act(kernels, xs, memory_format, values, tuple(options))
    if is_rebuilt and is_recording():
        values = values if z.requires_grad else tuple(map(copied, values))
        pieces = [x if p.kept is None else p.kept for x, p in zip(xs, producers, strict=True)]
        tag(z, _rebuild, (pieces, memory_format, *values, tuple(options)))
    return z


def prepare_shared_norm_act(
    norm: Any, activation: str, activation_args: Sequence[float], *producers: Producer
) -> tuple | Tensor:
    """What of `shared_norm_act` is to run once a step; for `finish_shared_norm_act`, as `prepare_norm_act`."""
    return _prepare(norm, activation, activation_args, producers)


def finish_shared_norm_act(prepared: tuple | Tensor) -> Tensor:
    """z = act(norm(cat(…))) from what `prepare_shared_norm_act` returned."""
    return prepared if isinstance(prepared, Tensor) else cat_norm_act(*prepared)


def _rebuild(xs: Sequence[Tensor], memory_format: torch.memory_format, *others: Any) -> Tensor:
    """z again, by the kernels that have made it."""
    kernels, (weight, bias, mean, var, options) = kernels_for(xs[0].device.type), others
    if kernels is None:  # switched off meanwhile
        return cat_norm_act(xs, weight, bias, mean, var, *options)
    return run_cat_norm_act(kernels, xs, memory_format, (weight, bias, mean, var), options)


def _without_dispatcher(prepared: tuple, producers: Sequence[Producer]) -> tuple[Kernels, torch.memory_format] | None:
    """The kernels and the memory format of all pieces, where `CatNormAct` can run; None where the op must."""
    xs, weight, bias, mean, var, *options = prepared
    memory_format = producers[0].memory_format
    if memory_format is None or any([p.memory_format is not memory_format for p in producers]):
        return None
    if torch.is_grad_enabled() and any([x.requires_grad and not hasattr(x.grad_fn, "shared") for x in xs]):
        return None  # forward began without gradients
    stream = _stream(xs[0])
    if any([p.stream != stream for p in producers]):
        return None
    device = eager_device(xs[0], weight, bias, mean, var)
    kernels = None if device is None else kernels_for(device)
    if kernels is None or not options[1] and (mean.requires_grad or var.requires_grad):
        return None
    channels, rule = mean.shape, RULES.get(options[2])
    fits = all([t is None or t.shape == channels and not t.is_neg() for t in (weight, bias, var)])
    fits = fits and rule is not None and len(xs) <= kernels.most_pieces
    return (kernels, memory_format) if fits else None


def _prepare(
    norm: Any, activation: str, activation_args: Sequence[float], producers: Sequence[Producer]
) -> tuple | Tensor:
    """The arguments of `cat_norm_act`, the running statistics moved; or the result, where the norm cannot be fused."""
    xs = [p.x for p in producers]
    if not are_pieces(xs) or not is_fusible(norm, whole_of(xs), None, activation):
        return plain_norm_act(norm, torch.cat(xs, 1), None, activation, activation_args, "")
    mean, var, of_batch = _statistics(norm, producers)
    watch_running(norm, var)
    return xs, norm.weight, norm.bias, mean, var, norm.eps, of_batch, activation, list(activation_args)


def _statistics(norm: Any, producers: Sequence[Producer]) -> Statistics:
    """What this call normalizes with, the running statistics moved."""
    fixed = running_statistics_of(norm)
    if fixed is not None:
        return fixed
    parts = [_moments(p.x) if p.statistics is None else p.statistics for p in producers]
    mean, var = torch.cat(parts, 1).unbind(0)
    running = running_of(norm)
    if running is not None:
        x = producers[0].x
        count = x.numel() // x.shape[1]
        device = eager_device(x)
        if device is None:
            move_running_stats(running, mean, var, count)
        else:
            update_running_stats(kernels_for(device), running, mean, var, count)
    return Statistics(mean, var, of_batch=True)


def _moments(x: Tensor) -> Tensor:
    """(2, Cᵢ): mean and biased variance."""
    device = eager_device(x)
    if device is None:
        return torch.stack(torch.ops.normpass.moments.default(x.detach()))
    return torch.stack(moments_with_update(kernels_for(device), x, None))


def _stream(x: Tensor) -> int:
    return int(torch._C._cuda_getCurrentRawStream(x.get_device())) if x.is_cuda else 0


def whole_of(xs: Sequence[Tensor]) -> Whole:
    first = xs[0]
    return Whole((first.shape[0], channels_of(xs), *first.shape[2:]), first.dtype, first.device)


def _has_moments(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 1 and x.is_floating_point() and x.numel() > 0
