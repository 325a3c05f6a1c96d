"""What the norms whose statistics are a sample's own have in common: `group_norm_act` and `row_norm_act`.

Both are autograd functions and no operators of `torch.ops`: they run in eager mode alone. A compiler gets ATen's norms,
which it decomposes and fuses with what stands around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from normpass.kernels import kernels_for
from normpass.kernels.contract import Norm, SampleNorms

from .eager import gradients_of, no_gradients
from .layout import statistics_dtype
from .operands import norm_operand

Moments = tuple[Tensor, Tensor]
"""The mean and the biased variance of each group or row."""


class Options(Protocol):
    """What belongs to a call and is no tensor, and what is computed with it."""

    activation: str

    def computed(
        self,
        kernels: SampleNorms,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        moments: Moments | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z and the moments of x, which are given where they are known."""

    def gradients(
        self,
        kernels: SampleNorms,
        grad: Tensor,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """Of x, residual, weight and bias; None for what is not needed."""

    def formula(self, x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """z in ATen's operators."""


def sample_norms_of(device: str | None) -> SampleNorms | None:
    """The kernels of a device; None where there are none."""
    kernels = None if device is None else kernels_for(device)
    return None if kernels is None else kernels.sample_norms


def on_one_device(x: Tensor, *others: Tensor | None) -> bool:
    """Whether plain tensors of one device type (see `eager_device`) are on the same device."""
    device = x.get_device()
    return all([t is None or t.get_device() == device for t in others])


def new_moments(x: Tensor, shape: Sequence[int]) -> Moments:
    """Memory for the moments of `x`."""
    mean = x.new_empty(shape, dtype=statistics_dtype(x))
    return mean, torch.empty_like(mean)


def norm_of(
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    activation: str,
    activation_args: Sequence[float],
) -> Norm:
    """A norm as kernels read it."""
    return norm_operand((weight, bias, mean, var), (eps, True, activation, activation_args), mean.dtype)


def normalized(
    kernels: SampleNorms,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    moments: Moments | None,
    options: Options,
) -> tuple[Tensor, Tensor, Tensor]:
    """z and the moments of x, which have no gradient."""
    if not torch.is_grad_enabled():
        return options.computed(kernels, x, residual, weight, bias, moments)
    mean, var = (None, None) if moments is None else moments
    z, mean, var = SampleNormAct.apply(x, residual, weight, bias, mean, var, kernels, options)
    return z, mean, var


class SampleNormAct(torch.autograd.Function):
    """z and the moments of x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        kernels: SampleNorms,
        options: Options,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        moments = None if mean is None or var is None else (mean, var)
        z, mean, var = options.computed(kernels, x, residual, weight, bias, moments)
        ctx.kernels, ctx.options = kernels, options
        _keep(ctx, options.activation, x, residual, weight, bias, mean, var)
        if moments is not None:
            mean, var = mean.view_as(mean), var.view_as(var)
        ctx.mark_non_differentiable(mean, var)
        return z, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return no_gradients(ctx)
        needs, options = ctx.needs_input_grad[:4], ctx.options
        x, residual, weight, bias, mean, var = _kept(ctx)
        if torch.is_grad_enabled():
            if residual is None and needs[1]:  # the identity does not need it: any value will do
                residual = torch.zeros_like(x).requires_grad_()
            found = gradients_of(options.formula, (x, residual, weight, bias), grad, needs)
            return *found, *[None] * 4
        is_sum = needs[1] and options.activation == "identity"  # then the residual's gradient is `grad` itself
        needs = needs[0], needs[1] and not is_sum, *needs[2:]
        found = options.gradients(ctx.kernels, grad, x, residual, weight, bias, mean, var, needs)
        return found[0], grad if is_sum else found[1], *found[2:], *[None] * 4


def _keep(
    ctx: Any,
    activation: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
) -> None:
    """Keep what backward reads: residual and bias only for an activation's derivative."""
    rebuilds_y = activation != "identity"
    ctx.bias = None if bias is None or rebuilds_y else (bias.shape, bias.dtype)
    ctx.save_for_backward(x, residual if rebuilds_y else None, weight, bias if rebuilds_y else None, mean, var)


def _kept(ctx: Any) -> list[Any]:
    """x, residual, weight, bias, mean, var; for a bias that was not kept zeros, of which the gradient is the same."""
    x, residual, weight, bias, mean, var = ctx.saved_tensors
    if ctx.bias is not None:
        shape, dtype = ctx.bias
        bias = x.new_zeros(shape, dtype=dtype).requires_grad_()
    return [x, residual, weight, bias, mean, var]
