"""`normpass::moments`: the mean and the biased variance of every channel.

For x of shape (N, C, *) and m = N·spatial, mean = Σx/m and var = Σ(x − mean)²/m, in two passes: E[x²] − E[x]²
has a relative error of 0.25 in float32 where mean/std = 1000. The gradient, by the chain rule with Σ(x −
mean) = 0:

    dx = dmean/m + dvar · 2·(x − mean)/m

The kernels need one pass over x, with sums shifted by a value of the channel and merged by Chan's formula (Chan,
Golub, LeVeque 1979). The reference, where there are none, uses ATen's own BatchNorm statistics where they are that
good. ATen's CPU code for channels_last keeps one running sum per channel, which at mean/std = 1000 and 5e4 values
leaves 6e-5 of the variance and 9e-3 standard deviations of the mean; blocks of rows, each recentred on a pairwise
mean and merged, leave 2e-6 and 1e-4. That takes two to three times as long as ATen's pass over a tensor of
16×64×56×56, which is itself a small part of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normpass.kernels.contract import Kernels, Running

from .layout import (
    check_input,
    memory_format_of,
    per_channel,
    reduced_dims,
    statistics_dtype,
)
from .library import declare
from .operands import can_run, dense, layout_of
from .running_stats import is_writable, note_written, update_running_stats

aten = torch.ops.aten

ROWS_PER_BLOCK = 8192
"""Rows of a channels_last tensor whose running sum is still accurate."""


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of `x`.

    Args:
        x: (N, C, *), floating.

    Returns:
        `mean` and `var`, each (C,), float64 for float64 input and float32 otherwise.

    Raises:
        ValueError: `x` is not a floating (N, C, *) tensor, or holds no value.
    """
    mean, var = _moments(x)
    return mean, var


def moments_with_update(kernels: Kernels | None, x: Tensor, running: Running | None) -> tuple[Tensor, Tensor]:
    """`moments` of a constant in plain eager mode, and the running statistics after this batch in `running`."""
    x = x.detach()
    if kernels is None or not can_run(kernels, x):
        mean, var = _reference(x)
    elif running is None or not is_writable(running, (x.shape[1],), statistics_dtype(x), x.get_device()):
        mean, var = _by_kernel(kernels, x, None)
    else:
        mean, var = _by_kernel(kernels, x, running)
        note_written(running)
        return mean, var
    if running is not None:
        update_running_stats(kernels, running, mean, var, x.numel() // x.shape[1])
    return mean, var


def _reference(x: Tensor) -> tuple[Tensor, Tensor]:
    check_input("moments", x)
    if x.numel() == 0:
        raise ValueError(f"normpass::moments: `x` must hold at least one value per channel, got shape {tuple(x.shape)}")
    memory_format = memory_format_of(x)
    x = x.contiguous(memory_format=memory_format)
    by_rows = x.dim() == 2 or memory_format is not torch.contiguous_format
    if x.is_cpu and by_rows and x.dtype == torch.float32:
        return _moments_of_rows(x)
    if x.is_cpu or x.is_cuda:
        return _aten_moments(x)
    var, mean = torch.var_mean(x.to(statistics_dtype(x)), reduced_dims(x), correction=0)
    return mean, var


def _aten_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    scratch = x.new_zeros((2, x.shape[1]), dtype=statistics_dtype(x))  # its dtype decides the result's
    mean, var = aten.batch_norm_update_stats(x, scratch[0], scratch[1], 0.0)
    return mean, var


def _moments_of_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of a tensor stored as rows of C values, block by block."""
    rows = x.movedim(1, -1).view(-1, x.shape[1])
    blocks = torch.split(rows, ROWS_PER_BLOCK)
    merged = [_recentred_moments(block) for block in blocks]
    if len(merged) == 1:
        return merged[0]
    weight = torch.tensor([len(block) / len(rows) for block in blocks], dtype=torch.float64, device="cpu")[:, None]
    means = torch.stack([mean for mean, _ in merged]).double()
    variances = torch.stack([var for _, var in merged]).double()
    mean = (weight * means).sum(0)
    var = (weight * (variances + (means - mean).square())).sum(0)
    return mean.to(x.dtype), var.to(x.dtype)


def _recentred_moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Σ(x − a)²/m about a rough mean a is var + (mean − a)²."""
    rough_mean, second_moment = _aten_moments(rows)
    mean = rows.mean(0)
    return mean, (second_moment - (mean - rough_mean).square()).clamp_(min=0)


def _kernel(kernels: Kernels | None, x: Tensor) -> tuple[Tensor, Tensor]:
    if kernels is None or not can_run(kernels, x):
        return _reference(x)
    return _by_kernel(kernels, x, None)


def _by_kernel(kernels: Kernels, x: Tensor, running: Running | None) -> tuple[Tensor, Tensor]:
    memory_format = memory_format_of(x)
    mean = x.new_empty((x.shape[1],), dtype=statistics_dtype(x))
    var = torch.empty_like(mean)
    kernels.moments(mean, var, dense(x, memory_format), layout_of(x, memory_format), running)
    return mean, var


def _fake(x: Tensor) -> tuple[Tensor, Tensor]:
    check_input("moments", x)
    dtype = statistics_dtype(x)
    return x.new_empty((x.shape[1],), dtype=dtype), x.new_empty((x.shape[1],), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], output[0])
    ctx.set_materialize_grads(False)  # or an op that owns the statistics' gradient costs a tensor of zeros


def _backward(ctx: Any, grad_mean: Tensor | None, grad_var: Tensor | None) -> Tensor | None:
    x, mean = ctx.saved_tensors
    if grad_mean is None and grad_var is None:
        return None
    count = x.numel() // x.shape[1]
    dx = torch.zeros_like(mean) if grad_mean is None else grad_mean / count
    dx = per_channel(dx, x)
    if grad_var is not None:
        dx = dx + (x - per_channel(mean, x)) * per_channel(grad_var * (2 / count), x)
    return dx.to(x.dtype).expand(x.shape)


_moments = declare(
    "moments(Tensor x) -> (Tensor mean, Tensor var)",
    reference=_reference,
    fake=_fake,
    kernel=_kernel,
    backward=_backward,
    setup_context=_setup_context,
)
