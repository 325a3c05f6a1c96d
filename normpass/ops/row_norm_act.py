"""Layer norm and RMS norm over the last dimensions, with the activation behind them; keep their input for backward.

Per row of m values, with r = 1/sqrt(var + eps):

    x̂ = (x − mean)·r      y = weight·x̂ + bias      z = act(y)

Backward from g = dL/dz, with dy = g·act'(y) and h = weight·dy:

    dx = r·(h − Σh/m − x̂·Σ(h·x̂)/m)      dweight = Σ dy·x̂      dbias = Σ dy      (the last two over the rows)

(Ba, Kiros and Hinton 2016.) RMS norm (Zhang and Sennrich 2019) has no mean: it is 0, var is the mean square, and Σh/m
is not there. Autograd keeps x and the moments; y is made again by the code of forward, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normpass.kernels.contract import Rows, SampleNorms

from .activation import activate
from .eager import eager_device, no_gradients
from .layout import statistics_dtype
from .operands import in_dtype_of, new_per_channel
from .sample_norm import differentiable_gradients, keep, kept, norm_of, sample_norms_of


@dataclass(slots=True)  # no tuple: recipes look for tensors in those
class RowNormOptions:
    """What belongs to the call and is no tensor."""

    normalized_shape: tuple[int, ...]
    """of the last dimensions, which are one row"""
    eps: float
    activation: str
    activation_args: Sequence[float]
    is_rms_norm: bool


def row_norm_act_on(
    kernels: SampleNorms,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: tuple[Tensor, Tensor] | None,
    options: RowNormOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """act(norm(x)), and the mean and biased variance of each row, (rows,), which have no gradient.

    Args:
        kernels: of x's device.
        x: (*, *normalized_shape), floating, not empty, a plain tensor.
        weight, bias: None or of `normalized_shape`.
        moments: those of x, where they are known: z is made again.

    Returns:
        z is contiguous.
    """
    mean, var = (None, None) if moments is None else moments
    if torch.is_grad_enabled():
        z, mean, var = RowNormAct.apply(x, weight, bias, mean, var, kernels, options)
        return z, mean, var
    return _computed(kernels, x, weight, bias, mean, var, options)


def rebuild_row_norm_act(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, options: RowNormOptions
) -> Tensor:
    """z again, bit for bit: what a recipe calls."""
    kernels = sample_norms_of(eager_device(x))
    if kernels is None:  # switched off meanwhile
        return _formula(options, x, weight, bias)
    return row_norm_act_on(kernels, x, weight, bias, (mean, var), options)[0]


def _rows_of(x: Tensor, options: RowNormOptions) -> Rows:
    width = math.prod(options.normalized_shape)
    return Rows(x.numel() // width, width, not options.is_rms_norm)


def _computed(
    kernels: SampleNorms,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    options: RowNormOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, is_given = _rows_of(x, options), mean is not None
    if mean is None or var is None:
        mean = x.new_empty((rows.rows,), dtype=statistics_dtype(x))
        var = torch.empty_like(mean)
    z = torch.empty_like(x, memory_format=torch.contiguous_format)
    norm = norm_of(weight, bias, mean, var, options.eps, options.activation, options.activation_args)
    kernels.row_norm_act(z, x.contiguous(), norm, is_given, rows)
    return z, mean, var


class RowNormAct(torch.autograd.Function):
    """z and the moments of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        kernels: SampleNorms,
        options: RowNormOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        is_given = mean is not None
        z, mean, var = _computed(kernels, x, weight, bias, mean, var, options)
        ctx.kernels, ctx.options, ctx.bias_shape = kernels, options, options.normalized_shape
        keep(ctx, options.activation, x, None, weight, bias, mean, var)
        if is_given:
            mean, var = mean.view_as(mean), var.view_as(var)
        ctx.mark_non_differentiable(mean, var)
        return z, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return no_gradients(ctx)
        needs, options = ctx.needs_input_grad[:3], ctx.options
        x, _, weight, bias, mean, var = kept(ctx)
        if torch.is_grad_enabled():
            found = differentiable_gradients(lambda *t: _formula(options, *t), (x, weight, bias), grad, needs)
        else:
            found = _gradients(ctx.kernels, grad, x, weight, bias, mean, var, options, needs)
        return *found, *[None] * 4


def _gradients(
    kernels: SampleNorms,
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    options: RowNormOptions,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Of x, weight and bias; None for what is not needed."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs[0] else None
    dweight, dbias = new_per_channel(weight, mean.dtype, needs[1]), new_per_channel(bias, mean.dtype, needs[2])
    norm = norm_of(weight, bias, mean, var, options.eps, options.activation, options.activation_args)
    kernels.row_norm_act_backward(dx, dweight, dbias, grad.contiguous(), x.contiguous(), norm, _rows_of(x, options))
    return [dx, in_dtype_of(weight, dweight), in_dtype_of(bias, dbias)]


def _formula(options: RowNormOptions, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """z in ATen's operators."""
    if options.is_rms_norm:
        y = F.rms_norm(x, options.normalized_shape, weight, options.eps)
    else:
        y = F.layer_norm(x, options.normalized_shape, weight, bias, options.eps)
    return activate(y, options.activation, options.activation_args)
