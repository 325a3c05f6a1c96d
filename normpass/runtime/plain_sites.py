"""A site in plain operators, for a compiler that fuses them: what runs once, and what may run again in backward.

    prepare    mean and var of x, which are kept; the running statistics move
    finish     z = act((x − mean)·rsqrt(var + eps)·weight + bias + residual): pointwise, of x and vectors

Autograd differentiates both, the statistics too. Inductor makes one kernel of the moments, one of `finish`, one of all
sums of backward and one of dx: 3 array moves forward and 5 backward, as our kernels do, with what stands around a site
fused into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from normpass.ops.layout import reduced_dims, statistics_dtype
from normpass.ops.norm_act_backward import norm_act_formula
from normpass.runtime.functional import (
    FunctionalBatchNorm,
    is_fusible,
    plain_norm_act,
    running_of,
    running_statistics_of,
)


def prepare_plain(
    norm: FunctionalBatchNorm,
    x: Tensor,
    residual: Tensor | None = None,
    activation: str = "identity",
    activation_args: Sequence[float] = (),
    sum_into: str = "",
) -> Any:
    """What `finish_plain` takes, or the result of the layers themselves where it cannot take their place."""
    if not is_fusible(norm, x, residual, activation, sum_into):
        return plain_norm_act(norm, x, residual, activation, activation_args, sum_into)
    fixed = running_statistics_of(norm)
    if fixed is None:
        var, mean = torch.var_mean(x.to(statistics_dtype(x)), reduced_dims(x), correction=0)
        _move(norm, mean.detach(), var.detach(), x.numel() // x.size(1))
    else:
        mean, var = fixed.mean, fixed.var
    return (x, residual, norm.weight, norm.bias), mean, var, norm.eps, activation, list(activation_args)


def finish_plain(prepared: Any) -> Tensor:
    """z from what `prepare_plain` returned."""
    if isinstance(prepared, Tensor):
        return prepared
    tensors, mean, var, eps, activation, activation_args = prepared
    return norm_act_formula(tensors, mean, var, eps, False, activation, activation_args)


def _move(norm: FunctionalBatchNorm, mean: Tensor, var: Tensor, count: Any) -> None:
    running = running_of(norm)
    if running is None:
        return
    share = running.momentum
    with torch.no_grad():
        running.mean.copy_((1 - share) * running.mean + share * mean)
        running.var.copy_((1 - share) * running.var + share * var * (count / (count - 1)))
